"""The backend protocol for ONNX models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from onnx import numpy_helper

from penjing.backends.onnx.graph.edit import copy_proto, expose_tensors, replace_constants, select_output
from penjing.backends.onnx.graph.index import Graph, list_inputs
from penjing.backends.onnx.graph.layers import WeightNode, find_weight_nodes, read_window
from penjing.backends.onnx.model import OnnxModel, load_onnx, make_feed, open_session, run_session
from penjing.backends.onnx.normalize import normalize
from penjing.backends.onnx.operations import count_operations
from penjing.backends.onnx.safety.checks import check_proto
from penjing.core.backend import Arrays, Backend, Groups, Heads, Layer
from penjing.core.errors import Refused, nearest
from penjing.core.files import write_bytes
from penjing.core.measurement import Operations
from penjing.core.scratch import scratch
from penjing.core.task import Batch

if TYPE_CHECKING:
    from onnx import NodeProto

    from penjing.core.value import Model


class OnnxBackend:
    """ONNX graphs, run by ONNX Runtime on CPU. Weights that are integers read as real values."""

    name = "onnx"

    def copy(self, model: OnnxModel) -> OnnxModel:
        """Return a copy with a proto of its own; the float reference is shared, nobody writes to it."""
        return OnnxModel(copy_proto(model.proto), model.reference)

    def layers(self, model: OnnxModel) -> tuple[Layer, ...]:
        """List the layers with weights, in the order of the graph; shared weights are one layer."""
        graph = Graph(model.proto)
        found: dict[str, Layer] = {}
        for entry in find_weight_nodes(graph):
            shapes = {key: array.shape for key, array in _tensors(graph, entry).items()}
            window = read_window(entry, shapes["weight"]) if "weight" in shapes else None
            found.setdefault(entry.name, Layer(entry.name, entry.kind, shapes, window))
        return tuple(found.values())

    def read(self, model: OnnxModel, layer: str) -> dict[str, NDArray[Any]]:
        """Return copies of a layer's tensors, the weight as `[out, in, *kernel]`.

        Raises:
            Refused: no layer has this name.
        """
        graph = Graph(model.proto)
        return _tensors(graph, _find(graph, layer))

    def write(self, model: OnnxModel, layer: str, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Replace tensors of a layer by arrays of the same shapes.

        Raises:
            Refused: no such layer or tensor, another shape, or the tensor is stored as integers.
        """
        graph = Graph(model.proto)
        entry = _find(graph, layer)
        fresh: dict[str, NDArray[Any]] = {}
        for key, array in tensors.items():
            name = entry.tensors.get(key, "")
            if name not in graph.constants:
                raise Refused(
                    "the tensor that is written must be a float constant of the layer",
                    value=key,
                    place=layer,
                    fix="write to the float model, before it is quantized",
                )
            old = numpy_helper.to_array(graph.constants[name])
            new = entry.native(key, np.asarray(array)).astype(old.dtype)
            if new.shape != old.shape:
                raise Refused(
                    "must keep its shape",
                    value=new.shape,
                    place=f"{layer}.{key}",
                    fix=f"write an array of shape {old.shape}",
                )
            fresh[name] = new
        replace_constants(model.proto, fresh)
        model.__dict__.pop("session", None)

    def groups(self, model: OnnxModel, example: Arrays, heads: Heads = "whole") -> Groups:
        """Refuse: channels are pruned before a model becomes ONNX."""
        raise _no_pruning()

    def blocks(self, model: OnnxModel, example: Arrays) -> tuple[str, ...]:
        """Find no block: nothing of this backend is called as one."""
        return ()

    def keep(self, model: OnnxModel, groups: Groups, kept: Mapping[str, NDArray[np.int64]]) -> OnnxModel:
        """Refuse: channels are pruned before a model becomes ONNX."""
        raise _no_pruning()

    def run(self, model: OnnxModel, inputs: Arrays) -> NDArray[Any]:
        """Return the model's first output for one batch."""
        return model.run(inputs)[0]

    def observe(
        self, model: OnnxModel, layers: Sequence[str], batches: Iterator[Batch]
    ) -> Iterator[dict[str, tuple[NDArray[Any], NDArray[Any]]]]:
        """Yield input and output of each named layer, batch by batch.

        A layer that the model uses several times is observed at its first use.
        """
        graph = Graph(model.proto)
        ends = {
            layer: (node.input[_data_input(node)], node.output[0])
            for layer in layers
            for node in [_find(graph, layer).node]
        }
        wanted = list(dict.fromkeys(name for pair in ends.values() for name in pair))
        probe = expose_tensors(model.proto, wanted)
        session = open_session(probe, "basic")
        given = set(list_inputs(model.proto))
        for inputs, _ in batches:
            feed = make_feed(session, inputs)
            names = [name for name in wanted if name not in given]
            values = dict(zip(names, run_session(session, names, feed), strict=True)) | feed
            yield {layer: (values[start], values[end]) for layer, (start, end) in ends.items()}

    def operations(self, model: OnnxModel, example: Arrays) -> Operations:
        """Count parameters and multiply-adds for one example; operators without a formula are named."""
        return count_operations(model.proto, example)

    def fingerprint(self, model: OnnxModel) -> str:
        """Return a SHA-256 over operators, attributes, connections and constants; not over comments."""
        graph, state = model.proto.graph, hashlib.sha256()
        for entry in sorted(f"{o.domain or 'ai.onnx'} {o.version}" for o in model.proto.opset_import):
            state.update(entry.encode())
        for node in [*graph.node, *(n for f in model.proto.functions for n in f.node)]:
            state.update(repr((node.domain, node.op_type, list(node.input), list(node.output))).encode())
            for part in sorted(a.SerializeToString(deterministic=True) for a in node.attribute):
                state.update(part)
        for value in (*graph.input, *graph.output):
            state.update(value.name.encode() + value.type.SerializeToString(deterministic=True))
        for tensor in sorted(graph.initializer, key=lambda t: t.name):
            array = numpy_helper.to_array(tensor)
            state.update(repr((tensor.name, array.dtype.str, array.shape)).encode() + array.tobytes())
        return state.hexdigest()

    def check(self, model: OnnxModel, example: Arrays) -> None:
        """Refuse a model with NaN or infinite weights, or one that does not run on the example.

        Raises:
            Refused: names the tensors and the number of bad values.
        """
        bad = []
        for tensor in model.proto.graph.initializer:
            array = numpy_helper.to_array(tensor)
            # A scalar may rightly be infinite: the open end of a Clip, the fill of an attention mask.
            if array.dtype.kind == "f" and array.ndim and not np.isfinite(array).all():
                bad.append(f"{tensor.name} ({int(array.size - np.isfinite(array).sum())} of {array.size})")
        if bad:
            raise Refused(
                "weights must be finite",
                value=", ".join(bad[:5]),
                place="model",
                fix="train the model again with a lower rate, or export it again",
            )
        if not model.run(example):
            raise Refused(
                "must have an output", value="none", place="model", fix="declare one when exporting"
            )

    def select(self, model: OnnxModel, output: int | str | None) -> OnnxModel:
        """Return the model with one of its outputs, by name or index; without the nodes only others need.

        Raises:
            Refused: there is no such output, or it is named by a function.
        """
        return model if output is None else OnnxModel(select_output(model.proto, output), model.reference)

    def export(self, model: OnnxModel, example: Arrays, path: Path) -> None:
        """Write the model as one checked file.

        Raises:
            Refused: the model does not pass the checks that `load_onnx` makes.
        """
        check_proto(model.proto, str(path), trusted=True)
        write_bytes(path, model.proto.SerializeToString(deterministic=True))

    def adopt(self, backend: Backend, model: Model, example: Arrays) -> OnnxModel:
        """Export a model of another framework and bring it into the form that integer methods expect.

        Raises:
            Refused: the export fails or its normalized form has other outputs.
        """
        with scratch() as folder:
            path = folder / "model.onnx"
            backend.export(model, example, path)
            return normalize(load_onnx(path, trusted=True), example)


def _data_input(node: NodeProto) -> int:
    return 1 if node.op_type == "Gather" else 0


def _find(graph: Graph, layer: str) -> WeightNode:
    entries = find_weight_nodes(graph)
    for entry in entries:
        if entry.name == layer:
            return entry
    raise Refused(
        "must name a layer of the model",
        value=repr(layer),
        place="layer",
        fix=nearest(layer, {entry.name for entry in entries}),
    )


def _tensors(graph: Graph, entry: WeightNode) -> dict[str, NDArray[Any]]:
    arrays = {key: graph.array(name) for key, name in entry.tensors.items()}
    return {key: entry.canonical(key, array) for key, array in arrays.items() if array is not None}


def _no_pruning() -> Refused:
    return Refused(
        "channels cannot be pruned in an ONNX graph",
        place="model",
        fix="start from the PyTorch model: the plan prunes it and makes it ONNX afterwards",
    )


BACKEND = OnnxBackend()
