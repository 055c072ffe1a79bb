"""Guides for coding agents, shipped in `.agents/skills`, and the sync of a user's copies."""
