"""Benchmarks of Holdfast and other libraries, measured in the same run."""
