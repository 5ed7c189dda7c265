"""What a module loses with its blocks: measured on the shortened network itself, repaired first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from penjing.arrays.structure.block_influence import block_influence, divergence
from penjing.backends.torch.hooks import Call, watched
from penjing.backends.torch.observe.batch_statistics import find_tracked_batchnorms, normalizing_by_batch
from penjing.backends.torch.observe.observe import run
from penjing.backends.torch.structure.blocks import Blocks
from penjing.backends.torch.structure.pass_through import bypassing, main_input, main_output
from penjing.backends.torch.tensors import evaluating, select_output, to_inputs, to_numpy
from penjing.core.backend import Arrays


class Shortened:
    """Measures a module without some of its blocks, on fixed batches of examples.

    BatchNorm layers normalize by each batch while a network is measured, which is what re-estimation of their
    statistics gives: a network is judged after that repair, not before. Nothing of the module is changed.

    Args:
        model: the module whose blocks may go.
        blocks: what `find_blocks` found in it.
        batches: inputs of unlabelled examples; kept.
        original: whose outputs are the reference, in evaluation mode.
        logits: whether outputs are compared as logits of classes (see `arrays.block_influence.divergence`).
    """

    def __init__(
        self, model: nn.Module, blocks: Blocks, batches: Sequence[Arrays], original: nn.Module, logits: bool
    ) -> None:
        self._model, self._blocks, self._logits = model, blocks, logits
        self._batches = [to_inputs(model, batch) for batch in batches]
        self._reference = np.concatenate([run(original, batch) for batch in batches])

    def divergence(self, names: Sequence[str]) -> float:
        """Return how far the outputs without these blocks are from the original's."""
        gone = {name: self._blocks.found[name] for name in names}
        with bypassing(self._model, gone):
            layers = find_tracked_batchnorms(self._model).values()
            with normalizing_by_batch(self._model, layers), torch.no_grad():
                outputs = [to_numpy(select_output(self._model(*batch))) for batch in self._batches]
        return divergence(np.concatenate(outputs), self._reference, self._logits)

    def influences(self) -> dict[str, float]:
        """Return the Block Influence of every block, in evaluation mode, as a mean over the batches."""
        members = {name: self._model.get_submodule(name) for name in self._blocks.found}
        found: dict[str, list[float]] = {name: [] for name in members}

        def watch(name: str, call: Call) -> None:
            entering = main_input(call)
            assert entering is not None, "a block has a tensor as input"
            pair = to_numpy(entering[1]), to_numpy(main_output(call.output))
            found[name].append(block_influence(*pair))

        with watched(members, watch), evaluating(self._model), torch.no_grad():
            for batch in self._batches:
                self._model(*batch)
        return {name: float(np.mean(values)) for name, values in found.items()}


def outputs_are_logits(loss: Any, outputs: NDArray[Any]) -> bool:
    """Tell whether a task's loss reads outputs as logits of at least two classes along axis 1."""
    return bool(loss == "cross_entropy" and outputs.ndim > 1 and outputs.shape[1] > 1)
