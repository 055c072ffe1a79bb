"""Measurements of Holdfast beside its peers, taken in the same run."""
