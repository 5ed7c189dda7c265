"""How much training a plan contains."""

from __future__ import annotations

from penjing.core.method import inner
from penjing.core.plan import Plan
from penjing.train.recipe import Recipe


def epochs_of(plan: Plan) -> float:
    """Return the epochs of all methods of a plan that train."""
    return sum(method.epochs for method in map(inner, plan) if isinstance(method, Recipe))
