"""Save: plan, stage, write, commit."""
