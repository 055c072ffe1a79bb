"""File formats: values, and the bytes that represent them. No torch, no I/O."""
