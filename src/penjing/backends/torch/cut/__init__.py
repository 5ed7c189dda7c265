"""Cutting units out of a module, and the proof of the cut."""
