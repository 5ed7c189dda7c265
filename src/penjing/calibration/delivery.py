"""A network in simulation of number formats, on its way to a graph that computes with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.formats.stated import LayerFormats
from penjing.calibration.inputs import calibration_batches
from penjing.core.apply import to_onnx
from penjing.core.context import Context
from penjing.core.method import Change
from penjing.core.value import Model

if TYPE_CHECKING:
    from penjing.backends.onnx.graph.index import Graph
    from penjing.backends.onnx.model import OnnxModel

COMPARED = 64
"""Examples that a delivered graph is compared with its simulation on."""
BATCH = 16

Tensors = Mapping[str, NDArray[np.floating]]
"""By layer."""


@dataclass(frozen=True)
class Exported:
    """A model that was exported, and what methods before stated on its layers.

    Attributes:
        model: in float; weights have the values of their codes.
        formats: by layer; empty for a model on which nothing was stated.
        simulation: the model as it was given, to compare with; None where nothing was stated.
        context: with the backend of `model`.
    """

    model: OnnxModel
    formats: Mapping[str, LayerFormats]
    simulation: Model | None
    context: Context


def export_with_formats(model: Model, context: Context) -> Exported:
    """Export a torch model, with what its quantizers say.

    Raises:
        Refused: the export fails.
    """
    from penjing.backends.torch.quant.stated import layer_formats
    from penjing.backends.torch.quantizers import remove_quantizers

    formats = layer_formats(model)
    simulation = context.backend.copy(model) if formats else None
    remove_quantizers(model)
    onnx, adopted = to_onnx(context.backend, model, context)
    return Exported(adopted, formats, simulation, replace(context, backend=onnx))


def compare_with_simulation(
    exported: Exported, result: OnnxModel, changes: list[Change], context: Context
) -> list[Change]:
    """Add to each layer's change how far its output is from the simulation's.

    `simulation_error` is the L2 norm of the difference over that of the simulated output, on training
    examples; the graph is run as it is written, layers behind others that have errors of their own. The
    change of the whole model (`*`) gets the error of the outputs as the runtime gives them, and the worst
    layer's name.

    Args:
        exported: from `export_with_formats`.
        result: the graph with integers.
        changes: of the method.
        context: of the simulation.
    """
    from penjing.backends.onnx.integers.calibrate import Watcher

    done = [c.layer for c in changes if c.done and c.layer in exported.formats]
    if not done:
        return changes
    batches = calibration_batches(context, COMPARED, BATCH)
    seen = context.backend.observe(exported.simulation, done, iter(batches))
    wanted = ({name: output for name, (_, output) in batch.items()} for batch in seen)
    ends = _ends(exported.model, result, done)
    watcher = Watcher(result.proto, list(ends.values()))
    values = (watcher.values(x) for x, _ in batches)
    errors = _errors(wanted, ({name: batch[end] for name, end in ends.items()} for batch in values))
    outputs = ({"*": context.backend.run(exported.simulation, x)} for x, _ in batches)
    whole = _errors(outputs, ({"*": result.run(x)[0]} for x, _ in batches))
    worst = max(errors, key=lambda name: errors[name]) if errors else ""
    added: dict[str, dict[str, float | int | str]] = {
        name: {"simulation_error": error} for name, error in errors.items()
    }
    added["*"] = {"simulation_error": whole["*"]} | ({"worst_layer": worst} if worst else {})
    return [c.with_detail(added.get(c.layer, {})) for c in changes]


def _ends(model: OnnxModel, result: OnnxModel, layers: list[str]) -> dict[str, str]:
    """Return by layer the tensor of the result that holds its output.

    A layer that one operator packs weights for has none in the list of weights; its output kept its name.
    Where a bias is added by an operator of its own, the sum is the layer's output.
    """
    from penjing.backends.onnx.graph.index import Graph
    from penjing.backends.onnx.graph.layers import find_weight_nodes

    before, after = (
        {entry.name: entry.node.output[0] for entry in find_weight_nodes(Graph(graph.proto))[::-1]}
        for graph in (model, result)
    )
    graph = Graph(result.proto)
    return {name: _with_bias(graph, after.get(name, before[name])) for name in layers}


def _with_bias(graph: Graph, tensor: str) -> str:
    node = graph.only_consumer(tensor)
    if node is None or node.op_type != "Add":
        return tensor
    other = next((graph.array(name) for name in node.input if name != tensor), None)
    return node.output[0] if other is not None and other.ndim == 1 else tensor


def _errors(wanted: Iterator[Tensors], found: Iterator[Tensors]) -> dict[str, float]:
    """Return relative L2 errors by name, over all batches."""
    off: dict[str, float] = {}
    norm: dict[str, float] = {}
    for right, made in zip(wanted, found, strict=True):
        for name, x in right.items():
            real, other = (np.asarray(a, np.float64).reshape(-1) for a in (x, made[name]))
            off[name] = off.get(name, 0.0) + float(np.square(other - real).sum())
            norm[name] = norm.get(name, 0.0) + float(np.square(real).sum())
    return {name: (off[name] / norm[name]) ** 0.5 if norm[name] else 0.0 for name in off}
