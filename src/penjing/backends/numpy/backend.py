"""The backend protocol for NumPy nets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.backends.numpy.evaluate import evaluate
from penjing.backends.numpy.export import export
from penjing.backends.numpy.flow import cut, find_groups, is_depthwise
from penjing.backends.numpy.net import OPERATORS, Node, NumpyNet
from penjing.core.backend import Arrays, Groups, Heads, Layer, Window, without_choice
from penjing.core.errors import Refused, nearest
from penjing.core.measurement import Operations
from penjing.core.task import Batch

_STATISTICS = ("running_mean", "running_var")


class NumpyBackend:
    """Nets evaluated in plain NumPy; no gradients, so nothing trains here."""

    name = "numpy"

    def copy(self, model: NumpyNet) -> NumpyNet:
        """Return a net with tensors of its own."""
        return NumpyNet(model.inputs, model.nodes, model.tensors)

    def layers(self, model: NumpyNet) -> tuple[Layer, ...]:
        """List the nodes that have tensors, in the order of evaluation."""
        return tuple(
            Layer(
                node.name,
                "depthwise" if is_depthwise(node, model) else OPERATORS[node.op].kind,
                {name: array.shape for name, array in model.tensors[node.name].items()},
                _window(node, model),
            )
            for node in model.nodes
            if model.tensors.get(node.name)
        )

    def read(self, model: NumpyNet, layer: str) -> dict[str, NDArray[Any]]:
        """Return copies of a layer's tensors.

        Raises:
            Refused: no layer has this name.
        """
        model.node(layer)
        return {name: array.copy() for name, array in model.tensors.get(layer, {}).items()}

    def write(self, model: NumpyNet, layer: str, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Replace tensors of a layer by arrays of the same shapes.

        Raises:
            Refused: no such layer or tensor, another shape, or a value that is not finite.
        """
        model.node(layer)
        own = model.tensors.get(layer, {})
        for name, array in tensors.items():
            place = f"{layer}.{name}"
            if name not in own:
                raise Refused(
                    "must name a tensor of the layer", value=repr(name), place=layer, fix=nearest(name, own)
                )
            if own[name].shape != np.shape(array):
                raise Refused(
                    "must keep its shape",
                    value=np.shape(array),
                    place=place,
                    fix=f"write an array of shape {own[name].shape}",
                )
            if not np.isfinite(array).all():
                raise Refused(
                    "must be finite",
                    value="NaN or infinity",
                    place=place,
                    fix="look for a division by zero in what makes the array",
                )
        own.update({name: np.array(array, np.float32) for name, array in tensors.items()})

    def groups(self, model: NumpyNet, example: Arrays, heads: Heads = "whole") -> Groups:
        """Return the coupled channels."""
        return find_groups(model, example)

    def blocks(self, model: NumpyNet, example: Arrays) -> tuple[str, ...]:
        """Find no block: nothing of this backend is called as one."""
        return ()

    def keep(self, model: NumpyNet, groups: Groups, kept: Mapping[str, NDArray[np.int64]]) -> NumpyNet:
        """Return a net with only the units `kept[group.name]` of every group named there."""
        return cut(model, groups, kept)

    def run(self, model: NumpyNet, inputs: Arrays) -> NDArray[Any]:
        """Return the value of the last node for one batch."""
        return evaluate(model, inputs)[model.nodes[-1].name]

    def observe(
        self, model: NumpyNet, layers: Sequence[str], batches: Iterator[Batch]
    ) -> Iterator[dict[str, tuple[NDArray[Any], NDArray[Any]]]]:
        """Yield the first input and the output of each named layer, batch by batch."""
        nodes = [model.node(layer) for layer in layers]
        for inputs, _ in batches:
            values = evaluate(model, inputs)
            yield {node.name: (values[node.inputs[0]], values[node.name]) for node in nodes}

    def operations(self, model: NumpyNet, example: Arrays) -> Operations:
        """Count parameters, and multiply-adds of convolutions and linear layers for one example."""
        values = evaluate(model, example)
        parameters = sum(
            array.size
            for tensors in model.tensors.values()
            for name, array in tensors.items()
            if name not in _STATISTICS
        )
        by_layer = {
            node.name: values[node.name][0].size * model.tensors[node.name]["weight"][0].size
            for node in model.nodes
            if node.op in ("conv2d", "linear")
        }
        total = sum(by_layer.values())
        arrays = [array for tensors in model.tensors.values() for array in tensors.values()]
        zeros = sum(int((array == 0).sum()) for array in arrays if array.ndim > 1)
        return Operations(parameters=parameters, multiply_adds=total, by_layer=by_layer, zeros=zeros)

    def fingerprint(self, model: NumpyNet) -> str:
        """Return a SHA-256 over nodes, attributes and tensors."""
        state = hashlib.sha256(repr(model.inputs).encode())
        for node in model.nodes:
            attributes = {**OPERATORS[node.op].attributes, **node.attributes}
            state.update(repr((node.name, node.op, node.inputs, sorted(attributes.items()))).encode())
            for name, array in sorted(model.tensors.get(node.name, {}).items()):
                state.update(repr((name, array.shape)).encode() + array.tobytes())
        return state.hexdigest()

    def check(self, model: NumpyNet, example: Arrays) -> None:
        """Refuse a net with weights that are not finite, or one that does not run on the example.

        Raises:
            Refused: names the tensors and the number of bad values, or the node.
        """
        bad = [
            f"{layer}.{name} ({int((~np.isfinite(array)).sum())} of {array.size})"
            for layer, tensors in model.tensors.items()
            for name, array in tensors.items()
            if not np.isfinite(array).all()
        ]
        if bad:
            raise Refused(
                "weights must be finite",
                value=", ".join(bad[:5]),
                place="model",
                fix="train the model again with a lower rate",
            )
        self.run(model, example)

    def select(self, model: NumpyNet, output: int | str | None) -> NumpyNet:
        """Return the model, which has one output."""
        chosen: NumpyNet = without_choice(model, output)
        return chosen

    def export(self, model: NumpyNet, example: Arrays, path: Path) -> None:
        """Write the net as a checked ONNX file with a dynamic batch."""
        export(model, example, path)


def _window(node: Node, model: NumpyNet) -> Window | None:
    if node.op != "conv2d":
        return None
    kernel = model.tensors[node.name]["weight"].shape[2:]
    stride, padding = node.whole("stride"), node.whole("padding")
    return Window(kernel, (stride,) * 2, ((padding, padding),) * 2, (1, 1), node.whole("groups"))


BACKEND = NumpyBackend()
