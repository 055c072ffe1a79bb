"""Training state as named tensors and values. Knows no storage."""
