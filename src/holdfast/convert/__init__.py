"""Conversion between all formats, tensor by tensor, in bounded memory, in one process."""
