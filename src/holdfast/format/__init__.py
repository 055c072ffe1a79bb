"""File formats: convert between values and bytes, without torch and without I/O."""
