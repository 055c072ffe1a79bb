"""Conversion between all formats, tensor by tensor, in bounded memory, without model or ranks."""
