"""Hugging Face checkpoints: their names and shapes, related to ours by tables."""
