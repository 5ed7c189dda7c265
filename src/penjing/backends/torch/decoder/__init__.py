"""Causal language models block by block, from files larger than the memory."""
