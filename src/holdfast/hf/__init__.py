"""Hugging Face checkpoints, and tables that relate their tensors to native tensors."""
