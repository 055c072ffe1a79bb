"""Checkpoints for PyTorch training that are never lost, never lying, never in the way."""
