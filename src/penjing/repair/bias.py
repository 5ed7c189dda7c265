"""Bias correction: give every channel of a quantized layer the mean that it had in float."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.quantization import ChannelMean, bias_correction
from penjing.calibration.settings import Examples
from penjing.core.backend import Arrays
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.method import Changes, Method, Outcome, Stage
from penjing.core.registry import handles

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

    from penjing.backends.onnx.graph.edit import NodeWriter
    from penjing.backends.onnx.graph.index import Graph
    from penjing.backends.onnx.graph.layers import WeightNode
    from penjing.backends.onnx.integers.segments import Live, Segments
    from penjing.backends.onnx.model import OnnxModel

LIVE_BYTES = 2**29
"""Tensors kept between the pieces of the graph take at most this much; fewer examples are used then."""
BATCH = 32

Floats = NDArray[np.float64]


class CorrectBias(Method):
    """Add to each bias what rounding took from the mean output of its channel.

    Layer by layer in the order of the graph, each behind the corrected ones before it, on training data:
    the empirical bias correction of Nagel et al. 2019, "Data-free quantization through weight
    equalization and bias correction", section 4.2 and appendix D. Comes after `Int8Static`.

    Attributes:
        examples: training examples that means are taken over, at least 1; fewer where tensors of all of them
            would take more than half a gibibyte.

    >>> CorrectBias(examples=128).stage.name
    'PRECISION'
    """

    stage: ClassVar[Stage] = Stage.PRECISION
    examples: Examples = 256


@dataclass(frozen=True)
class _Slot:
    """Where the bias of one layer's node is stored: an int32 constant with steps, or a float one."""

    layer: WeightNode
    node: NodeProto
    constant: str
    scales: NDArray[np.floating] | None


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
            "needs the float model beside the quantized one",
            value="a model without it",
            place="CorrectBias",
            fix="put it after Int8Static in the same plan",
        )
    proto = copy_proto(model.proto)
    changes = Changes(method)
    slots = _slots(proto, context, changes)
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
        gap = expected[slot.node.name] - observed
        before, after = float(np.abs(gap).mean()), float(np.abs(gap - delta).mean())
        changes.done(slot.layer.name, mean_error_before=before, mean_error_after=after)
    return Outcome(OnnxModel(proto, model.reference), keep_first_changes(changes))


def _prepare(
    proto: ModelProto, slots: Sequence[_Slot], method: CorrectBias, context: Context
) -> tuple[Segments, list[Arrays]]:
    from penjing.backends.onnx.integers.calibrate import iterate_calibration, limit_batch
    from penjing.backends.onnx.integers.segments import Segments

    runner = Segments(proto, [slot.node.output[0] for slot in slots])
    split = context.task.train
    one = next(iter(iterate_calibration(split, 1, 1, context.seed)))
    fit = max(1, LIVE_BYTES // max(runner.peak_bytes(_feed(proto, one)), 1))
    examples = min(method.examples, fit)
    return runner, list(iterate_calibration(split, examples, limit_batch(proto, BATCH), context.seed))


def _feed(proto: ModelProto, inputs: Arrays) -> Live:
    from penjing.backends.onnx.graph.index import list_inputs

    return dict(zip(list_inputs(proto), inputs, strict=True))


def _reference_means(
    reference: ModelProto, slots: Sequence[_Slot], batches: Sequence[Arrays]
) -> dict[str, Floats]:
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


def _mean(outputs: Sequence[NDArray[Any]], slot: _Slot) -> Floats:
    mean = ChannelMean(slot.layer.output_axis)
    for output in outputs:
        mean.add(output)
    return mean.mean


def _added(
    old: NDArray[Any], delta: NDArray[np.floating], scales: NDArray[np.floating] | None
) -> NDArray[Any]:
    if scales is None:
        return np.asarray(old + delta.reshape(old.shape), old.dtype)
    steps = old.astype(np.float64) + np.rint(delta / scales)
    return np.clip(steps, -(2.0**31), 2.0**31 - 1).astype(np.int32)


def _slots(proto: ModelProto, context: Context, changes: Changes) -> list[_Slot]:
    """Find the bias of every quantized layer, zeros where there is none; say why others stay."""
    from penjing.backends.onnx.graph.edit import NodeWriter
    from penjing.backends.onnx.graph.index import Graph
    from penjing.backends.onnx.graph.layers import find_weight_nodes

    graph = Graph(proto)
    writer = NodeWriter(graph, graph.nodes)
    slots = []
    for entry in find_weight_nodes(graph):
        source = graph.producer.get(entry.tensors["weight"])
        if entry.kind == "batchnorm" or source is None or source.op_type != "DequantizeLinear":
            continue
        if not context.covers(entry.name):
            changes.skip(entry.name, "not covered by the pattern")
            continue
        linear = entry.node.op_type == "MatMul"
        found = _added_slot(graph, entry) if linear else _own_slot(writer, entry)
        if found is None:
            changes.skip(entry.name, "no bias follows the product")
        else:
            slots.append(found)
    writer.write()
    return slots


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
