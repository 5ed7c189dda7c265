"""Cheap repair after a cut, one file each."""
