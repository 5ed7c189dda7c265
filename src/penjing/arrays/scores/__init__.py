"""How much each unit of a group matters: one file for each formula, pure functions on arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from penjing.arrays.scores.activation import activation_score
from penjing.arrays.scores.batchnorm import batchnorm_score
from penjing.arrays.scores.expansion import first_order, hessian_score, taylor_score
from penjing.arrays.scores.gates import fisher_score, output_fisher_score
from penjing.arrays.scores.norms import fpgm_score, l1_score, l2_score, lamp_score
from penjing.arrays.scores.random import random_score
from penjing.arrays.scores.refit import consumer_of, refit_score
from penjing.arrays.scores.units import Floats, Tensors, consumers, sum_by_unit

__all__ = [
    "SCORES",
    "Floats",
    "Score",
    "ScoreName",
    "Tensors",
    "activation_score",
    "batchnorm_score",
    "consumer_of",
    "consumers",
    "first_order",
    "fisher_score",
    "fpgm_score",
    "hessian_score",
    "l1_score",
    "l2_score",
    "lamp_score",
    "output_fisher_score",
    "random_score",
    "refit_score",
    "sum_by_unit",
    "taylor_score",
]

ScoreName = Literal[
    "l1",
    "l2",
    "random",
    "batchnorm",
    "lamp",
    "fpgm",
    "taylor",
    "fisher",
    "output_fisher",
    "hessian",
    "activation",
    "refit",
]
Needs = Literal["seed", "weights", "inputs", "gradients", "gates", "curvature", "factors"]


@dataclass(frozen=True)
class Score:
    """One way to score units.

    Attributes:
        needs: what the function takes beside the groups: `seed`; `weights`; weights and `inputs` of the
            consuming layers; weights and `gradients` of batches; gradients of `gates` by example; weights
            and the diagonal of the `curvature`; weights and Kronecker `factors` of it.
        function: of one group for `seed` and `weights`, of all groups for the others.
        comparable: whether scores of different groups are in one unit, so that one threshold serves all;
            others are divided by their mean first.
        loss: whether it estimates what the loss gains, so that it can be held against what a unit saves.
        absent: why a group may have no score.
    """

    needs: Needs
    function: Callable[..., Any]
    comparable: bool
    loss: bool = False
    absent: str = ""


_NOT_OBSERVED = "its units are not seen as inputs of layers that are called as modules, with the batch first"

SCORES: dict[ScoreName, Score] = {
    "l1": Score("weights", l1_score, comparable=False),
    "l2": Score("weights", l2_score, comparable=False),
    "random": Score("seed", random_score, comparable=True),
    "batchnorm": Score("weights", batchnorm_score, comparable=True, absent="no BatchNorm scales its units"),
    "lamp": Score("weights", lamp_score, comparable=True),
    "fpgm": Score("weights", fpgm_score, comparable=False),
    "taylor": Score("gradients", taylor_score, comparable=True, loss=True),
    "fisher": Score("gates", fisher_score, comparable=True, loss=True, absent=_NOT_OBSERVED),
    "output_fisher": Score("gates", output_fisher_score, comparable=True, loss=True, absent=_NOT_OBSERVED),
    "hessian": Score("curvature", hessian_score, comparable=True, loss=True),
    "activation": Score("inputs", activation_score, comparable=False, absent=_NOT_OBSERVED),
    "refit": Score(
        "factors",
        refit_score,
        comparable=True,
        loss=True,
        absent="no layer that takes its units is a linear layer or a convolution without groups, called as a "
        "module",
    ),
}
"""Every score by the name that `PruneChannels.score` takes."""
