"""What follows a cut: repair without training, recovery by it, and how much training a plan contains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from penjing.core.method import inner
from penjing.core.plan import Plan, chain
from penjing.core.registry import handler_for
from penjing.distillation.logits import Distill
from penjing.repair.batchnorm import ReestimateBatchNorm
from penjing.repair.least_squares import LeastSquares
from penjing.train.method import TrainingMethod


def plan_repair(kinds: Iterable[str], backend: str) -> Plan:
    """Return the repair that follows every cut of a model with these kinds of layers.

    Least squares, which also takes the statistics of BatchNorm layers anew; where the backend has no handler
    for it, these statistics alone. Nothing else that needs no training added to it in
    `benchmarks/repair_ablation.py`.
    """
    if handler_for(LeastSquares(), backend) is not None:
        return chain(LeastSquares())
    statistics = "batchnorm" in set(kinds) and handler_for(ReestimateBatchNorm(), backend) is not None
    return chain(ReestimateBatchNorm()) if statistics else ()


def plan_recovery(epochs: float, precision: Literal["float32", "bfloat16"]) -> Distill:
    """Return the training that follows cut and repair.

    Of the ways that `benchmarks/recovery.py` compares none brings more back at every cut and rate.
    """
    return Distill(epochs=epochs, lr=0.1, schedule="one_cycle", precision=precision)


def count_epochs(plan: Plan) -> float:
    """Return the epochs of all methods of a plan that train."""
    return sum(m.strategy.epochs for m in map(inner, plan) if isinstance(m, TrainingMethod))
