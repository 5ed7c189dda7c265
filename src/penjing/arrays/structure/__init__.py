"""Units of a network: which can only go together, in which order they go, and what their going saves."""
