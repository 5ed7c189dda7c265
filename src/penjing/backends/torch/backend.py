"""The torch backend: the protocol's functions under one name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.backends.torch import check, masks, onnx_file, operations, tensors
from penjing.backends.torch.curvature import sensitivity
from penjing.backends.torch.curvature.kronecker import kronecker_factors
from penjing.backends.torch.curvature.output_slopes import output_slopes
from penjing.backends.torch.cut import cut
from penjing.backends.torch.cut.verify import check_capture
from penjing.backends.torch.graph.capture import capture
from penjing.backends.torch.graph.flow import TorchGroups, label_channels
from penjing.backends.torch.observe import observe
from penjing.backends.torch.structure import blocks
from penjing.core.backend import Arrays, GateGradients, Groups, Heads, KroneckerFactors, Layer, Sample
from penjing.core.measurement import Operations
from penjing.core.task import Batch, Split
from penjing.core.value import Model


class TorchBackend:
    """`penjing.core.backend.GradientBackend` and `MaskBackend` for `torch.nn.Module`."""

    name = "torch"

    def copy(self, model: Model) -> Model:
        """Return an independent copy; see `check.copy_module`."""
        return check.copy_module(model)

    def layers(self, model: Model) -> tuple[Layer, ...]:
        """List the modules that hold tensors, in the order of the model."""
        return tensors.list_layers(model)

    def read(self, model: Model, layer: str) -> dict[str, NDArray[Any]]:
        """Return copies of a layer's tensors."""
        return tensors.read(model, layer)

    def write(self, model: Model, layer: str, tensors_: Mapping[str, NDArray[Any]]) -> None:
        """Replace tensors of a layer by arrays of the same shapes."""
        tensors.write(model, layer, tensors_)

    def groups(self, model: Model, example: Arrays, heads: Heads = "whole") -> TorchGroups:
        """Return the coupled channels; the result also holds the graph, which `keep` needs.

        With grouped queries a whole head is one of the keys with all queries that it serves. Weights on the
        meta device have a graph too.

        Raises:
            Refused: the model cannot be captured, or its graph computes something else than it.
        """
        captured = capture(model, example)
        if tensors.device_of(model).type != "meta":
            check_capture(model, captured)
        return label_channels(model, captured, heads)

    def blocks(self, model: Model, example: Arrays) -> tuple[str, ...]:
        """Name the blocks that could be taken out; see `blocks.find_blocks`."""
        return tuple(blocks.find_blocks(model, example).found)

    def keep(self, model: Model, groups: Groups, kept: Mapping[str, NDArray[np.int64]]) -> Model:
        """Return a copy with only the kept units; see `cut.keep`."""
        return cut.keep(model, groups, kept)

    def run(self, model: Model, inputs: Arrays) -> NDArray[Any]:
        """Return the model's output for one batch, in evaluation mode."""
        return observe.run(model, inputs)

    def observe(
        self, model: Model, layers: Sequence[str], batches: Iterator[Batch]
    ) -> Iterator[dict[str, tuple[NDArray[Any], NDArray[Any]]]]:
        """Yield the input and the output of each named layer, batch by batch."""
        return observe.observe(model, layers, batches)

    def gradients(
        self, model: Model, split: Split, loss: Any, batches: int, size: int, seed: int
    ) -> Iterator[dict[str, dict[str, NDArray[Any]]]]:
        """Yield, batch by batch, the gradient of the mean loss for every parameter."""
        return observe.gradients(model, split, loss, batches, size, seed)

    def gate_gradients(self, model: Model, layers: Sequence[str], sample: Sample) -> Iterator[GateGradients]:
        """Yield, batch by batch, derivatives by gates on the inputs of layers, for every example."""
        return sensitivity.gate_gradients(model, layers, sample)

    def hessian_diagonals(self, model: Model, sample: Sample) -> Iterator[dict[str, dict[str, NDArray[Any]]]]:
        """Yield, batch by batch, an estimate of the diagonal of the Hessian of the mean loss."""
        return sensitivity.hessian_diagonals(model, sample)

    def masks_of(self, model: Model) -> masks.Masks:
        """Return the masks by tensor name, True where the weight is kept."""
        return masks.masks_of(model)

    def set_masks(self, model: Model, masks_: Mapping[str, NDArray[np.bool_]]) -> None:
        """Mask tensors and zero what the masks remove."""
        masks.set_masks(model, masks_)

    def kronecker_factors(
        self, model: Model, layers: Sequence[str], sample: Sample
    ) -> dict[str, KroneckerFactors]:
        """Return the factors of linear layers and convolutions; see `kronecker.kronecker_factors`."""
        return kronecker_factors(model, layers, sample)

    def output_slopes(
        self, model: Model, layers: Sequence[str], batches: Sequence[Batch], centred: bool, seed: int
    ) -> dict[str, NDArray[np.float64]]:
        """Return the mean squared derivatives of the model's outputs by those of layers."""
        modules = {name: tensors.find_layer(model, name) for name in layers}
        return output_slopes(model, modules, batches, centred, seed)

    def operations(self, model: Model, example: Arrays) -> Operations:
        """Count parameters and multiply-adds for one example."""
        return operations.count_operations(model, example)

    def fingerprint(self, model: Model) -> str:
        """Return a SHA-256 over the code and every tensor."""
        return check.fingerprint(model)

    def check(self, model: Model, example: Arrays) -> None:
        """Refuse a module that cannot be worked on; see `check.check`."""
        check.check(model, example)

    def export(self, model: Model, example: Arrays, path: Path) -> None:
        """Write a checked ONNX file; see `onnx_file.export`."""
        onnx_file.export(model, example, path)

    def select(self, model: Model, output: Any) -> Model:
        """Return the module, wrapped where one of several outputs counts."""
        return (
            model
            if output is None or isinstance(model, tensors.Selected)
            else tensors.Selected(model, output)
        )
