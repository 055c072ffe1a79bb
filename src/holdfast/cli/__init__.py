"""The terminal's door: `holdfast VERB`, one module a verb."""
