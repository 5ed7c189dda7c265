"""Planners: generators of plans that are told of each trial."""
