"""Chance: what every score has to beat."""

from __future__ import annotations

import zlib

import numpy as np

from penjing.arrays.scores.units import Floats
from penjing.core.backend import Group


def random_score(group: Group, seed: int) -> Floats:
    """Return a uniform random number for each unit: the honest baseline (Mittal et al. 2018).

    Args:
        group: its name takes part in the seed, so that groups differ and their order does not matter.
        seed: at least 0.

    Returns:
        Shape `[group.size]`, in [0, 1).
    """
    return np.random.default_rng([seed, zlib.crc32(group.name.encode())]).random(group.size)
