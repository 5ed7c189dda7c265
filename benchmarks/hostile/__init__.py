"""Hostile files: each made by a few lines, none of them large."""
