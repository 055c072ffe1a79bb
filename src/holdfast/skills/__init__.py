"""Skills (guides for coding agents, in `.agents/skills`), and the sync of a user's copies."""
