"""What follows a cut: repair without training, and how much training a plan contains."""

from __future__ import annotations

from collections.abc import Iterable

from penjing.core.method import handler_for, inner
from penjing.core.plan import Plan, chain
from penjing.repair.batchnorm import ReestimateBatchNorm
from penjing.repair.least_squares import LeastSquares
from penjing.train.strategy import Strategy


def repairs(kinds: Iterable[str], backend: str) -> Plan:
    """Return the repair that follows every cut of a model with these kinds of layers.

    Least squares, which also takes the statistics of BatchNorm layers anew; where the backend has no handler
    for it, these statistics alone. Nothing else that needs no training added to it in
    `benchmarks/repair_ablation.py`.
    """
    if handler_for(LeastSquares(), backend) is not None:
        return chain(LeastSquares())
    statistics = "batchnorm" in set(kinds) and handler_for(ReestimateBatchNorm(), backend) is not None
    return chain(ReestimateBatchNorm()) if statistics else ()


def epochs_of(plan: Plan) -> float:
    """Return the epochs of all methods of a plan that train."""
    return sum(method.epochs for method in map(inner, plan) if isinstance(method, Strategy))
