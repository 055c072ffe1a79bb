"""The reference training run: Llama- and Qwen3-shaped models with N-D parallelism.

This module imports nothing: `--help` and wrong settings are answered without importing torch.
"""
