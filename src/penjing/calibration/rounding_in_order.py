"""Weights rounded one layer at a time, in the order of the data, so that outputs stay near."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.formats.parameters import Parameters
from penjing.arrays.sparsity.gram import Gram
from penjing.calibration.inputs import (
    calibration_batches,
    check_calibration_data,
    execution_levels,
    input_grams,
    split_by_memory,
    why_not_called,
    why_unobservable,
)
from penjing.calibration.placing import Placed, make_quantizer, place_quantizers
from penjing.calibration.rounding import Rounded
from penjing.core.backend import Arrays, Layer
from penjing.core.context import Context
from penjing.core.method import Change, Outcome, name_of
from penjing.core.number_format import NumberFormat
from penjing.core.progress import Line
from penjing.core.task import Batch
from penjing.core.value import Model

PROBE = 2
"""Examples that find the order of the layers."""


class Rounding(NamedTuple):
    """A layer's weight on values of a format.

    Attributes:
        values: `[groups, rows, columns]`, float32.
        parameters: of all rows together.
        cost: gives the squared change of the layer's outputs, up to a factor, for a change of the weight.
    """

    values: NDArray[np.float32]
    parameters: Parameters
    cost: Callable[[NDArray[np.floating]], float]


Solve = Callable[[NDArray[np.float32], Gram, NumberFormat], Rounding]
"""From a weight `[groups, rows, columns]`, the moments of its inputs, which it may use up, and its format."""


def round_in_order(
    model: Model, method: Rounded, context: Context, solve: Solve, dense: bool = False
) -> Outcome:
    """Put quantizers on a model and round each layer on the inputs that it then has; one change for each.

    Layers whose inputs cannot be observed, that share their weight with another, or that are observed less
    often than they have inputs stay on nearest rounding, and their change says so.

    Args:
        model: changed in place.
        method: formats and data.
        context: of the application.
        solve: the method's mathematics.
        dense: whether the moments have the float model's inputs as the wanted ones.

    Raises:
        Refused: no data, or such that are constant, NaN or infinite; and as `place_quantizers`.
    """
    start = prepare_rounding(model, method, context)
    backend, reference, layers, why = context.backend, start.placed.reference, start.layers, start.why
    facts: dict[str, dict[str, float]] = {}
    order = execution_levels(backend, reference, start.left, start.probe, context.seed)
    passes = [part for level in order for part in split_by_memory([layers[name] for name in level])]
    for number, part in enumerate(passes, 1):
        names = ", ".join(x.name for x in part)
        context.say(Line.step(f"{name_of(method)}: {names} ({number} of {len(passes)})"))
        wanted = reference if dense else None
        for name, gram in input_grams(backend, model, part, start.batches, context.seed, wanted).items():
            if gram.rows < gram.total.shape[-1]:
                why[name] = f"{gram.rows} observations of {gram.total.shape[-1]} inputs: raise examples"
            else:
                facts[name] = _round(model, context, layers[name], gram, solve)
    return Outcome(model, [_with_facts(change, why, facts) for change in start.placed.changes])


@dataclass(frozen=True)
class Prepared:
    """A model on nearest rounding, and what is known of its layers.

    Attributes:
        batches: calibration data.
        probe: a few examples of them.
        placed: with the float model.
        layers: those with quantizers, by name.
        why: by layer, why it cannot be rounded on its inputs.
    """

    batches: Sequence[Batch]
    probe: Arrays
    placed: Placed
    layers: dict[str, Layer]
    why: dict[str, str]

    @property
    def left(self) -> list[str]:
        """Names of the layers that can."""
        return [name for name in self.layers if name not in self.why]


def prepare_rounding(model: Model, method: Rounded, context: Context) -> Prepared:
    """Put quantizers on the model in place, and look at each layer.

    Raises:
        Refused: no data, or such that are constant, NaN or infinite; and as `place_quantizers`.
    """
    batches = calibration_batches(context, method.examples, method.batch_size)
    check_calibration_data(batches)
    placed = place_quantizers(model, method, context, method.examples)
    names = {change.layer for change in placed.changes if change.done}
    layers = {layer.name: layer for layer in context.backend.layers(model) if layer.name in names}
    probe = tuple(x[:PROBE] for x in batches[0][0])
    why = _why_unrounded(model, layers)
    alone = [name for name in layers if name not in why]
    why |= why_not_called(context.backend, placed.reference, alone, probe)
    return Prepared(batches, probe, placed, layers, why)


def _why_unrounded(model: Model, layers: Mapping[str, Layer]) -> dict[str, str]:
    """Return for each layer that cannot be rounded on its inputs the reason."""
    owners: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(tensor), []).append(name)
    why = {}
    for name, layer in layers.items():
        others = [x for x in owners[id(model.get_submodule(name).weight)] if x != f"{name}.weight"]
        reason = f"its weight is {others[0]} too" if others else why_unobservable(layer)
        if reason:
            why[name] = reason
    return why


def _round(model: Model, context: Context, layer: Layer, gram: Gram, solve: Solve) -> dict[str, float]:
    """Round one layer in place and return the relative errors of its outputs, by nearest rounding and now."""
    import torch

    from penjing.backends.torch.tensors import to_numpy

    module, groups = model.get_submodule(layer.name), len(gram.total)
    whole = context.backend.read(model, layer.name)["weight"]
    old = whole.reshape(groups, -1, gram.total.shape[-1])
    found = solve(old, gram, module.weight_quantizer.format)
    with torch.no_grad():
        nearest = to_numpy(module.weight_quantizer(module.weight)).reshape(old.shape)
    size = found.cost(old)
    errors = {"error_nearest": found.cost(nearest - old), "error": found.cost(found.values - old)}
    module.weight_quantizer = make_quantizer(module.weight_quantizer.format, found.parameters)
    context.backend.write(model, layer.name, {"weight": found.values.reshape(whole.shape)})
    return {name: error / size if size else 0.0 for name, error in errors.items()}


def _with_facts(change: Change, why: Mapping[str, str], facts: Mapping[str, dict[str, float]]) -> Change:
    more = {"nearest": why[change.layer]} if change.layer in why else facts.get(change.layer, {})
    return change.with_detail(more)
