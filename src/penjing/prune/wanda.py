"""Make those weights zero whose product with their input is small."""

from __future__ import annotations

from penjing.arrays.sparsity.wanda import wanda
from penjing.calibration.layerwise import Inputs, prepare, prune_layers
from penjing.calibration.settings import BatchSize, Examples, Sparse
from penjing.core.context import Context
from penjing.core.method import Outcome
from penjing.core.registry import handles
from penjing.core.value import Model


class PruneWanda(Sparse):
    """Make the weights of least |W|·‖x‖ zero, the same share for every output; the others stay as they are.

    Sun et al. 2023, "A simple and effective pruning approach for large language models". Blocks go by the
    sum of squares.

    Attributes:
        examples: training examples that the inputs of layers are taken from, at least 1.
        batch_size: examples that run at once, at least 1.
        sequential: each layer sees the inputs that the layers pruned before it give; else those of the dense
            model, in one pass.

    >>> PruneWanda(0.5, examples=128).sequential
    True
    """

    examples: Examples = 512
    batch_size: BatchSize = 64
    sequential: bool = True


@handles(PruneWanda)
def prune_wanda(model: Model, method: PruneWanda, context: Context) -> Outcome:
    """Prune layer by layer; one change for every layer with a weight matrix."""
    inputs = Inputs(method.examples, method.batch_size, method.sequential)
    return prune_layers(prepare(model, method, context, inputs), wanda, updates=False)
