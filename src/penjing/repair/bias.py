"""Bias correction: give every channel of a quantized layer the mean that it had in float."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from penjing.arrays.quantization import ChannelMean, bias_correction
from penjing.core.backend import Arrays
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.method import Change, Method, Outcome, Stage
from penjing.core.registry import handles

if TYPE_CHECKING:
    from onnx import ModelProto

    from penjing.backends.onnx.graph.edit import NodeWriter
    from penjing.backends.onnx.graph.index import Graph
    from penjing.backends.onnx.graph.layers import WeightNode
    from penjing.backends.onnx.integers.segments import Live, Segments
    from penjing.backends.onnx.model import OnnxModel

LIVE_BYTES = 2**29
"""Tensors kept between the pieces of the graph take at most this much; fewer examples are used then."""
BATCH = 32


class CorrectBias(Method):
    """Add to each bias what rounding took from the mean output of its channel.

    Layer by layer in the order of the graph, each behind the corrected ones before it, on training data:
    the empirical bias correction of Nagel et al. 2019, "Data-free quantization through weight
    equalization and bias correction", section 4.2 and appendix D. Comes after `Int8Static`.

    Attributes:
        calibration: number of training examples that means are taken over, at least 1.
    """

    stage: ClassVar[Stage] = Stage.PRECISION
    calibration: int = Field(default=256, ge=1, le=1_000_000)


@dataclass(frozen=True)
class _Slot:
    """Where the bias of one layer's node is stored: an int32 constant with steps, or a float one."""

    layer: WeightNode
    node: Any
    constant: str
    scales: Any


@handles(CorrectBias, "onnx")
def correct_bias(model: OnnxModel, method: CorrectBias, context: Context) -> Outcome:
    """Return the model with corrected biases, and a change for each quantized layer.

    Raises:
        Refused: the model was not quantized by Penjing (there is no float reference), or there is no data.
    """
    from penjing.backends.onnx.graph.edit import copy_proto, replace_constants
    from penjing.backends.onnx.graph.index import Graph
    from penjing.backends.onnx.integers.checks import keep_first_changes
    from penjing.backends.onnx.model import OnnxModel

    if model.reference is None:
        raise Refused(
            "the model has a float reference",
            value="nothing to correct",
            place="CorrectBias",
            fix="put CorrectBias after Int8Static in the same plan",
        )
    proto = copy_proto(model.proto)
    slots, changes = _slots(proto, context)
    if not slots:
        return Outcome(model, changes)
    runner, batches = _prepare(proto, slots, method, context)
    names = [slot.node.output[0] for slot in slots]
    expected = _reference_means(model.reference, slots, batches)
    live: list[Live] = [_feed(proto, inputs) for inputs in batches]
    graph = Graph(proto)
    for index, name in enumerate(runner.ends):
        slot = slots[names.index(name)]
        live = [runner.run(index, tensors) for tensors in live]
        runner.release(index)
        observed = _mean([tensors[name] for tensors in live], slot)
        old = graph.array(slot.constant)
        assert old is not None
        delta = bias_correction(expected[slot.node.name], observed, slot.scales)
        fresh = _added(old, delta, slot.scales)
        replace_constants(proto, {slot.constant: fresh})
        shape = [1] * live[0][name].ndim
        shape[slot.layer.output_axis] = -1
        for tensors in live:
            tensors[name] = tensors[name] + delta.reshape(shape)
        changes.append(_done(slot, expected[slot.node.name], observed, delta))
    return Outcome(OnnxModel(proto, model.reference), keep_first_changes(changes))


def _prepare(
    proto: Any, slots: Sequence[_Slot], method: CorrectBias, context: Context
) -> tuple[Segments, list[Arrays]]:
    from penjing.backends.onnx.integers.calibrate import iterate_calibration, limit_batch
    from penjing.backends.onnx.integers.segments import Segments

    runner = Segments(proto, [slot.node.output[0] for slot in slots])
    split = context.task.train
    one = next(iter(iterate_calibration(split, 1, 1, context.seed)))
    fit = max(1, LIVE_BYTES // max(runner.peak_bytes(_feed(proto, one)), 1))
    examples = min(method.calibration, fit)
    return runner, list(iterate_calibration(split, examples, limit_batch(proto, BATCH), context.seed))


def _feed(proto: Any, inputs: Arrays) -> Live:
    from penjing.backends.onnx.graph.index import list_inputs

    return dict(zip(list_inputs(proto), inputs, strict=True))


def _reference_means(reference: Any, slots: Sequence[_Slot], batches: Sequence[Arrays]) -> dict[str, Any]:
    """Return the mean output of every channel in the float model, by the name of the node."""
    from penjing.backends.onnx.integers.calibrate import Watcher

    outputs = {node.name: node.output[0] for node in reference.graph.node}
    means = {slot.node.name: ChannelMean(slot.layer.output_axis) for slot in slots}
    watcher = Watcher(reference, [outputs[name] for name in means])
    for inputs in _sliced(batches, watcher.batch_size(tuple(array[:1] for array in batches[0]))):
        values = watcher.values(inputs)
        for name, mean in means.items():
            mean.add(values[outputs[name]])
    return {name: mean.mean for name, mean in means.items()}


def _sliced(batches: Sequence[Arrays], size: int) -> Iterator[Arrays]:
    for inputs in batches:
        for start in range(0, len(inputs[0]), size):
            yield tuple(array[start : start + size] for array in inputs)


def _mean(outputs: Sequence[Any], slot: _Slot) -> Any:
    mean = ChannelMean(slot.layer.output_axis)
    for output in outputs:
        mean.add(output)
    return mean.mean


def _added(old: Any, delta: Any, scales: Any) -> Any:
    if scales is None:
        return (old + delta.reshape(old.shape)).astype(old.dtype)
    steps = old.astype(np.float64) + np.rint(delta / scales)
    return np.clip(steps, -(2.0**31), 2.0**31 - 1).astype(np.int32)


def _done(slot: _Slot, expected: Any, observed: Any, delta: Any) -> Change:
    detail: dict[str, float | int | str] = {
        "mean_error_before": float(np.abs(expected - observed).mean()),
        "mean_error_after": float(np.abs(expected - observed - delta).mean()),
    }
    return Change(method="CorrectBias", layer=slot.layer.name, status="done", detail=detail)


def _slots(proto: ModelProto, context: Context) -> tuple[list[_Slot], list[Change]]:
    """Find the bias of every quantized layer, making one of zeros where there is none."""
    from penjing.backends.onnx.graph.edit import NodeWriter
    from penjing.backends.onnx.graph.index import Graph
    from penjing.backends.onnx.graph.layers import find_weight_nodes

    graph = Graph(proto)
    writer = NodeWriter(graph, graph.nodes)
    slots, changes = [], []
    for entry in find_weight_nodes(graph):
        source = graph.producer.get(entry.tensors["weight"])
        if entry.kind == "batchnorm" or source is None or source.op_type != "DequantizeLinear":
            continue
        reason = None if context.covers(entry.name) else "not covered by the pattern"
        found = None
        if reason is None:
            linear = entry.node.op_type == "MatMul"
            found = _added_slot(graph, entry) if linear else _own_slot(writer, entry)
            reason = "no bias follows the product" if found is None else ""
        if found is None:
            changes.append(
                Change(method="CorrectBias", layer=entry.name, status="skipped", reason=reason or "")
            )
        else:
            slots.append(found)
    writer.write()
    return slots, changes


def _added_slot(graph: Graph, entry: WeightNode) -> _Slot | None:
    """Find the float vector that is added to a product, used nowhere else."""
    after = graph.only_consumer(entry.node.output[0])
    if after is None or after.op_type != "Add":
        return None
    other = next((name for name in after.input if name != entry.node.output[0]), "")
    if other not in graph.constants or graph.only_consumer(other) is None:
        return None
    bias = graph.array(other)
    fits = bias is not None and bias.shape == (_channels(graph, entry),)
    return _Slot(entry, entry.node, other, None) if fits else None


def _channels(graph: Graph, entry: WeightNode) -> int:
    weight = graph.array(entry.tensors["weight"])
    assert weight is not None
    return len(entry.canonical("weight", weight))


def _own_slot(writer: NodeWriter, entry: WeightNode) -> _Slot:
    """Give the node an int32 bias of its own, in steps of input times weight."""
    graph, node = writer.graph, entry.node
    weight_scale = graph.array(graph.producer[node.input[1]].input[1])
    input_scale = graph.array(graph.producer[node.input[0]].input[1])
    assert weight_scale is not None
    assert input_scale is not None
    steps = (np.float32(input_scale) * weight_scale).astype(np.float32)
    bias = entry.tensors.get("bias")
    if bias is not None and graph.only_consumer(bias) is not None:
        stored = graph.producer[bias].input[0]
        if graph.only_consumer(stored) is not None:
            return _Slot(entry, node, stored, steps)
    old = None if bias is None else graph.array(graph.producer[bias].input[0])
    stored = writer.add_constant(
        f"{entry.name}.bias_quantized",
        np.zeros(_channels(graph, entry), np.int32) if old is None else old,
    )
    scale = writer.add_constant(f"{entry.name}.bias_scale", steps)
    zero = writer.add_constant(f"{entry.name}.bias_zero_point", np.zeros(steps.shape, np.int32))
    real = writer.claim_name(f"{entry.name}.bias_dequantized")
    where = {"axis": 0} if steps.ndim else {}
    writer.add_node("DequantizeLinear", [stored, scale, zero], [real], before=node, **where)
    del node.input[2:]
    node.input.append(real)
    return _Slot(entry, node, stored, steps)
