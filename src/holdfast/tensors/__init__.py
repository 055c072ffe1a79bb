"""Tensors read lazily, by boxes: cast, renamed, mapped or dequantized on the way."""
