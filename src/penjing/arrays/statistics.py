"""Statistics of paired comparisons: proportions, non-inferiority, sample sizes and medians.

A *drop* is the share of examples that the baseline gets right and the candidate wrong (`lost`) minus the
share of the reverse (`gained`). All bounds are one-sided at the stated confidence unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from penjing.core.errors import Refused

Floats = NDArray[np.float64]
_quantile = NormalDist().inv_cdf


class Interval(NamedTuple):
    """A value with its lower and upper bound."""

    value: float
    low: float
    high: float


def tango_statistic(lost: ArrayLike, gained: ArrayLike, n: int, drop: float) -> Floats:
    """Return Tango's score statistic for the hypothesis that the true drop is `drop`; elementwise.

    Standard normal under the hypothesis for large counts; negative where the data show a smaller drop.
    Source: Tango, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", Statistics in Medicine 17 (1998).

    Args:
        lost, gained: counts of discordant pairs, of one shape.
        n: number of pairs.
        drop: hypothetical difference, between -1 and 1.
    """
    b, c = np.asarray(lost, float), np.asarray(gained, float)
    first, second = -b - c + (2 * n - b + c) * drop, -c * drop * (1 - drop)
    q = (np.sqrt(np.maximum(first**2 - 8 * n * second, 0)) - first) / (4 * n)
    variance = np.maximum(n * (2 * np.clip(q, max(0.0, -drop), None) + drop * (1 - drop)), 0)
    difference = b - c - n * drop
    with np.errstate(divide="ignore", invalid="ignore"):
        z = difference / np.sqrt(variance)
    degenerate = variance < 1e-12
    extreme = np.where(np.abs(difference) < 1e-9, 0.0, np.copysign(np.inf, difference))
    return np.where(degenerate, extreme, z)


def tango_interval(lost: int, gained: int, n: int, confidence: float = 0.95) -> Interval:
    """Return Tango's two-sided score interval of the drop, for comparison with other software.

    It is asymptotic: with few discordant pairs its error rate exceeds the stated one, which is why the
    certificate uses `drop_bounds`.
    """
    _check_counts(lost, gained, n)
    z = _quantile((1 + confidence) / 2)
    value = (lost - gained) / n
    high = _bisect(lambda d: float(tango_statistic(lost, gained, n, d)) >= -z, value, 1.0)
    low = -_bisect(lambda d: float(tango_statistic(gained, lost, n, d)) >= -z, -value, 1.0)
    return Interval(value, low, high)


@lru_cache(maxsize=65536)
def noninferiority_p_value(lost: int, gained: int, n: int, max_drop: float, alpha: float = 0.05) -> float:
    """Return the exact unconditional p-value of "the true drop is `max_drop` or more".

    Outcomes are ordered by Tango's statistic; the probability of one at least as favourable as the
    observed is maximised over the unknown rate of gains, which is limited to its exact confidence interval
    of level 1 - alpha/50, and alpha/50 is added for that. Valid for every n and every discordance,
    including none at all.
    Sources: Sidik, "Exact unconditional tests for testing non-inferiority in matched-pairs design",
    Statistics in Medicine 22 (2003); Berger and Boos, "P values maximized over a confidence set for the
    nuisance parameter", JASA 89 (1994).

    Args:
        lost, gained: counts of discordant pairs.
        n: number of pairs.
        max_drop: margin, between -1 and 1.
        alpha: level of the test for which the p-value is meant; it only sets the share given to the
            interval of the nuisance parameter.
    """
    _check_counts(lost, gained, n)
    spent = alpha / 50
    low, high = clopper_pearson(gained, n, spent)
    low, high = max(low, 0.0, -max_drop), min(high, (1 - max_drop) / 2)
    if low > high:
        return spent
    rates = np.linspace(low, high, 33)
    counts = _window(n, low, high)
    observed = float(tango_statistic(lost, gained, n, max_drop))
    limit = _largest_favourable(counts, n, max_drop, observed)
    weights = _binomial_mass(counts, n, rates)
    losses = np.clip((rates + max_drop) / np.maximum(1 - rates, 1e-12), 0, 1)
    below = _binomial_below(limit, n - counts, losses)
    return min(1.0, float((weights * below).sum(axis=1).max()) + spent + 1e-9)


def drop_bounds(lost: int, gained: int, n: int, confidence: float = 0.95) -> Interval:
    """Return the drop with a lower and an upper bound, each exact and one-sided at `confidence`.

    The upper bound is the largest margin that `noninferiority_p_value` does not reject; the lower bound is
    the same with the roles of the two models exchanged.
    """
    _check_counts(lost, gained, n)
    return Interval(
        (lost - gained) / n, -_upper(gained, lost, n, confidence), _upper(lost, gained, n, confidence)
    )


def _upper(lost: int, gained: int, n: int, confidence: float) -> float:
    alpha = 1 - confidence
    value = (lost - gained) / n
    return _bisect(lambda d: noninferiority_p_value(lost, gained, n, d, alpha) > alpha, value, 1.0)


def superiority_p_value(lost: int, gained: int) -> float:
    """Return the exact one-sided p-value of McNemar's test of "no loss": at least `lost` of the changes.

    Small values say that the candidate is worse. 1 where nothing changed.
    """
    from scipy.special import bdtrc

    return float(bdtrc(lost - 1, lost + gained, 0.5)) if lost > 0 else 1.0


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Return a share with Wilson's two-sided score interval (JASA 22, 1927).

    Raises:
        Refused: n is 0, or successes lie outside 0..n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise Refused(
            "the successes must lie in 0..n, and n must be at least 1",
            value=f"{successes} of {n}",
            place="wilson",
            fix="count the successes among the n examples",
        )
    z = _quantile((1 + confidence) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    return Interval(share, low, 1.0 if successes == n else min(1.0, centre + half))


def holm(p_values: Sequence[float]) -> Floats:
    """Return p-values adjusted by Holm's step-down method (Scandinavian Journal of Statistics 6, 1979)."""
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def needed_examples(
    max_drop: float, flips: float, confidence: float = 0.95, power: float = 0.8, drop: float = 0.0
) -> int:
    """Return how many examples certify `max_drop` with the given power.

    The sample size of the score test (Nam, "Establishing equivalence of two treatments and sample size
    requirements in matched-pairs design", Biometrics 53, 1997), and never less than what the exact test
    needs when nothing flips at all.

    Args:
        max_drop: margin, above `drop` and at most 1.
        flips: share of examples that change from right to wrong or back, 0 to 1.
        drop: the true drop that is assumed.

    Raises:
        Refused: the assumed drop is not below the margin, which no number of examples can certify.
    """
    if not drop < max_drop <= 1:
        raise Refused(
            "the assumed drop must be below max_drop, and max_drop at most 1",
            value=f"drop {drop:g}, max_drop {max_drop:g}",
            place="needed_examples",
            fix="assume a smaller drop: none at or above the margin can be certified",
        )
    flips = max(flips, abs(drop))
    b, c = (flips + drop) / 2, (flips - drop) / 2
    first, second = -b - c + (2 - b + c) * max_drop, -c * max_drop * (1 - max_drop)
    q = (math.sqrt(max(first**2 - 8 * second, 0.0)) - first) / 4
    null = math.sqrt(max(2 * q + max_drop - max_drop**2, 0.0))
    alternative = math.sqrt(max(flips - drop**2, 0.0))
    z = _quantile(confidence) * null + _quantile(power) * alternative
    floor = math.log((1 - confidence) * 0.98) / math.log1p(-max_drop) if max_drop < 1 else 1
    return math.ceil(max((z / (max_drop - drop)) ** 2, floor))


def smallest_certifiable_drop(
    n: int, flips: float, confidence: float = 0.95, power: float = 0.8, drop: float = 0.0
) -> float:
    """Return the smallest `max_drop` that n examples certify with the given power; see `needed_examples`."""
    if n < 1:
        raise Refused(
            "needs at least 1 example",
            value=n,
            place="smallest_certifiable_drop",
            fix="give the number of examples of the test split",
        )
    return _bisect(lambda d: d <= drop or needed_examples(d, flips, confidence, power, drop) > n, drop, 1.0)


def median_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Return the median with a two-sided, distribution-free interval between two order statistics.

    With too few values for the confidence (5 or fewer at 95%) the range of the values cannot reach it; then
    Student's interval of the mean is joined to the range.

    Raises:
        Refused: fewer than 2 values, or one that is not finite.
    """
    from scipy.special import bdtr, stdtrit

    x = np.sort(np.asarray(values, float).ravel())
    if len(x) < 2 or not np.isfinite(x).all():
        raise Refused(
            "needs at least 2 finite values",
            value=f"{len(x)} values",
            place="median_interval",
            fix="measure more rounds",
        )
    tail, n = (1 - confidence) / 2, len(x)
    below = bdtr(np.arange(n // 2 + 1), n, 0.5)
    rank = int(np.searchsorted(below, tail, side="right"))
    middle = float(np.median(x))
    if rank >= 1:
        return Interval(middle, float(x[rank - 1]), float(x[n - rank]))
    half = float(stdtrit(n - 1, 1 - tail)) * float(x.std(ddof=1)) / math.sqrt(n)
    return Interval(
        middle, min(float(x[0]), float(x.mean()) - half), max(float(x[-1]), float(x.mean()) + half)
    )


def paired_ratio_interval(values: ArrayLike, reference: ArrayLike, confidence: float = 0.95) -> Interval:
    """Return the median ratio of two series measured side by side, round by round, with its interval.

    A machine that drifts slows both sides of a round alike, so that the ratio does not see it.

    Raises:
        Refused: the series differ in length, or a value is not positive.
    """
    x, y = np.asarray(values, float), np.asarray(reference, float)
    if x.shape != y.shape or not ((x > 0).all() and (y > 0).all()):
        raise Refused(
            "the series must be positive, one pair for each round",
            value=f"shapes {x.shape} and {y.shape}",
            place="paired_ratio_interval",
            fix="time both sides in every round",
        )
    middle, low, high = median_interval(np.log(x / y), confidence)
    return Interval(math.exp(middle), math.exp(low), math.exp(high))


def _check_counts(lost: int, gained: int, n: int) -> None:
    if n < 1 or lost < 0 or gained < 0 or lost + gained > n:
        raise Refused(
            "lost and gained must be counts among n pairs, and n at least 1",
            value=f"{lost}, {gained} of {n}",
            place="paired proportions",
            fix="count the changed examples among all n",
        )


def _bisect(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Return the end of the range in which `holds` is true, from above, to 1e-6 of the unit."""
    if holds(high):
        return high
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high


def clopper_pearson(count: int, n: int, alpha: float) -> tuple[float, float]:
    """Return the exact two-sided interval of a share at confidence 1 - alpha (Biometrika 26, 1934)."""
    from scipy.special import betaincinv

    low = 0.0 if count == 0 else float(betaincinv(count, n - count + 1, alpha / 2))
    return low, 1.0 if count == n else float(betaincinv(count + 1, n - count, 1 - alpha / 2))


def _window(n: int, low: float, high: float) -> NDArray[np.int64]:
    """Return the counts that a binomial with a rate between low and high takes but for 1e-9 of its mass."""
    from scipy.special import bdtr

    def quantile(share: float, rate: float) -> int:
        first, last = -1, n
        while last - first > 1:
            middle = (first + last) // 2
            first, last = (first, middle) if bdtr(middle, n, rate) >= share else (middle, last)
        return last

    return np.arange(max(0, quantile(5e-10, low) - 1), quantile(1 - 5e-10, high) + 1)


def _largest_favourable(gained: NDArray[np.int64], n: int, drop: float, observed: float) -> NDArray[np.int64]:
    """Return, for each count of gains, the most losses whose statistic is at most the observed; or -1."""
    low, high = np.full(len(gained), -1), n - gained + 1
    while (high - low > 1).any():
        middle = (low + high) // 2
        fits = tango_statistic(np.maximum(middle, 0), gained, n, drop) <= observed + 1e-9
        move = high - low > 1
        low, high = np.where(move & fits, middle, low), np.where(move & ~fits, middle, high)
    return low


def _binomial_mass(counts: NDArray[np.int64], n: int, rates: Floats) -> Floats:
    from scipy.special import gammaln, xlog1py, xlogy

    choose = gammaln(n + 1) - gammaln(counts + 1) - gammaln(n - counts + 1)
    rate = rates[:, None]
    mass: Floats = np.exp(choose + xlogy(counts, rate) + xlog1py(n - counts, -rate))
    return mass


def _binomial_below(limit: NDArray[np.int64], n: NDArray[np.int64], rates: Floats) -> Floats:
    from scipy.special import bdtr

    inside = bdtr(np.maximum(limit, 0).astype(float), n.astype(np.int64), rates[:, None])
    below: Floats = np.where(limit < 0, 0.0, np.where(limit >= n, 1.0, inside))
    return below
