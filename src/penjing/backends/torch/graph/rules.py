"""How each operator passes channel labels on: one table, from operator name to rule.

A rule takes a `Step` and returns the output's `Value` (a list of them for several outputs). It unites labels
that the operator ties, marks what a weight makes and consumes, and freezes what the operator mixes. An
operator without a rule, or one used in a way that its rule does not know, freezes everything that it touches,
with its name and source line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from penjing.arrays.structure.labels import Labels, on_axis, varying
from penjing.backends.torch.graph import contractions, indexing, views
from penjing.backends.torch.graph.capture import is_dynamic
from penjing.backends.torch.graph.steps import (
    Rule,
    Step,
    Value,
    agree,
    axis_labels,
    operator_name,
    part,
    unlabelled,
    values_in,
)


def rule_for(target: Callable[..., Any]) -> Rule:
    """Return the rule of an operator: its own, that of pointwise operators, or `unknown`."""
    if not isinstance(target, torch._ops.OpOverload):
        return nothing if getattr(target, "__module__", "") in ("_operator", "math") else unknown
    name = operator_name(target)
    if name in RULES:
        return RULES[name]
    if torch.Tag.pointwise in getattr(target, "tags", ()):
        return pointwise
    return unknown


def has_rule(target: Callable[..., Any]) -> bool:
    """Tell whether an operator has a rule, so that its cost is known too."""
    return rule_for(target) is not unknown


def unknown(step: Step) -> Any:
    """Freeze every label of every argument."""
    for value in values_in([step.args, step.kwargs]):
        for factor in value.factors:
            step.freeze(factor, "touches an operator without a rule")
    return unlabelled(step.shape)


def same(step: Step) -> Any:
    """Pass the first argument on unchanged."""
    return step.args[0] if step.args[0].shape == step.shape else unknown(step)


def like(step: Step) -> Value:
    """A new tensor whose channels go with those of the first argument."""
    return Value(step.shape, step.args[0].factors)


def pointwise(step: Step) -> Any:
    """Unite the arguments' labels, axis by axis, after broadcasting."""
    if isinstance(step.shape, list):
        return unknown(step)
    values, rank = values_in([step.args, step.kwargs]), len(step.shape)
    parts = [part(v, range(rank - len(v.shape), rank), rank) for v in values]
    factors = agree(step, parts, "meets a tensor whose channels are fixed")
    return step.value(factors, weight=all(v.weight for v in values) and bool(values))


def convolution(step: Step) -> Any:
    """Rows of the weight are the output's channels, its columns consume the input's."""
    x, w = step.args[0], step.args[1]
    groups, channels, out, columns = step.arg(6, "groups", 1), x.along(1), w.along(0), w.along(1)
    if len(x.shape) != len(w.shape) or out is None or columns is None:
        return unknown(step)
    if 1 < groups == x.shape[1]:
        if channels is not None:
            repeated = np.repeat(channels, w.shape[0] // groups)
            step.unite(repeated, out, "is a depthwise convolution of fixed channels")
        return _convolved(step, out)
    if groups > 1:
        if w.source is None:
            return unknown(step)
        columns = step.coupling.axis(w.source[0], w.source[1], 1, x.shape[1])
        _tie_blocks(step, groups, columns, out)
    step.unite(channels, columns, "its input is fixed")
    step.coupling.consume(columns)
    return _convolved(step, out)


def transposed_convolution(step: Step) -> Any:
    """As `convolution`, with the weight's axes the other way round."""
    x, w = step.args[0], step.args[1]
    groups, rows, out = step.arg(6, "groups", 1), w.along(0), w.along(1)
    if len(x.shape) != len(w.shape) or rows is None or out is None:
        return unknown(step)
    step.unite(x.along(1), rows, "its input is fixed")
    if 1 < groups == x.shape[1]:
        return _convolved(step, np.repeat(rows, w.shape[1]))
    if groups > 1:
        if w.source is None:
            return unknown(step)
        out = step.coupling.axis(w.source[0], w.source[1], 1, w.shape[1] * groups)
        _tie_blocks(step, groups, rows, out)
    step.coupling.consume(rows)
    return _convolved(step, out)


def _tie_blocks(step: Step, groups: int, *sides: Labels) -> None:
    for atoms in sides:
        step.coupling.tie_blocks(atoms, np.arange(len(atoms)) // (len(atoms) // groups))


def _convolved(step: Step, out: Labels) -> Value:
    """Finish a convolution: its rows make channels, the bias goes with them, positions hold none."""
    x, bias = step.args[0], step.arg(2, "bias")
    step.coupling.make(out)
    if bias is not None:
        step.unite(out, bias.along(0), "its bias is fixed")
    windows = step.args[1].shape[2:]
    mixed = [2 + i for i, kernel in enumerate(windows) if kernel > 1 or step.shape[2 + i] != x.shape[2 + i]]
    left = step.freeze_axes(x, mixed, "is not its channel axis")
    return step.value((*axis_labels(out, 1, len(step.shape)), *(f for f in left if f.shape[1] == 1)))


def channelwise_norm(step: Step) -> Value:
    """Batch and instance normalization, PReLU: every tensor is one number a channel, or one for all."""
    x, name = step.args[0], operator_name(step.node.target)
    for tensor in step.args[1:5]:
        if isinstance(tensor, Value) and tensor.shape != (1,):
            step.unite(x.along(1), tensor.along(0), "meets numbers for fixed channels")
    if name == "instance_norm" or (name == "batch_norm" and step.args[5] is True):
        for factor in x.factors:
            if 1 not in varying(factor):
                step.coupling.mark(factor.reshape(-1), "hidden")
    return step.value(x.factors, weight=x.weight)


def mixing(reason: str, position: int = 1, name: str = "dim") -> Rule:
    """Make the rule of an operator that mixes along some axes (softmax, cumsum, sort)."""

    def rule(step: Step) -> Any:
        x = step.args[0]
        left = step.freeze_axes(x, _axes(step.arg(position, name, -1), len(x.shape)), reason)
        if not isinstance(step.shape, list):
            return step.value(left)
        return [step.value(left, shape) for shape in step.shape]

    return rule


def layer_norm(step: Step) -> Value:
    """Normalize over what is left of the last axes (LayerNorm, RMSNorm)."""
    x, trailing = step.args[0], len(step.args[1])
    rank = len(x.shape)
    for factor in x.factors:
        if len(varying(factor)) == 1 and varying(factor)[0] >= rank - trailing:
            step.coupling.mark(factor.reshape(-1), "hidden")
    tensors = [x, *values_in(step.args[2:4])]
    parts = [part(v, range(rank - len(v.shape), rank), rank) for v in tensors]
    return step.value(agree(step, parts, "is normalized with fixed channels"))


def group_norm(step: Step) -> Value:
    """Normalize over what is left of every group of channels; equally many stay in each."""
    x, groups = step.args[0], step.args[1]
    channels = x.along(1)
    for tensor in values_in(step.args[2:4]):
        step.unite(channels, tensor.along(0), "is normalized with fixed channels")
    if channels is not None and 1 < groups < len(channels):
        step.coupling.tie_blocks(channels, np.arange(len(channels)) // (len(channels) // groups))
    elif channels is not None and groups == 1:
        step.coupling.mark(channels, "hidden")
    return step.value(step.freeze_axes(x, range(2, len(x.shape)), "is not its channel axis"))


def pooling(spatial: int) -> Rule:
    """Make the rule of pooling and resizing the last `spatial` axes; windows of 1 leave an axis alone."""

    def rule(step: Step) -> Any:
        x = step.args[0]
        kernel = step.arg(1, "kernel_size") if "_pool" in operator_name(step.node.target) else None
        shape = step.shape[0] if isinstance(step.shape, list) else step.shape
        windows = kernel if isinstance(kernel, list) and len(kernel) == spatial else [0] * spatial
        alone = [w == 1 and shape[i - spatial] == x.shape[i - spatial] for i, w in enumerate(windows)]
        pooled = [i - spatial for i in range(spatial) if not alone[i]]
        left = step.freeze_axes(x, pooled, "is pooled over its channels")
        if not isinstance(step.shape, list):
            return step.value(left)
        return [step.value(left, shape) for shape in step.shape]

    return rule


def reduction(step: Step) -> Any:
    """Sum, mean, norm over some axes: over the channels that are left, where channels are among them."""
    name = operator_name(step.node.target)
    if len(values_in([step.args])) > 1:
        return pointwise(step)
    if isinstance(step.shape, list) or name in ("argmax", "argmin", "max", "min", "median"):
        return _choosing(step)
    x, rank = step.args[0], len(step.args[0].shape)
    axes = _reduced(step, name, rank)
    for factor in x.factors:
        if set(varying(factor)) <= axes:
            step.coupling.eat(factor.reshape(-1))
            if name != "sum":
                step.coupling.mark(factor.reshape(-1), "hidden")
    return _without(step, [f for f in x.factors if not axes.intersection(varying(f))], axes, rank, step.shape)


def _choosing(step: Step) -> Any:
    """Maxima with positions: a channel's position changes when others go."""
    name, x = operator_name(step.node.target), step.args[0]
    rank = len(x.shape)
    axes = _reduced(step, name, rank)
    left = list(step.freeze_axes(x, axes, "is chosen among its channels"))
    if not isinstance(step.shape, list):
        return _without(step, left, axes, rank, step.shape)
    return [_without(step, left, axes, rank, shape) for shape in step.shape]


def _reduced(step: Step, name: str, rank: int) -> set[int]:
    given = step.arg(2 if "norm" in name else 1, "dim")
    everything = given is None or given == [] or isinstance(given, bool)
    return set(range(rank)) if everything else set(_axes(given, rank))


def _without(step: Step, factors: list[Labels], axes: set[int], rank: int, shape: tuple[int, ...]) -> Value:
    if len(shape) != rank:
        kept = [axis for axis in range(rank) if axis not in axes]
        factors = [f.reshape([f.shape[axis] for axis in kept]) for f in factors]
    return step.value(factors, shape, weight=step.args[0].weight)


def cosine(step: Step) -> Value:
    """The cosine of two vectors: over the channels that are left of both."""
    values, rank = values_in(step.args[:2]), len(step.args[0].shape)
    axis = step.arg(2, "dim", 1) % rank
    factors = agree(step, [part(v, range(rank), rank) for v in values], "meets fixed channels")
    for factor in factors:
        if varying(factor) == (axis,):
            step.coupling.eat(factor.reshape(-1))
    return _without(step, [f for f in factors if axis not in varying(f)], {axis}, rank, step.shape)


def embedding(step: Step) -> Value:
    """Rows are looked up and stay; columns are the output's channels."""
    w, index = step.args[:2]
    step.freeze_axes(w, [0], "is a vocabulary")
    columns = w.along(1)
    step.coupling.make(columns)
    rank = len(step.shape)
    looked_up = [f.reshape(*f.shape, 1) for f in index.factors]
    return step.value((*axis_labels(columns, rank - 1, rank), *looked_up))


def embedding_bag(step: Step) -> list[Value]:
    """Sums of rows: columns are the first output's channels; weights of examples hold none."""
    w = step.args[0]
    step.freeze_axes(w, [0], "is a vocabulary")
    for value in values_in([step.args[1:], step.kwargs]):
        step.freeze_axes(value, range(len(value.shape)), "chooses rows of an embedding")
    columns = w.along(1)
    step.coupling.make(columns)
    return [step.value(axis_labels(columns, 1, 2), step.shape[0]), *unlabelled(step.shape[1:])]


def factory(step: Step) -> Value:
    """A tensor of one constant, or of numbers in a row: any of its channels can go."""
    dynamic, rank = [is_dynamic(d) for d in step.node.meta["val"].shape], len(step.shape)
    factors = [
        on_axis(step.coupling.fresh(n, (step.node.name, axis)), axis, rank)
        for axis, n in enumerate(step.shape)
        if n > 1 and not dynamic[axis]
    ]
    return step.value(factors)


def nothing(step: Step) -> Any:
    """Sizes, assertions: no labels."""
    return unlabelled(step.shape)


def einsum(step: Step) -> Any:
    """Any sum of products."""
    value = contractions.einsum(step)
    return unknown(step) if value is None else value


def _axes(given: Any, rank: int) -> list[int]:
    return [int(a) % max(rank, 1) for a in (given if isinstance(given, list | tuple) else [given])]


def _table() -> dict[str, Rule]:
    table: dict[str, Rule] = {**views.RULES, **indexing.RULES, **contractions.RULES, "einsum": einsum}
    entries: list[tuple[Rule, str]] = [
        (
            same,
            "clone contiguous detach alias to _to_copy type_as float half double lift_fresh_copy "
            "lift_fresh dropout feature_dropout alpha_dropout positive",
        ),
        (like, "zeros_like ones_like full_like rand_like randn_like empty_like"),
        # Pointwise operators that torch does not tag as such.
        (
            pointwise,
            "hardswish log_sigmoid masked_fill true_divide rsub divide multiply subtract where copy "
            "fill floor_divide special_expit absolute negative greater less greater_equal less_equal "
            "zero __and__ __or__ __xor__",
        ),
        (convolution, "conv1d conv2d conv3d"),
        (transposed_convolution, "conv_transpose1d conv_transpose2d conv_transpose3d"),
        (channelwise_norm, "batch_norm instance_norm prelu"),
        (layer_norm, "layer_norm rms_norm"),
        (group_norm, "group_norm"),
        (mixing("its channels compete in a softmax"), "softmax log_softmax _softmax _log_softmax"),
        (mixing("is accumulated over its channels"), "cumsum cumprod logcumsumexp"),
        (
            pooling(1),
            "max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest1d "
            "upsample_linear1d",
        ),
        (
            pooling(2),
            "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d max_pool2d_with_indices "
            "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d",
        ),
        (
            pooling(3),
            "max_pool3d avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d upsample_nearest3d "
            "upsample_trilinear3d",
        ),
        (
            reduction,
            "mean sum amax amin max min argmax argmin prod var std logsumexp norm linalg_vector_norm any all",
        ),
        (cosine, "cosine_similarity"),
        (embedding, "embedding"),
        (embedding_bag, "embedding_bag"),
        (factory, "zeros ones full new_zeros new_ones new_full arange linspace"),
        (
            nothing,
            "sym_size sym_numel sym_stride _assert_scalar _assert_tensor_metadata sym_constrain_range "
            "sym_constrain_range_for_size scalar_tensor",
        ),
    ]
    for rule, names in entries:
        table |= dict.fromkeys(names.split(), rule)
    return table


RULES = _table()
