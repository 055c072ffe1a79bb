"""Conversion between all formats, tensor by tensor, in bounded memory, on one process."""
