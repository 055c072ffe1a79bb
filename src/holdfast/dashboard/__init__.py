"""Pages, charts, metrics and the web server about runs and their checkpoints."""
