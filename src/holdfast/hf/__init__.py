"""Hugging Face: names and shapes of its checkpoints and ours, related by tables."""
