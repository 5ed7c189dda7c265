"""What each operator computes: sums in double precision, results in single."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from penjing.backends.numpy.net import Array, Node, NumpyNet
from penjing.core.backend import Arrays
from penjing.core.errors import Refused

Tensors = Mapping[str, Array]
Compute = Callable[..., NDArray[Any]]


def conv2d(node: Node, tensors: Tensors, x: Array) -> NDArray[Any]:
    """y[n, o, h, w] = b[o] + sum over c, i, j of W[o, c, i, j] x[n, c, h s + i, w s + j], block by block."""
    weight, groups = tensors["weight"].astype(np.float64), node.whole("groups")
    out, each, high, wide = weight.shape
    padded = _pad(x, node.whole("padding"), 0.0)
    windows = _windows(padded, (high, wide), node.whole("stride"))
    windows = windows.reshape(len(x), groups, each, *windows.shape[2:])
    filters = weight.reshape(groups, out // groups, each, high, wide)
    y: NDArray[Any] = np.einsum("ngchwij,gocij->ngohw", windows, filters, optimize=True)
    y = y.reshape(len(x), out, *y.shape[3:]) + _bias(tensors)[:, None, None]
    return y


def linear(node: Node, tensors: Tensors, x: Array) -> NDArray[Any]:
    """y[n, o] = b[o] + sum over i of W[o, i] x[n, i]."""
    y: NDArray[Any] = x.astype(np.float64) @ tensors["weight"].astype(np.float64).T + _bias(tensors)
    return y


def batchnorm(node: Node, tensors: Tensors, x: Array) -> NDArray[Any]:
    """Normalize every channel by its running mean and variance, then scale and shift."""
    gamma, beta, mean, variance = (
        tensors[name].astype(np.float64).reshape(1, -1, *[1] * (x.ndim - 2))
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    y: NDArray[Any] = (x - mean) / np.sqrt(variance + node["eps"]) * gamma + beta
    return y


def relu(node: Node, tensors: Tensors, x: Array) -> NDArray[Any]:
    """max(x, 0)."""
    y: NDArray[Any] = np.maximum(x, 0)
    return y


def add(node: Node, tensors: Tensors, x: Array, y: Array) -> NDArray[Any]:
    """Sum of two values of the same shape."""
    if x.shape != y.shape:
        raise ValueError("shapes differ")
    return x.astype(np.float64) + y


def concat(node: Node, tensors: Tensors, *values: Array) -> NDArray[Any]:
    """Channels of all values, one after the other."""
    return np.concatenate(values, axis=1)


def max_pool(node: Node, tensors: Tensors, x: Array) -> NDArray[Any]:
    """Largest value of each window; padding never wins."""
    size = (node.whole("kernel"),) * 2
    padded = _pad(x, node.whole("padding"), -np.inf)
    y: NDArray[Any] = _windows(padded, size, node.whole("stride")).max(axis=(-2, -1))
    return y


def avg_pool(node: Node, tensors: Tensors, x: Array) -> NDArray[Any]:
    """Mean of each window; zeros of the padding count."""
    size = (node.whole("kernel"),) * 2
    padded = _pad(x, node.whole("padding"), 0.0)
    y: NDArray[Any] = _windows(padded, size, node.whole("stride")).mean(axis=(-2, -1))
    return y


def global_mean(node: Node, tensors: Tensors, x: Array) -> NDArray[Any]:
    """Mean over both axes of the image: `[n, channels]`."""
    y: NDArray[Any] = x.mean(axis=(2, 3), dtype=np.float64)
    return y


def flatten(node: Node, tensors: Tensors, x: Array) -> NDArray[Any]:
    """All values of an example in a row, channel by channel."""
    return x.reshape(len(x), -1)


def _pad(x: Array, width: int, value: float) -> NDArray[Any]:
    return np.pad(
        x.astype(np.float64), ((0, 0), (0, 0), (width, width), (width, width)), constant_values=value
    )


def _windows(x: NDArray[Any], size: tuple[int, int], stride: int) -> NDArray[Any]:
    """Return a view `[n, channels, rows, columns, *size]` of every window."""
    return sliding_window_view(x, size, axis=(2, 3))[:, :, ::stride, ::stride]


def _bias(tensors: Tensors) -> NDArray[Any]:
    weight = tensors["weight"]
    return tensors.get("bias", np.zeros(len(weight), np.float32)).astype(np.float64)


COMPUTE: Mapping[str, Compute] = {
    function.__name__: function
    for function in (conv2d, linear, batchnorm, relu, add, concat, max_pool, avg_pool, global_mean, flatten)
}
"""The function of every operator: from the node, its tensors and the values it takes to its value."""


def evaluate(net: NumpyNet, inputs: Arrays, compute: Mapping[str, Compute] = COMPUTE) -> dict[str, Array]:
    """Return every value of the net for one batch, by name, in the order of evaluation.

    Args:
        net: unchanged.
        inputs: one array for every input, with the examples along axis 0.
        compute: the function of every operator.

    Raises:
        Refused: another number of inputs, or shapes that do not fit; the node is named.
    """
    if len(inputs) != len(net.inputs):
        raise Refused(
            f"must be {len(net.inputs)}, as many as the net has",
            value=len(inputs),
            place="inputs",
            fix=f"give {', '.join(net.inputs)}, in this order",
        )
    values = {name: np.asarray(x, np.float32) for name, x in zip(net.inputs, inputs, strict=True)}
    for node in net.nodes:
        taken = [values[name] for name in node.inputs]
        try:
            result = compute[node.op](node, net.tensors.get(node.name, {}), *taken)
        except ValueError as error:
            # NumPy's own complaint about shapes; the shapes and the node say more.
            raise Refused(
                f"needs inputs of shapes that {node.op} takes",
                value=", ".join(str(x.shape) for x in taken),
                place=node.name,
                fix="compare them with the shape of the node's weight, and its stride and padding",
            ) from error
        values[node.name] = result.astype(np.float32)
    return values
