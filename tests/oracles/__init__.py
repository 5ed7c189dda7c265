"""Slow, readable twins of what the package computes, each by its definition; only tests call them."""
