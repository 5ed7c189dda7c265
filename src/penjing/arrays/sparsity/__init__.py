"""Sparsity: patterns, masks, and the mathematics of the methods that choose what becomes zero."""
