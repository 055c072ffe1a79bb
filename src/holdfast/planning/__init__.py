"""Plan saves and loads: which rank writes and reads what, and where."""
