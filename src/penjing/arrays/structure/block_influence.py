"""How much a block turns its input, and how far the outputs of two networks are apart."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.distillation import hinton_loss


def block_influence(inputs: NDArray[Any], outputs: NDArray[Any]) -> float:
    """Return Block Influence, 1 minus the mean cosine between what enters a block and what leaves it.

    Source: Men et al. 2024, "ShortGPT: layers in large language models are more redundant than you expect".
    A block that hardly turns its input is a candidate for removal. Scaling alone does not count.

    Args:
        inputs: `[n, width]`, `[n, tokens, width]` (one vector for each token), or a feature map of rank 4
            and more (one vector for each example, whatever its layout).
        outputs: of the same shape.

    Returns:
        Between 0 and 2. Vectors of which one is zero count as orthogonal, two zeros as equal.

    >>> block_influence(np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([[3.0, 0.0], [0.0, 1.0]]))
    0.5
    """
    assert inputs.shape == outputs.shape, (inputs.shape, outputs.shape)
    width = inputs.shape[-1] if inputs.ndim <= 3 else inputs[0].size
    x = np.asarray(inputs, np.float64).reshape(-1, width)
    y = np.asarray(outputs, np.float64).reshape(-1, width)
    norms = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
    product = norms[0] * norms[1]
    cosine = np.divide((x * y).sum(1), product, out=np.zeros(len(x)), where=product > 0)
    cosine[(norms[0] == 0) & (norms[1] == 0)] = 1.0
    return float(np.clip(1 - cosine.mean(), 0.0, 2.0))


def divergence(outputs: NDArray[Any], reference: NDArray[Any], logits: bool) -> float:
    """Return how far outputs are from those of a reference network, at least 0; infinite for NaN.

    Args:
        outputs: `[n, classes]` or `[n, classes, ...]` logits, or numbers of any shape.
        reference: of the same shape.
        logits: True for the mean Kullback-Leibler divergence of the classes' probabilities, reference to
            outputs; False for the squared error over the reference's mean square.

    >>> divergence(np.array([[0.0, 1.0]]), np.array([[0.0, 1.0]]), logits=True)
    0.0
    >>> divergence(np.array([1.0, 3.0]), np.array([1.0, 2.0]), logits=False)
    0.2
    """
    assert outputs.shape == reference.shape, (outputs.shape, reference.shape)
    if not np.isfinite(outputs).all():
        return float("inf")
    if logits:
        rows, wanted = (np.moveaxis(z, 1, -1).reshape(-1, z.shape[1]) for z in (outputs, reference))
        return max(hinton_loss(rows, wanted, 1.0), 0.0)
    x, y = np.asarray(outputs, np.float64), np.asarray(reference, np.float64)
    return float(np.square(x - y).mean() / max(float(np.square(y).mean()), 1e-300))
