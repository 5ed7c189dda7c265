"""Parameters and multiply-adds of one example, counted from the captured graph."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from penjing.backends.torch.capture import BATCH, capture, sizes
from penjing.backends.torch.rules import known
from penjing.backends.torch.steps import operator_name
from penjing.core.backend import Arrays
from penjing.core.measurement import Operations

_FREE = frozenset(
    """
    index index_select gather scatter index_put copy fill roll repeat_interleave tile arange linspace
    rand randn rand_like randn_like empty empty_like scalar_tensor one_hot topk sort pixel_shuffle
    pixel_unshuffle channel_shuffle tril triu glu meshgrid tensor_split diagonal bernoulli nonzero
    movedim im2col col2im
    """.split()  # noqa: SIM905 - a table of words reads better than forty quoted ones
)
"""Operators without a rule for channels that move or choose data and multiply no matrices."""


def operations(model: nn.Module, example: Arrays) -> Operations:
    """Count parameters (tied ones once) and multiply-adds of one example.

    Convolutions, matrix products and attention count; pointwise operators, normalization, pooling and
    moving data count 0. Operators without a formula are named in `uncounted`.

    Raises:
        Refused: the model cannot be captured.
    """
    total, uncounted = 0, set()
    for node in capture(model, example).graph.nodes:
        if node.op != "call_function":
            continue
        count = _multiply_adds(node)
        if count is None:
            uncounted.add(str(node.target))
        else:
            total += count
    parameters = sum(p.numel() for p in model.parameters())
    return Operations(
        parameters=parameters, multiply_adds=round(total / BATCH), uncounted=tuple(sorted(uncounted))
    )


def _multiply_adds(node: Any) -> int | None:
    """Return the multiply-adds of a node for the captured batch; None where there is no formula."""
    name = operator_name(node.target)
    if name.startswith(("conv1d", "conv2d", "conv3d")):
        return math.prod(_shape(node)) * math.prod(_shape(node.args[1])[1:])
    if name.startswith("conv_transpose"):
        return math.prod(_shape(node.args[0])) * math.prod(_shape(node.args[1])[1:])
    if name in ("linear", "matmul", "mm", "bmm"):
        return math.prod(_shape(node)) * _shape(node.args[0])[-1]
    if name in ("addmm", "baddbmm", "addbmm"):
        return math.prod(_shape(node)) * _shape(node.args[1])[-1]
    if name == "scaled_dot_product_attention":
        query, key, value = (_shape(a) for a in node.args[:3])
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    return 0 if known(node.target) or name in _FREE else None


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta["val"]
    return sizes(value) if isinstance(value, torch.Tensor) else ()
