"""Means and variances of the inputs of batch normalization, while it normalizes by batch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.backends.numpy.evaluate import COMPUTE, Tensors, batchnorm, evaluate
from penjing.backends.numpy.net import Array, Node, NumpyNet
from penjing.core.backend import Arrays


@dataclass(frozen=True)
class Pooled:
    """Mean and unbiased variance of every channel, over `count` observations of each."""

    mean: Array
    variance: Array
    count: int


def pool_statistics(net: NumpyNet, layers: Collection[str], batches: Iterable[Arrays]) -> dict[str, Pooled]:
    """Return exact statistics over all batches together.

    While the data passes, the named layers normalize by the statistics of the batch, so that each sees its
    input as it will be once all have new statistics (Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm").

    Args:
        net: unchanged.
        layers: names of batch normalizations; others normalize by their running statistics.
        batches: inputs of the net.
    """
    seen: dict[str, list[NDArray[Any]]] = {name: [] for name in layers}

    def by_batch(node: Node, tensors: Tensors, x: Array) -> NDArray[Any]:
        if node.name not in seen:
            return batchnorm(node, tensors, x)
        rows = np.moveaxis(x, 1, -1).reshape(-1, x.shape[1]).astype(np.float64)
        seen[node.name].append(rows)
        own: Mapping[str, Any] = {"running_mean": rows.mean(0), "running_var": rows.var(0)}
        return batchnorm(node, {**tensors, **own}, x)

    for inputs in batches:
        evaluate(net, inputs, {**COMPUTE, "batchnorm": by_batch})
    pooled = {name: np.concatenate(rows) for name, rows in seen.items() if rows}
    return {
        name: Pooled(rows.mean(0).astype(np.float32), rows.var(0, ddof=1).astype(np.float32), len(rows))
        for name, rows in pooled.items()
    }
