"""Which checkpoints exist. Knows files and manifests, no tensors."""
