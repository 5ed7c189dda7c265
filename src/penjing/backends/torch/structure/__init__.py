"""Blocks of a module, what stands in for them, and the history of what was done to its structure."""
