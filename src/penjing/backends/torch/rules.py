"""How each operator passes channel labels on: one table, from operator name to rule.

A rule takes a `Step` and returns the output's `Value` (a list of them for several outputs). It unites axes
that the operator ties, marks what a weight consumes, and freezes what the operator mixes. An operator
without a rule freezes everything that it touches, with its name and source line.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from penjing.arrays.coupling import Labels, fixed
from penjing.backends.torch import views
from penjing.backends.torch.capture import varies
from penjing.backends.torch.steps import Rule, Step, Value, operator_name, unlabelled, values_in


def rule_for(target: Any) -> Rule:
    """Return the rule of an operator: its own, that of pointwise operators, or `unknown`."""
    if not isinstance(target, torch._ops.OpOverload):
        return nothing if getattr(target, "__module__", "") in ("_operator", "math") else unknown
    name = operator_name(target)
    if name in RULES:
        return RULES[name]
    if torch.Tag.pointwise in getattr(target, "tags", ()):
        return pointwise
    return unknown


def known(target: Any) -> bool:
    """Tell whether an operator has a rule, so that its cost is known too."""
    return rule_for(target) is not unknown


def unknown(step: Step) -> Any:
    """Freeze every label of every argument."""
    for value in values_in([step.args, step.kwargs]):
        for dim in value.dims:
            step.freeze(dim, "touches an operator without a rule")
    return unlabelled(step.shape)


def same(step: Step) -> Value:
    """Pass the first argument's labels on unchanged."""
    return Value(step.args[0].dims, step.args[0].source)


def pointwise(step: Step) -> Any:
    """Unite the arguments' labels, axis by axis, after broadcasting."""
    if isinstance(step.shape, list):
        return unknown(step)
    return Value(_broadcast(step, values_in([step.args, step.kwargs]), step.shape))


def _broadcast(step: Step, values: list[Value], shape: tuple[int, ...]) -> tuple[Labels, ...]:
    dims = []
    for axis, length in enumerate(shape):
        meets = [v.dims[axis - len(shape)] for v in values if len(v.dims) >= len(shape) - axis]
        full = [m for m in meets if len(m) == length]
        for single in (m for m in meets if len(m) != length):
            step.freeze(single, "is broadcast over channels")
        labels = full[0] if full else fixed(length)
        for other in full[1:]:
            step.unite(labels, other, "meets a tensor whose channels are fixed")
        dims.append(labels)
    return tuple(dims)


def _is_weight(value: Any) -> bool:
    return isinstance(value, Value) and value.source is not None


def _bias(step: Step, output: Labels, bias: Any) -> None:
    if bias is not None:
        step.unite(output, bias.dims[-1], "its bias is fixed")


def convolution(step: Step) -> Any:
    """Rows of the weight are the output's channels, its columns consume the input's."""
    x, w, bias = step.args[0], step.args[1], step.arg(2, "bias")
    spatial = len(w.dims) - 2
    if not _is_weight(w) or len(x.dims) != len(w.dims):
        return unknown(step)
    groups, channels = step.arg(6, "groups", 1), x.dims[1]
    out = w.dims[0]
    if groups == 1:
        step.unite(channels, w.dims[1], "its input is fixed")
        step.coupling.consume(w.dims[1])
    elif groups == len(channels):
        step.unite(
            np.repeat(channels, len(out) // groups), out, "is a depthwise convolution of fixed channels"
        )
    else:
        layer, tensor = w.source
        columns = step.coupling.axis(layer, tensor, 1, len(channels))
        step.unite(channels, columns, "its input is fixed")
        step.coupling.consume(columns)
        for atoms in (columns, out):
            step.coupling.tie_blocks(atoms, np.arange(len(atoms)) // (len(atoms) // groups))
    _bias(step, out, bias)
    _freeze_axes(step, x, range(2, len(x.dims)))
    return Value((x.dims[0], out, *(fixed(n) for n in step.shape[-spatial:])))


def transposed_convolution(step: Step) -> Any:
    """As `convolution`, with the weight's axes the other way round; only without blocks."""
    x, w, bias = step.args[0], step.args[1], step.arg(2, "bias")
    if not _is_weight(w) or step.arg(6, "groups", 1) != 1 or len(x.dims) != len(w.dims):
        return unknown(step)
    step.unite(x.dims[1], w.dims[0], "its input is fixed")
    step.coupling.consume(w.dims[0])
    _bias(step, w.dims[1], bias)
    _freeze_axes(step, x, range(2, len(x.dims)))
    return Value((x.dims[0], w.dims[1], *(fixed(n) for n in step.shape[2:])))


def linear(step: Step) -> Any:
    """Contract the last axis with the weight's columns."""
    x, w = step.args[0], step.args[1]
    if not _is_weight(w):
        return unknown(step)
    step.unite(x.dims[-1], w.dims[1], "its input is fixed")
    step.coupling.consume(w.dims[1])
    _bias(step, w.dims[0], step.arg(2, "bias"))
    return Value((*x.dims[:-1], w.dims[0]))


def matmul(step: Step) -> Any:
    """Contract with a module's own matrix; a product of two activations is frozen."""
    x, w = step.args[0], step.args[1]
    if not _is_weight(w) or len(w.dims) != 2:
        return unknown(step)
    step.unite(x.dims[-1], w.dims[0], "its input is fixed")
    step.coupling.consume(w.dims[0])
    return Value((*x.dims[:-1], w.dims[1]))


def addmm(step: Step) -> Any:
    """A bias plus a product with a module's own matrix."""
    bias, x, w = step.args[:3]
    if not _is_weight(w):
        return unknown(step)
    step.unite(x.dims[-1], w.dims[0], "its input is fixed")
    step.coupling.consume(w.dims[0])
    return Value(_broadcast(step, [bias, Value((*x.dims[:-1], w.dims[1]))], step.shape))


def channelwise_norm(step: Step) -> Value:
    """Batch and instance normalization: every tensor is one number a channel."""
    x = step.args[0]
    for tensor in step.args[1:5]:
        if isinstance(tensor, Value):
            step.unite(x.dims[1], tensor.dims[0], "is normalized with fixed channels")
    return Value(x.dims)


def prelu(step: Step) -> Value:
    """One slope a channel, or one for all."""
    x, slope = step.args[:2]
    if len(slope.dims[0]) > 1:
        step.unite(x.dims[1], slope.dims[0], "its slopes are fixed")
    return Value(x.dims)


def mixing(reason: str, position: int = 1, name: str = "dim") -> Rule:
    """Make the rule of an operator that mixes along some axes and keeps the shape (softmax, cumsum)."""

    def rule(step: Step) -> Value:
        x = step.args[0]
        return Value(_freeze_axes(step, x, _axes(step.arg(position, name), len(x.dims)), reason))

    return rule


def layer_norm(step: Step) -> Value:
    """Freeze the axes that are normalized over, and the weights."""
    x, trailing = step.args[0], len(step.args[1])
    for tensor in values_in(step.args[2:]):
        _freeze_axes(step, tensor, range(len(tensor.dims)), "belongs to a layer normalization")
    axes = range(len(x.dims) - trailing, len(x.dims))
    return Value(_freeze_axes(step, x, axes, "is normalized over its channels"))


def group_norm(step: Step) -> Value:
    """Freeze the channels: every one changes the statistics of its group."""
    x = step.args[0]
    for tensor in values_in(step.args[2:]):
        _freeze_axes(step, tensor, range(len(tensor.dims)), "belongs to a group normalization")
    return Value(_freeze_axes(step, x, range(1, len(x.dims)), "is normalized in groups of channels"))


def pooling(spatial: int) -> Rule:
    """Make the rule of pooling and resizing over the last `spatial` axes."""

    def rule(step: Step) -> Any:
        x = step.args[0]
        axes = range(len(x.dims) - spatial, len(x.dims))
        _freeze_axes(step, x, axes, "is pooled over its channels")
        several = isinstance(step.shape, list)
        shape = step.shape[0] if several else step.shape
        value = Value((*x.dims[:-spatial], *(fixed(n) for n in shape[-spatial:])))
        return [value for _ in step.shape] if several else value

    return rule


def reduction(step: Step) -> Any:
    """Sum, mean, maximum over some axes; channels among them are frozen."""
    if len(values_in([step.args])) > 1:
        return pointwise(step)
    x, rank = step.args[0], len(step.args[0].dims)
    position = 2 if "norm" in operator_name(step.node.target) else 1
    given = step.arg(position, "dim")
    everything = given is None or given == [] or isinstance(given, bool)
    axes = set(range(rank)) if everything else set(_axes(given, rank))
    dims = _freeze_axes(step, x, axes, "is reduced over its channels")
    several = isinstance(step.shape, list)
    keeps = len(step.shape[0] if several else step.shape) == rank
    out = [fixed(1) if i in axes else d for i, d in enumerate(dims) if keeps or i not in axes]
    value = Value(tuple(out))
    return [value for _ in step.shape] if several else value


def embedding(step: Step) -> Value:
    """Rows are looked up and stay; columns are the output's channels."""
    w, index = step.args[:2]
    step.freeze(w.dims[0], "is a vocabulary")
    return Value((*index.dims, w.dims[1]))


def factory(step: Step) -> Value:
    """A tensor of one constant: any of its channels can go."""
    dynamic = [varies(d) for d in step.node.meta["val"].shape]
    fresh = step.coupling.fresh
    return Value(tuple(fixed(n) if d else fresh(n) for n, d in zip(step.shape, dynamic, strict=True)))


def nothing(step: Step) -> Any:
    """Sizes, assertions: no labels."""
    return unlabelled(step.shape)


def _axes(given: Any, rank: int) -> list[int]:
    return [int(a) % max(rank, 1) for a in (given if isinstance(given, list | tuple) else [given])]


def _freeze_axes(
    step: Step, value: Value, axes: Any, reason: str = "is not its channel axis"
) -> tuple[Labels, ...]:
    chosen = set(axes)
    return tuple(step.freeze(d, reason) if i in chosen else d for i, d in enumerate(value.dims))


def _table() -> dict[str, Rule]:
    table: dict[str, Rule] = dict(views.RULES)
    entries: list[tuple[Rule, str]] = [
        (same, "clone contiguous detach alias to _to_copy type_as float half double lift_fresh_copy "
               "lift_fresh dropout feature_dropout alpha_dropout zeros_like ones_like full_like positive"),
        # Pointwise operators that torch does not tag as such.
        (pointwise, "hardswish log_sigmoid masked_fill true_divide rsub divide multiply subtract where copy "
                    "fill floor_divide special_expit absolute negative greater less greater_equal less_equal "
                    "zero"),
        (convolution, "conv1d conv2d conv3d"),
        (transposed_convolution, "conv_transpose1d conv_transpose2d conv_transpose3d"),
        (linear, "linear"), (matmul, "matmul mm"), (addmm, "addmm"),
        (channelwise_norm, "batch_norm instance_norm"),
        (layer_norm, "layer_norm"), (group_norm, "group_norm"), (prelu, "prelu"),
        (mixing("its channels compete in a softmax"), "softmax log_softmax _softmax _log_softmax"),
        (mixing("is accumulated over its channels"), "cumsum cumprod"),
        (mixing("its channels are reversed", name="dims"), "flip"),
        (pooling(1), "max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest1d "
                     "upsample_linear1d"),
        (pooling(2), "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d max_pool2d_with_indices "
                     "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d"),
        (pooling(3), "max_pool3d avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d upsample_nearest3d "
                     "upsample_trilinear3d"),
        (reduction, "mean sum amax amin max min argmax argmin prod var std logsumexp norm linalg_vector_norm "
                    "any all"),
        (embedding, "embedding"),
        (factory, "zeros ones full new_zeros new_ones new_full"),
        (nothing, "sym_size sym_numel sym_stride _assert_scalar _assert_tensor_metadata sym_constrain_range "
                  "sym_constrain_range_for_size"),
    ]  # fmt: skip
    for rule, names in entries:
        table |= dict.fromkeys(names.split(), rule)
    return table


RULES = _table()
