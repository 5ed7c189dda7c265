"""Choosing the codes of weights by what their errors cost at a layer's outputs."""
