"""What follows a cut: repair without training, and how much training a plan contains."""

from __future__ import annotations

from collections.abc import Iterable

from penjing.core.method import handler_for, inner
from penjing.core.plan import Plan, chain
from penjing.repair.batchnorm import ReestimateBatchNorm
from penjing.repair.least_squares import LeastSquares
from penjing.train.recipe import Recipe


def repairs(kinds: Iterable[str], backend: str) -> Plan:
    """Return the repair that follows every cut of a model with these kinds of layers.

    Weights behind the cut are refitted, then the statistics of BatchNorm layers; what the backend has no
    handler for is left out.
    """
    wanted = (LeastSquares(), *((ReestimateBatchNorm(),) if "batchnorm" in set(kinds) else ()))
    return chain(method for method in wanted if handler_for(method, backend) is not None)


def epochs_of(plan: Plan) -> float:
    """Return the epochs of all methods of a plan that train."""
    return sum(method.epochs for method in map(inner, plan) if isinstance(method, Recipe))
