"""Rewrite a float graph with QuantizeLinear and DequantizeLinear where a placement says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from penjing.arrays.formats.coding import Encoded
from penjing.arrays.quantization import (
    Grid,
    bias_floor,
    dequantize_weight,
    quantize,
    quantize_bias,
    quantize_weight,
    relative_error,
    weight_scales,
)
from penjing.backends.onnx.graph.edit import NodeWriter, copy_proto
from penjing.backends.onnx.graph.index import Graph
from penjing.backends.onnx.graph.layers import Facts, WeightNode
from penjing.backends.onnx.integers.placement import Placement, read_clip_bounds

if TYPE_CHECKING:
    from onnx import ModelProto


@dataclass(frozen=True)
class IntegerTypes:
    """Which of ONNX's integer types and scales a graph states.

    Attributes:
        signed_activations: int8 instead of uint8, each 128 below it, which changes no value.
        per_channel: a weight that comes without codes has a scale for every output channel; else one.
    """

    signed_activations: bool = False
    per_channel: bool = True

    def store(self, integers: Any) -> NDArray[Any]:
        """Return uint8 activations or zero points as they are written."""
        if not self.signed_activations:
            return np.asarray(integers, np.uint8)
        return (np.asarray(integers, np.int16) - 128).astype(np.int8)


def insert_qdq(
    proto: ModelProto,
    placement: Placement,
    grids: Mapping[str, Grid],
    weights: Mapping[str, Encoded] | None = None,
    types: IntegerTypes | None = None,
) -> tuple[ModelProto, dict[str, Facts]]:
    """Return the QDQ form of a model, and facts on every layer by name; the argument is not changed.

    Activations have one asymmetric grid for a tensor, weights are int8 and symmetric, biases int32 with the
    scale of the input times that of the weight. A Relu or Clip in front of a grid is left out, because the
    grid saturates where it would clip. Operators that only move values take the integers themselves.

    Args:
        proto: a normalized float model.
        placement: roles of its nodes.
        grids: grid of every tensor in `placement.grids`.
        weights: codes of the weights of some layers, signed and symmetric, at most 8 bits, with a scale for
            each channel or one; other weights are rounded to the nearest of -127 to 127.
        types: which integers are written; None: the defaults of `IntegerTypes`.

    Returns:
        the model; and of every layer the scales of its input and (largest) of its weight, and the weight's
        relative L2 error.
    """
    fresh = copy_proto(proto)
    inserter = _QdqInserter(Graph(fresh), placement, grids, weights or {}, types or IntegerTypes())
    inserter.insert()
    return fresh, inserter.facts


class _QdqInserter:
    """Walks a graph once and writes it anew, each tensor as integers, real values, or both."""

    def __init__(
        self,
        graph: Graph,
        placement: Placement,
        grids: Mapping[str, Grid],
        weights: Mapping[str, Encoded],
        types: IntegerTypes,
    ) -> None:
        self.graph, self.placement, self.grids, self.stated = graph, placement, grids, weights
        self.types = types
        self.writer = NodeWriter(graph)
        self.facts: dict[str, Facts] = {}
        self._integers: dict[str, tuple[str, Grid]] = {}
        self._dequantized: dict[str, str] = {}
        self._floats: set[str] = set(graph.inputs)
        self._weights: dict[tuple[str, bytes], str] = {}

    def insert(self) -> None:
        absorbed = {node.output[0] for node in self.placement.absorbed.values()}
        for name in self.graph.inputs:
            if name in self.grids:
                self._quantize(name, name)
        for node in self.graph.nodes:
            out = node.output[0] if node.output else ""
            if out in absorbed:
                continue
            if out in self.placement.compute:
                self._integer_node(node, self._compute_inputs(self.placement.compute[out]))
            elif out in self.placement.arithmetic:
                self._integer_node(node, [self._real(name) for name in node.input])
            elif out in self.placement.moves:
                self._move(node)
            elif out in self.placement.clips:
                self._clip(node)
            else:
                self._float_node(node)
        for name in self.graph.outputs:
            if name in self._integers and name not in self._floats:
                self.writer.add_node("DequantizeLinear", [self._integers[name][0], *self._grid(name)], [name])
        self.writer.write()

    def _grid(self, tensor: str) -> list[str]:
        """Names of scale and zero point of a tensor's integers, made once for every grid."""
        integer, grid = self._integers[tensor]
        key = f"{integer}_grid"
        if key not in self._dequantized:
            scale = self.writer.add_constant(f"{tensor}_scale", np.asarray(grid.scale, np.float32))
            self._dequantized[key] = scale
            self._dequantized[key + "0"] = self.writer.add_constant(
                f"{tensor}_zero_point", self.types.store(grid.zero_point)
            )
        return [self._dequantized[key], self._dequantized[key + "0"]]

    def _quantize(self, source: str, tensor: str) -> None:
        """Put the float tensor `source` on the grid of `tensor`."""
        integer = self.writer.claim_name(f"{tensor}_quantized")
        self._integers[tensor] = (integer, self.grids[tensor])
        self.writer.add_node("QuantizeLinear", [source, *self._grid(tensor)], [integer])

    def _real(self, tensor: str) -> str:
        """Name of the real values of a tensor for a consumer: dequantized if there are integers."""
        if tensor not in self._integers:
            return tensor
        if tensor not in self._dequantized:
            name = self.writer.claim_name(f"{tensor}_dequantized")
            self.writer.add_node("DequantizeLinear", [self._integers[tensor][0], *self._grid(tensor)], [name])
            self._dequantized[tensor] = name
        return self._dequantized[tensor]

    def _integer_node(self, node: NodeProto, inputs: list[str]) -> None:
        out = node.output[0]
        final = self.placement.final(out)
        fresh = _copy(node)
        del fresh.input[:]
        fresh.input.extend(inputs)
        on_grid = final in self.grids
        raw = self.writer.claim_name(f"{out}_real") if on_grid and final == out else out
        fresh.output[0] = raw
        self.writer.nodes.append(fresh)
        if on_grid:
            self._quantize(raw, final)
        else:
            self._floats.add(out)

    def _float_node(self, node: NodeProto) -> None:
        fresh = _copy(node)
        for index, name in enumerate(node.input):
            if name and name not in self._floats:
                fresh.input[index] = self._real(name)
        self._captured_stay_float(node)
        self.writer.nodes.append(fresh)
        self._floats.update(name for name in node.output if name)
        for name in node.output:
            if name in self.grids:
                self._quantize(name, name)

    def _captured_stay_float(self, node: NodeProto) -> None:
        """A graph inside the node takes tensors by name: give the real values that name."""
        for name, consumers in self.graph.consumers.items():
            hidden = name not in node.input and any(other is node for other in consumers)
            if hidden and name in self._integers and name not in self._floats:
                self.writer.add_node("DequantizeLinear", [self._integers[name][0], *self._grid(name)], [name])
                self._floats.add(name)

    def _move(self, node: NodeProto) -> None:
        integer, grid = self._integers[node.input[0]]
        scale = self._grid(node.input[0])
        fresh = _copy(node)
        fresh.input[0] = integer
        if node.op_type == "Pad":
            while len(fresh.input) < 3:
                fresh.input.append("")
            fresh.input[2] = scale[1]
        for index, name in enumerate(node.output):
            if name:
                fresh.output[index] = self.writer.claim_name(f"{name}_quantized")
                self._inherit(name, fresh.output[index], grid, scale)
        self.writer.nodes.append(fresh)

    def _clip(self, node: NodeProto) -> None:
        integer, grid = self._integers[node.input[0]]
        bounds = read_clip_bounds(self.graph, node)
        assert bounds is not None
        ends = quantize(np.array(bounds, np.float32), grid)
        low, high = (
            self.writer.add_constant(f"{node.output[0]}_{end}", self.types.store(value))
            for end, value in zip(("low", "high"), ends, strict=True)
        )
        made = self.writer.claim_name(f"{node.output[0]}_quantized")
        self.writer.add_node("Clip", [integer, low, high], [made])
        self._inherit(node.output[0], made, grid, self._grid(node.input[0]))

    def _inherit(self, tensor: str, integer: str, grid: Grid, names: list[str]) -> None:
        self._integers[tensor] = (integer, grid)
        self._dequantized[f"{integer}_grid"], self._dequantized[f"{integer}_grid0"] = names

    def _compute_inputs(self, entry: WeightNode) -> list[str]:
        node = entry.node
        data = self._real(node.input[0])
        step = self._integers[node.input[0]][1].scale
        weight, bias = (self.graph.array(name) for name in (node.input[1], entry.tensors.get("bias", "")))
        assert weight is not None
        canonical = entry.canonical("weight", weight)
        stated = self.stated.get(entry.name)
        if stated is None:
            floor = None if bias is None else bias_floor(bias.reshape(-1), float(step))
            scales, integers = self._rounded(canonical, floor)
        else:
            scales, integers = np.array(stated.scales, np.float32), stated.codes.astype(np.int8)
        scales = scales.reshape(-1) if scales.size == len(canonical) else scales.reshape(())
        real = dequantize_weight(integers, np.broadcast_to(scales, canonical.shape[:1]))
        error = relative_error(real, canonical)
        facts: Facts = {
            "input_scale": float(step),
            "weight_scale": float(scales.max()),
            "weight_error": error,
        }
        self.facts.setdefault(entry.name, facts)
        axis = 0 if not entry.to_canonical else weight.ndim - 1
        inputs = [data, self._weight(node.input[1], entry.native("weight", integers), scales, axis)]
        if bias is not None:
            steps = (np.float32(step) * scales).astype(np.float32)
            inputs.append(self._weight(node.input[2], quantize_bias(bias.reshape(-1), steps), steps, 0))
        return inputs

    def _rounded(self, weight: NDArray[Any], floor: NDArray[Any] | None) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return steps and integers of a weight `[out, ...]`, the steps no smaller than some."""
        if self.types.per_channel:
            scales = weight_scales(weight, floor)
            return scales, quantize_weight(weight, scales)
        scales = weight_scales(weight.reshape(1, -1), None if floor is None else floor.max(keepdims=True))
        return scales, quantize_weight(weight, np.repeat(scales, len(weight)))

    def _weight(self, name: str, integers: NDArray[Any], scales: NDArray[Any], axis: int) -> str:
        """Store an integer constant with its steps, once for equal ones, and return its real form's name."""
        key = (name, scales.tobytes())
        if key not in self._weights:
            stored = self.writer.add_constant(f"{name}_quantized", integers)
            steps = self.writer.add_constant(f"{name}_scale", scales)
            zero = self.writer.add_constant(f"{name}_zero_point", np.zeros(scales.shape, integers.dtype))
            real = self.writer.claim_name(f"{name}_dequantized")
            where = {"axis": axis} if scales.ndim else {}
            self.writer.add_node("DequantizeLinear", [stored, steps, zero], [real], **where)
            self._weights[key] = real
        return self._weights[key]


def _copy(node: NodeProto) -> NodeProto:
    fresh = NodeProto()
    fresh.CopyFrom(node)
    return fresh
