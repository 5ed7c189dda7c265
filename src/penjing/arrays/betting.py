"""Bounds on a sum of independent bounded contributions, by betting: valid for every number of them.

A contribution W has mean E[W] and is at most c; nothing else is known of it, and no two need be alike. For a
stake s of at most 1 / c the factor 1 - s W is never negative, so that the product over all contributions
times exp(s d) has a mean of at most 1 wherever the means add up to d or more (1 - x <= exp(-x)). By Markov's
inequality it exceeds 1 / alpha with probability at most alpha; so does its average over several stakes that
were chosen before.

Sources: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B 86 (2024);
the average over stakes is the universal portfolio of Orabona and Jun, "Tight concentrations and confidence
sequences from the regret of universal portfolio", IEEE Trans. Information Theory 70 (2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

EVIDENCE = 3.0
"""Logarithm of what a bet has to win, about, for 95%: it places the smallest stake."""


def stakes_below(largest: Floats) -> Floats:
    """Return stakes an octave apart, from all that is allowed to what suits contributions of any spread.

    Args:
        largest: `[units]`, above 0: the most that each contribution can be.

    >>> stakes_below(np.full(100, 0.01)).tolist()
    [100.0, 50.0, 25.0, 12.5]
    """
    most = 1 / float(largest.max())
    least = math.sqrt(2 * EVIDENCE / float((largest**2).sum()))
    octaves = max(0, math.ceil(math.log2(most / least) - 1e-9))
    return np.asarray(most / 2.0 ** np.arange(octaves + 1))


@dataclass(frozen=True)
class Bets:
    """Bets that contributions add up to less than some total.

    Attributes:
        losses: `[units]`, what was seen of each contribution.
        stakes: `[bets]`, chosen without a look at the losses; each at most 1 over the largest that a
            contribution can be.
        lost: bets that could not be placed; their money counts as lost.

    >>> bets = Bets(np.zeros(1000), stakes_below(np.full(1000, 0.001)))
    >>> round(bets.upper(0.05), 4)
    0.0044
    """

    losses: Floats
    stakes: Floats
    lost: int = 0

    @property
    def _winnings(self) -> Floats:
        """The logarithm of each bet's product over all contributions, of money given out evenly."""
        with np.errstate(divide="ignore"):
            products = np.array([np.log1p(-stake * self.losses).sum() for stake in self.stakes])
        return np.asarray(products - math.log(max(len(self.stakes) + self.lost, 1)))

    def p_value(self, total: float) -> float:
        """Return the p-value of "the means add up to `total` or more"."""
        return self._p(self._winnings, total)

    def upper(self, alpha: float) -> float:
        """Return the largest total that is not rejected at a level; infinite where no bet was placed."""
        winnings = self._winnings
        if not np.isfinite(winnings).any():
            return math.inf
        # One bet alone that wins enough is an upper end; a bet that wins its part of it a lower one.
        enough = -math.log(alpha) - np.array([0.0, math.log(len(winnings))])[:, None] - winnings
        high, low = (float(ends.min()) for ends in enough / self.stakes)
        while high - low > 1e-9 * max(1.0, abs(high)):
            middle = (low + high) / 2
            low, high = (low, middle) if self._p(winnings, middle) <= alpha else (middle, high)
        return high

    def _p(self, winnings: Floats, total: float) -> float:
        if not len(winnings):
            return 1.0
        grown = self.stakes * total + winnings
        highest = float(grown.max())
        if highest == -math.inf:
            return 1.0
        return min(1.0, math.exp(min(0.0, -highest - math.log(float(np.exp(grown - highest).sum())))))
