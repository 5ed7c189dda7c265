"""Run a graph piece by piece, so that a piece can depend on what was learned from the ones before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from onnx import helper

from penjing.backends.onnx.graph.index import Graph
from penjing.backends.onnx.graph.shapes import infer_types
from penjing.backends.onnx.model import open_session, run_session

if TYPE_CHECKING:
    import onnxruntime as ort
    from onnx import ModelProto

Live = dict[str, NDArray[Any]]
"""Tensors of one batch that later pieces need, by name."""


class Segments:
    """The pieces of a graph that end in the given nodes, in the order of the graph.

    Running all of them costs one pass through the graph, instead of one for every piece. Nodes behind
    the last end are left out.

    Args:
        proto: a model without graphs inside its nodes.
        ends: first outputs of the nodes that end a piece.
    """

    def __init__(self, proto: ModelProto, ends: Sequence[str]) -> None:
        self._proto, self._graph = proto, Graph(proto)
        self._types = {name: kind for name, (kind, _) in infer_types(proto).items()}
        position = {name: i for i, node in enumerate(self._graph.nodes) for name in node.output}
        self.ends = sorted(ends, key=lambda name: position[name])
        self._stops = [position[name] + 1 for name in self.ends]
        self._last_use = {name: i for i, node in enumerate(self._graph.nodes) for name in node.input}
        self._sessions: list[ort.InferenceSession | None] = [None] * len(self.ends)

    def run(self, index: int, live: Live) -> Live:
        """Run one piece on the tensors of one batch and return those that are needed from then on.

        The end of the piece is always among them; the caller may change it before the next piece.
        """
        session = self._sessions[index] or self._open(index)
        self._sessions[index] = session
        names = [value.name for value in session.get_outputs()]
        feed = {value.name: live[value.name] for value in session.get_inputs()}
        made = dict(zip(names, run_session(session, names, feed), strict=True))
        stop = self._stops[index]
        kept = {name: value for name, value in live.items() if self._last_use.get(name, -1) >= stop}
        return kept | made

    def release(self, index: int) -> None:
        """Free the session of a piece that is done."""
        self._sessions[index] = None

    def peak_bytes(self, feed: Live) -> int:
        """Return the most bytes that one batch keeps between pieces."""
        live, peak = feed, 0
        for index in range(len(self.ends)):
            live = self.run(index, live)
            peak = max(peak, sum(value.nbytes for value in live.values()))
        return peak

    def _open(self, index: int) -> ort.InferenceSession:
        stop = self._stops[index]
        nodes = self._graph.nodes[self._stops[index - 1] if index else 0 : stop]
        made = {name for node in nodes for name in node.output if name}
        used = {name for node in nodes for name in node.input if name}
        constants = [tensor for name, tensor in self._graph.constants.items() if name in used]
        given = sorted(used - made - set(self._graph.constants))
        needed = sorted(
            name for name in made if self._last_use.get(name, -1) >= stop or name == self.ends[index]
        )
        graph = helper.make_graph(
            nodes,
            "piece",
            [helper.make_tensor_value_info(name, self._types[name], None) for name in given],
            [helper.make_tensor_value_info(name, self._types[name], None) for name in needed],
            constants,
        )
        piece = helper.make_model(graph, opset_imports=self._proto.opset_import)
        piece.ir_version = self._proto.ir_version
        piece.functions.extend(self._proto.functions)
        return open_session(piece)
