"""Finds, opens, verifies, publishes and deletes checkpoints, without torch."""
