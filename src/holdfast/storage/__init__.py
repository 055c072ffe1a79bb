"""Stores of files: local folders, memory, object stores and other URLs."""
