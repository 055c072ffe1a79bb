"""Load: match, plan, read, apply."""
