"""Where bytes live: one `Store`, whatever is behind it. Knows no tensors and no checkpoints."""
