"""Quantizers for the layers of a module: formats by layer, scales of weights and ranges of inputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np

from penjing.arrays.formats.clipping import clipped_parameters
from penjing.arrays.formats.parameters import Parameters
from penjing.arrays.observers.observer import Observer
from penjing.arrays.quantization import relative_error
from penjing.calibration.inputs import calibration_batches
from penjing.calibration.mixed_bits import choose_formats
from penjing.calibration.rounding import Option, Rounded
from penjing.core.context import Context
from penjing.core.errors import Refused, nearest
from penjing.core.method import Changes, name_of
from penjing.core.number_format import NumberFormat
from penjing.core.value import Model

if TYPE_CHECKING:
    from torch import nn

    from penjing.backends.torch.quantizers import Quantizer


@dataclass(frozen=True)
class Placed:
    """A module with quantizers, on nearest rounding.

    Attributes:
        reference: the same module in float, BatchNorm folded alike.
        changes: one for each layer that was considered.
    """

    reference: Model
    changes: Changes


def place_quantizers(model: Model, method: Rounded, context: Context, examples: int) -> Placed:
    """Fold BatchNorm and put quantizers on convolutions and linear layers, in place.

    Ranges of inputs are taken from so many training examples.

    Where the length of a group does not divide a row of the weight, the last group of the row is shorter; the
    change then says so, `last_group` being its length.

    Raises:
        Refused: no data, quantized already, or inputs that are NaN, infinite or constant.
    """
    from penjing.backends.torch.observe.lockstep import record_usage
    from penjing.backends.torch.quant.folding import fold_batchnorm
    from penjing.backends.torch.quantizers import quantized_layers
    from penjing.backends.torch.tensors import to_inputs

    if next(quantized_layers(model), None) is not None:
        raise Refused(
            "needs a model in float",
            value=f"one whose layer {next(quantized_layers(model))[0]} is quantized",
            place=name_of(method),
            fix="start from the float model",
        )
    example = context.task.train.example()
    changes = Changes(method)
    layers = _choose(model, context, changes)
    folded = fold_batchnorm(model, example, context.covers)
    seen = record_usage(model, list(layers), to_inputs(model, example))
    order = [name for name, call in seen.items() if call.times]
    for name in layers:
        if name not in order:
            changes.skip(name, "the model does not call it as a module")
    reference = copy.deepcopy(model)
    ends = {order[0], order[-1]} if method.ends and order else set[str]()
    _refuse_unmatched(method, order)
    options = {name: _options(method, name, name in ends) for name in order}
    ranges = _ranges(model, options, method, context, examples)
    pairs = {
        name: [_pair(model.get_submodule(name), name, formats, ranges) for formats in options[name]]
        for name in order
    }
    chosen = choose_formats(model, pairs, method.mixed, context)
    shared: dict[tuple[str, NumberFormat], Quantizer] = {}
    for name, choice in chosen.items():
        weight, inputs = pairs[name][choice.option]
        if inputs is not None:
            # Layers that take the same tensor share its quantizer: an integer graph has one grid for it.
            inputs = shared.setdefault((seen[name].alike, inputs.format), inputs)
        detail = _set(model.get_submodule(name), weight, inputs) | choice.facts
        if name in folded:
            detail["folded"] = folded[name]
        changes.done(name, **detail)
    return Placed(reference, changes)


def _choose(model: nn.Module, context: Context, changes: Changes) -> dict[str, nn.Module]:
    """Return the layers that can round and that the plan covers, and add changes for the others."""
    from penjing.backends.torch.quantizers import CLASSES

    chosen = {}
    for layer in context.backend.layers(model):
        module = model.get_submodule(layer.name)
        if layer.kind not in ("conv", "depthwise", "linear"):
            continue
        if not context.covers(layer.name):
            changes.skip(layer.name, "not covered by the pattern")
        elif type(module) not in CLASSES:
            changes.skip(layer.name, f"a class of its own, {type(module).__name__}, cannot be made to round")
        else:
            chosen[layer.name] = module
    return chosen


def _refuse_unmatched(method: Rounded, layers: Sequence[str]) -> None:
    for pattern, _ in method.by_layer:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise Refused(
                "must match a layer that is rounded",
                value=repr(pattern),
                place=f"each pattern of {name_of(method)}.by_layer",
                fix=nearest(pattern, layers),
            )


def _options(method: Rounded, name: str, end: bool) -> list[Option]:
    """Return the formats that a layer may have, each once: one, unless bits are mixed."""
    named = next((option for pattern, option in method.by_layer if fnmatchcase(name, pattern)), None)
    if named is not None:
        return [(named[0], named[1] or method.inputs)]
    given: Sequence[Option] = [(method.weights, None)] if method.mixed is None else method.mixed.options
    pairs = [(weights, inputs or method.inputs) for weights, inputs in given]
    if end:
        pairs = [(widen(weights), None if inputs is None else widen(inputs)) for weights, inputs in pairs]
    return list(dict.fromkeys(pairs))


Ranges = dict[tuple[str, NumberFormat], Observer]


def _ranges(
    model: Model, options: Mapping[str, Sequence[Option]], method: Rounded, context: Context, examples: int
) -> Ranges:
    """Return what was seen of every layer's input, in float, for each of its formats with fixed scales."""
    found = {
        (name, inputs): Observer(method.observer, inputs)
        for name, pairs in options.items()
        for _, inputs in pairs
        if inputs is not None and inputs.granularity != "token"
    }
    if not found:
        return {}
    layers = list(dict.fromkeys(name for name, _ in found))
    for batch in calibration_batches(context, examples, method.batch_size):
        for seen in context.backend.observe(model, layers, iter([batch])):
            for (name, _), observer in found.items():
                if name in seen:
                    observer.add(seen[name][0])
    return found


def _pair(
    module: nn.Module, name: str, formats: Option, ranges: Ranges
) -> tuple[Quantizer, Quantizer | None]:
    """Return the quantizers of a layer's weight and input."""
    from penjing.backends.torch.tensors import to_numpy

    weights, inputs = formats
    weight = make_quantizer(weights, clipped_parameters(to_numpy(module.weight), weights))
    if inputs is None:
        return weight, None
    seen = ranges.get((name, inputs))
    return weight, make_quantizer(inputs, None if seen is None else seen.parameters())


def _set(module: nn.Module, weight: Quantizer, inputs: Quantizer | None) -> dict[str, float | int | str]:
    """Put quantizers on a layer and return facts."""
    import torch

    from penjing.backends.torch.quantizers import set_quantizers
    from penjing.backends.torch.tensors import to_numpy

    own = to_numpy(module.weight)
    set_quantizers(module, weight, inputs)
    with torch.no_grad():
        rounded = to_numpy(weight(module.weight))
    detail: dict[str, float | int | str] = {
        "weights": str(weight.format),
        "inputs": "float" if inputs is None else str(inputs.format),
        "weight_error": relative_error(rounded, own),
    }
    shorter = own[0].size % weight.format.group if weight.format.group else 0
    if shorter:
        detail["last_group"] = shorter
    if inputs is not None and inputs.format.granularity != "token":
        detail["input_scale"] = float(inputs.scale.max())
    return detail


def widen(format: NumberFormat) -> NumberFormat:
    """Return the 8-bit integers of the same kind where a format has fewer bits."""
    if format.bits >= 8:
        return format
    return NumberFormat(
        bits=8,
        signed=format.signed,
        symmetric=format.symmetric,
        granularity=format.granularity,
        group=format.group,
    )


def make_quantizer(format: NumberFormat, parameters: Parameters | None) -> Quantizer:
    """Return a module that rounds to a format under given parameters; None for tokens, which bring theirs."""
    import torch

    from penjing.backends.torch.quantizers import Quantizer

    if parameters is None:
        return Quantizer(format, torch.ones(()))
    parts = (None if part is None else torch.from_numpy(np.array(part, np.float32)) for part in parameters)
    return Quantizer(format, *parts)
