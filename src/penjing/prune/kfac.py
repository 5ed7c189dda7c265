"""Prune a whole network by Kronecker-factored curvature: what each weight costs at the outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from penjing.arrays.sparsity.gram import damped
from penjing.arrays.sparsity.kronecker import network_masks
from penjing.arrays.sparsity.obc import removals
from penjing.calibration.candidates import from_matrices, to_matrices
from penjing.calibration.layerwise import Inputs, Work, prepare, refit_layers, why_too_few
from penjing.calibration.settings import (
    BatchSize,
    Examples,
    Sparse,
    refuse_compensation_out_of_order,
)
from penjing.core.backend import GradientBackend
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.method import Outcome
from penjing.core.registry import handles
from penjing.core.value import Model


class PruneKFAC(Sparse):
    """Remove the weights of all layers together that cost least at the network's outputs, others corrected.

    Each row of a weight loses its weights in the order of the optimal brain surgeon (Frantar et al. 2022),
    whose errors are known at every level; rows of all layers compete, each with its error times the squared
    derivatives of the network's outputs by the row's output: the curvature is factored as in K-FAC (Martens
    & Grosse 2015; for pruning Wang et al. 2019, "EigenDamage"). Then the weights that stay are fitted, layer
    by layer. Labels are not used.

    Attributes:
        examples: training examples that curvature and the inputs of layers are taken from, at least 1.
        batch_size: examples that run at once, at least 1.
        sequential: each layer is fitted on the inputs that the layers fitted before it give; else on those of
            the dense model, in one pass.
        compensate: fit each layer to the outputs that it gave on the inputs that it had, so that errors of
            the layers before it are made up for; else to its outputs on the inputs that it has now. Needs
            `sequential`.

    >>> PruneKFAC(0.8, sequential=False, compensate=False).sparsity
    0.8
    """

    examples: Examples = 512
    batch_size: BatchSize = 64
    sequential: bool = True
    compensate: bool = True

    @property
    def uniform(self) -> bool:
        """Whether every layer gets the same share of zeros."""
        return False

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        self._has_a_sparsity()
        refuse_compensation_out_of_order(self.compensate, self.sequential)
        return self


@handles(PruneKFAC, "torch")
def prune_kfac(model: Model, method: PruneKFAC, context: Context) -> Outcome:
    """Choose masks on the model as it is, then fit; one change for every layer with a weight matrix.

    Raises:
        Refused: no training data, or inputs of a layer that are not finite.
    """
    work = prepare(model, method, context, Inputs(method.examples, method.batch_size, method.sequential))
    masks = _masks(work)
    if method.compensate:
        work = replace(work, dense=context.backend.copy(model))
    return refit_layers(work, masks)


def _masks(work: Work) -> dict[str, NDArray[np.bool_]]:
    backend, context, pattern = work.context.backend, work.context, work.method.zeros
    if not isinstance(backend, GradientBackend):
        raise Refused(
            "needs a backend with gradients",
            value=backend.name,
            place="PruneKFAC",
            fix="give the model in PyTorch, or use PruneSparseGPT",
        )
    found = {}
    for names in work.split_by_memory(list(work.layers)):
        for name, gram in work.grams(names).items():
            candidate = work.layers[name]
            if why_too_few(candidate, gram):
                continue
            order = pattern.column_order(candidate.weight.shape)
            parts = zip(to_matrices(candidate, order), gram.mean[:, order][:, :, order], strict=True)
            found[name] = [removals(weight, damped(moments), pattern) for weight, moments in parts]
    if not found:
        return {}
    centred = context.task.loss == "cross_entropy"
    slopes = backend.output_slopes(work.model, list(found), work.batches, centred, context.seed)
    masks = network_masks(found, slopes, work.method.share, pattern)
    orders = {name: pattern.column_order(work.layers[name].weight.shape) for name in masks}
    return {
        name: from_matrices(work.layers[name], np.stack(parts), orders[name]) for name, parts in masks.items()
    }
