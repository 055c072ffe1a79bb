"""The manager of a training run: when to save, what to keep, where to resume from."""
