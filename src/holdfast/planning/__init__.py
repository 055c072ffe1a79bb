"""Who writes and who reads what: pure functions of layouts."""
