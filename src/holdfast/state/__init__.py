"""Training state as named tensors and values. Independent of storage."""
