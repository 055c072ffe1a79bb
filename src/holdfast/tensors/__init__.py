"""Lazy tensors: read any box, cast, rename, dequantize."""
