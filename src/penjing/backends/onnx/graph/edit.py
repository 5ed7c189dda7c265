"""Edits of an ONNX graph: copies, inputs and outputs, constants and nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from penjing.backends.onnx.graph.index import Graph, list_node_inputs, walk_nodes
from penjing.core.errors import Refused, nearest

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


def copy_proto(proto: ModelProto) -> ModelProto:
    """Return an independent copy of a model proto."""
    fresh = onnx.ModelProto()
    fresh.CopyFrom(proto)
    return fresh


def list_names(proto: ModelProto) -> set[str]:
    """Return every tensor name that a graph uses, those of the graphs inside its nodes too."""
    graph = proto.graph
    names = {value.name for values in (graph.input, graph.output, graph.initializer) for value in values}
    return names | {name for node in walk_nodes(graph) for name in (*node.input, *node.output)}


def replace_constants(proto: ModelProto, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Set initializers by name, in place; new ones are appended."""
    known = {tensor.name: tensor for tensor in proto.graph.initializer}
    for name, array in arrays.items():
        fresh = numpy_helper.from_array(np.asarray(array, order="C"), name)
        if name in known:
            known[name].CopyFrom(fresh)
        else:
            proto.graph.initializer.append(fresh)


def set_nodes(proto: ModelProto, nodes: Sequence[NodeProto]) -> None:
    """Replace the nodes of the main graph, and drop the constants and shapes that nothing uses then."""
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    del proto.graph.value_info[:]
    used = {name for node in kept for name in list_node_inputs(node)}
    used |= {value.name for value in proto.graph.output}
    tensors = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(tensors)


def expose_tensors(proto: ModelProto, names: Sequence[str]) -> ModelProto:
    """Return a copy of a model with more of its tensors as outputs."""
    probe = copy_proto(proto)
    present = {value.name for value in (*probe.graph.output, *probe.graph.input)}
    probe.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in names if n not in present)
    return probe


def select_output(proto: ModelProto, output: int | str) -> ModelProto:
    """Return a copy of a model with one of its outputs, and without the nodes that only others need.

    Raises:
        Refused: there is no such output, or it is neither a name nor an index.
    """
    known = [value.name for value in proto.graph.output]
    by_index = isinstance(output, int) and -len(known) <= output < len(known)
    name = known[output] if by_index and isinstance(output, int) else output
    if name not in known:
        raise Refused(
            "must name an output of the model, or its index",
            value=repr(output),
            place="task.output",
            fix=nearest(str(output), known),
        )
    chosen = copy_proto(proto)
    kept = next(value for value in proto.graph.output if value.name == name)
    del chosen.graph.output[:]
    chosen.graph.output.append(kept)
    needed, nodes = {name}, []
    for node in reversed(chosen.graph.node):
        if needed & set(node.output):
            nodes.append(node)
            needed.update(list_node_inputs(node))
    set_nodes(chosen, nodes[::-1])
    return chosen


class NodeWriter:
    """Collects the nodes and constants of a graph that is rewritten, each under a name of its own.

    The graph itself is changed by `write` alone, and once.

    Args:
        graph: of the proto that will be changed.
        nodes: what stands there already; new nodes come behind them, or in front of one.

    Attributes:
        nodes: in their new order. Append a node of the graph to keep it.
        arrays: constants by name, new ones and those of the graph that get other values.

    >>> from onnx import TensorProto, helper
    >>> x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    >>> proto = helper.make_model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y]))
    >>> writer = NodeWriter(Graph(proto))
    >>> scale = writer.add_constant("x", np.float32([2, 3]))
    >>> writer.add_node("Mul", ["x", scale], ["y"])
    >>> writer.write()
    >>> [(node.op_type, list(node.input)) for node in proto.graph.node]
    [('Mul', ['x', 'x_1'])]
    """

    def __init__(self, graph: Graph, nodes: Sequence[NodeProto] = ()) -> None:
        self.graph = graph
        self.nodes = list(nodes)
        self.arrays: dict[str, NDArray[Any]] = {}
        self._taken = list_names(graph.proto)
        self._named = {node.name for node in graph.nodes}

    def claim_name(self, wanted: str) -> str:
        """Return the wanted name, with a number behind it where it is taken; from now on it is."""
        return claim_name(wanted, self._taken)

    def add_constant(self, wanted: str, array: NDArray[Any]) -> str:
        """Store an array and return the name that it got."""
        name = self.claim_name(wanted)
        self.arrays[name] = array
        return name

    def add_node(
        self,
        operator: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        before: NodeProto | None = None,
        **attributes: Any,
    ) -> None:
        """Add a node named after its first output.

        Args:
            operator: `op_type`; those of a runtime need `domain=` among the attributes.
            inputs, outputs: names of tensors.
            before: one of `nodes`; None: the node becomes the last one.
            attributes: as `onnx.helper.make_node` takes them.
        """
        name = claim_name(f"{outputs[0]}_{operator}", self._named)
        node = helper.make_node(operator, [*inputs], [*outputs], name=name, **attributes)
        place = (
            len(self.nodes)
            if before is None
            else next(index for index, other in enumerate(self.nodes) if other is before)
        )
        self.nodes.insert(place, node)

    def write(self) -> None:
        """Put nodes and constants into the graph, and import the operator sets that they need."""
        proto = self.graph.proto
        replace_constants(proto, self.arrays)
        set_nodes(proto, self.nodes)
        known = {entry.domain for entry in proto.opset_import}
        for domain in sorted({node.domain for node in self.nodes if node.domain} - known):
            proto.opset_import.add(domain=domain, version=1)


def claim_name(wanted: str, taken: set[str]) -> str:
    """Return a name that is not taken, and take it.

    >>> claim_name("a", {"a", "a_1"})
    'a_2'
    """
    name, count = wanted, 0
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    taken.add(name)
    return name
