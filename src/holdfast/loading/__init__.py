"""Load: match, plan, read, hand over."""
