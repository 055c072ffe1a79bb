"""The reference training run: Llama- and Qwen3-shaped models with N-D parallelism.

This module imports nothing, so that `--help` and errors in the settings need no import of torch.
"""
