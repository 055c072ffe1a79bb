"""Stores of files: folders, memory, URLs. Knows neither tensors nor checkpoints."""
