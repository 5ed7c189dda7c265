"""Parameters and multiply-adds of one example, counted from the captured graph."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import fx, nn

from penjing.backends.torch.graph.capture import BATCH, Capture, capture, read_shape
from penjing.backends.torch.graph.rules import has_rule
from penjing.backends.torch.graph.steps import operator_name
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


def count_operations(model: nn.Module, example: Arrays) -> Operations:
    """Count parameters (tied ones once) and multiply-adds of one example, in all and by layer.

    Convolutions, matrix products and attention count; pointwise operators, normalization, pooling and
    moving data count 0. Operators without a formula are named in `uncounted`.

    Raises:
        Refused: the model cannot be captured.

    >>> import numpy as np
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> found = count_operations(net, (np.zeros((1, 4), np.float32),))
    >>> found.parameters, found.multiply_adds, found.by_layer
    (58, 48, {'0': 32, '2': 16})
    """
    total, uncounted = 0, set()
    by_layer: dict[str, int] = defaultdict(int)
    captured = capture(model, example)
    for node in captured.graph.nodes:
        if node.op != "call_function":
            continue
        count = _multiply_adds(node)
        if count is None:
            uncounted.add(str(node.target))
        elif count:
            total += count
            layer = _layer(node, captured)
            if layer is not None:
                by_layer[layer] += count
    return Operations(
        parameters=sum(p.numel() for p in model.parameters()),
        multiply_adds=round(total / BATCH),
        uncounted=tuple(sorted(uncounted)),
        by_layer={layer: round(count / BATCH) for layer, count in by_layer.items()},
        zeros=sum(int((p == 0).sum()) for p in model.parameters() if p.ndim > 1 and not p.is_meta),
    )


def _layer(node: fx.Node, captured: Capture) -> str | None:
    """Return the layer whose weight a product multiplies with, None where both sides are activations."""
    for argument in node.args[:3]:
        # A weight may be transposed or cast on its way.
        while isinstance(argument, fx.Node) and argument.op == "call_function":
            inputs = argument.all_input_nodes
            argument = inputs[0] if len(inputs) == 1 else None
        name = captured.tensors.get(argument.name) if isinstance(argument, fx.Node) else None
        if name is not None and not name.endswith("bias"):
            return name.rpartition(".")[0]
    return None


def _multiply_adds(node: fx.Node) -> int | None:
    """Return the multiply-adds of a node for the captured batch; None where there is no formula."""
    name = operator_name(node.target)
    if name.startswith(("conv1d", "conv2d", "conv3d")):
        return math.prod(_shape(node)) * math.prod(_shape(node.args[1])[1:])
    if name.startswith("conv_transpose"):
        return math.prod(_shape(node.args[0])) * math.prod(_shape(node.args[1])[1:])
    if name == "einsum":
        return _einsum(node)
    if name in ("linear", "matmul", "mm", "bmm", "mv", "dot"):
        return math.prod(_shape(node)) * _shape(node.args[0])[-1]
    if name in ("addmm", "baddbmm", "addbmm"):
        return math.prod(_shape(node)) * _shape(node.args[1])[-1]
    if name == "scaled_dot_product_attention":
        query, key, value = (_shape(a) for a in node.args[:3])
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    return 0 if has_rule(node.target) or name in _FREE else None


def _einsum(node: fx.Node) -> int | None:
    """Return the product of the sizes of all letters; None for an equation with an ellipsis."""
    words = node.args[0].replace(" ", "").split("->")[0].split(",")
    if any("." in word for word in words):
        return None
    lengths: dict[str, int] = {}
    for word, operand in zip(words, node.args[1], strict=True):
        lengths |= zip(word, _shape(operand), strict=True)
    return math.prod(lengths.values())


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta["val"]
    return read_shape(value) if isinstance(value, torch.Tensor) else ()
