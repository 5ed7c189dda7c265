"""The protocol that a framework implements, and the look-up by the class of the model."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from penjing.core.errors import Refused
from penjing.core.extras import EXTRAS, need
from penjing.core.measurement import Operations
from penjing.core.value import Model

if TYPE_CHECKING:
    from penjing.core.task import Batch, Split, Task

Arrays = tuple[NDArray[Any], ...]

Heads = Literal["whole", "width"]
"""How attention goes: by whole heads, or by positions of the width of all heads at once."""


@dataclass(frozen=True)
class Window:
    """How a convolution reads its input: what `penjing.arrays.patches` needs.

    `padding` is `(before, after)` for each spatial axis; `mode` is the filling as NumPy's `pad` names it.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    mode: str = "constant"


@dataclass(frozen=True)
class Layer:
    """One layer with weights: its name in the model, its kind and the shapes of its tensors.

    Kinds are the field's words: `conv`, `depthwise`, `linear`, `batchnorm`, `embedding`, `other`.
    Weights are `[out, in, *kernel]` whatever the framework. `window` is there for convolutions whose outputs
    are products of patches of their input.
    """

    name: str
    kind: str
    shapes: Mapping[str, tuple[int, ...]]
    window: Window | None = None


@dataclass(frozen=True)
class Slot:
    """One axis of one tensor, seen by a group: `units[i]` is the group's unit at index i, or -1.

    `role` is `out` where the tensor makes the channel (weight rows, bias, normalization) and `in` where
    it consumes it (weight columns).
    """

    layer: str
    tensor: str
    axis: int
    units: NDArray[np.int64]
    role: str


@dataclass(frozen=True)
class Group:
    """Units (channels) that can go, each unit in all its slots at once.

    `size` is the number of units; `blocks` partitions them: units with the same value can only go in
    equal numbers from every block (grouped convolution), all 0 where there is no such tie.
    `layers` names the layers whose outputs the group is, in the order of the graph.
    `kind` says what a unit is: `channel`; `head` or `head width` of attention; `hidden`, the width of a
    residual stream that is normalized as a whole (LayerNorm, RMSNorm).
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    layers: tuple[str, ...]
    blocks: NDArray[np.int64]
    kind: str = "channel"


@dataclass(frozen=True)
class Groups:
    """All groups of a model, and for each layer that is frozen, why."""

    groups: tuple[Group, ...]
    frozen: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class Backend(Protocol):
    """All that the core knows of a framework. Methods raise `Refused` for what cannot be done."""

    name: str

    def copy(self, model: Model) -> Model:
        """Return an independent copy; the argument is never changed."""

    def layers(self, model: Model) -> tuple[Layer, ...]:
        """List the layers that have weights, in the order of the model."""

    def read(self, model: Model, layer: str) -> dict[str, NDArray[Any]]:
        """Return copies of a layer's tensors (`weight`, `bias`, `running_mean`, ...)."""

    def write(self, model: Model, layer: str, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Replace tensors of a layer by arrays of the same shapes."""

    def groups(self, model: Model, example: Arrays, heads: Heads = "whole") -> Groups:
        """Return the coupled channels of the model, by propagating dimensions through its graph.

        Attention goes by whole heads, or with `heads="width"` by positions of the width of all of a layer's
        heads; a backend without attention takes either.
        """

    def blocks(self, model: Model, example: Arrays) -> tuple[str, ...]:
        """Name the whole blocks that could be taken out, in the order in which they run."""

    def keep(self, model: Model, groups: Groups, kept: Mapping[str, NDArray[np.int64]]) -> Model:
        """Return the model with only the units `kept[group.name]` (sorted) of every group named there."""

    def run(self, model: Model, inputs: Arrays) -> NDArray[Any]:
        """Return the model's output for one batch, in evaluation mode."""

    def observe(
        self, model: Model, layers: Sequence[str], batches: Iterator[Batch]
    ) -> Iterator[dict[str, tuple[NDArray[Any], NDArray[Any]]]]:
        """Yield the input and the output of each named layer, batch by batch, in evaluation mode."""

    def operations(self, model: Model, example: Arrays) -> Operations:
        """Count parameters and multiply-adds for one example."""

    def fingerprint(self, model: Model) -> str:
        """Return a SHA-256 over the architecture and every weight and buffer."""

    def check(self, model: Model, example: Arrays) -> None:
        """Refuse a model that cannot be worked on (NaN weights, meta device, no output, ...)."""

    def export(self, model: Model, example: Arrays, path: Path) -> None:
        """Write the model as a checked ONNX file with a dynamic batch, inputs named as in the model."""

    def select(self, model: Model, output: Any) -> Model:
        """Return the model with one output, the one that `output` names; the model itself for None."""


@dataclass(frozen=True)
class Sample:
    """Data that a loss is taken on: at most `batches` batches of `size` examples, in the order of `seed`."""

    split: Split
    loss: Any
    batches: int
    size: int
    seed: int


@dataclass(frozen=True)
class GateGradients:
    """Derivatives of each example's loss by gates of value 1 on the input channels of layers.

    Attributes:
        examples: in this batch.
        sums: by layer, `[examples, channels]`: `sum of x dL/dx` over positions (and calls of the layer).
        squares: by layer, `[examples, channels]`: `sum of (x dL/dx)^2` over the same.

    Layers that are not called as modules, or take inputs without the batch first, are in neither.
    """

    examples: int
    sums: Mapping[str, NDArray[np.float64]]
    squares: Mapping[str, NDArray[np.float64]]

    def width(self, layer: str) -> int:
        """Return the number of input channels of a layer, 0 for one that is missing."""
        return self.sums[layer].shape[1] if layer in self.sums else 0


@dataclass(frozen=True)
class KroneckerFactors:
    """The curvature of the loss by a layer's weight, in two factors (Martens & Grosse 2015; for convolutions
    Grosse & Martens 2016).

    Attributes:
        inputs: `[columns + 1, columns + 1]`, the mean over output positions of x xᵀ, x being what one output
            is computed from (for a convolution `in * kernel` values) with a last entry of 1.
        slopes: `[rows, rows]`, the sum over an example's positions of g gᵀ, g the gradient of its loss by
            the layer's output; the mean over examples.
    """

    inputs: NDArray[np.float64]
    slopes: NDArray[np.float64]


@runtime_checkable
class GradientBackend(Backend, Protocol):
    """A backend that can also train; only handlers that need gradients ask for it."""

    def gradients(
        self, model: Model, split: Split, loss: Any, batches: int, size: int, seed: int
    ) -> Iterator[dict[str, dict[str, NDArray[Any]]]]:
        """Yield, batch by batch, the gradient of the mean loss for every tensor of every layer."""

    def gate_gradients(self, model: Model, layers: Sequence[str], sample: Sample) -> Iterator[GateGradients]:
        """Yield, batch by batch, how each example's loss depends on gates on the inputs of layers."""

    def kronecker_factors(
        self, model: Model, layers: Sequence[str], sample: Sample
    ) -> dict[str, KroneckerFactors]:
        """Return the factors of linear layers and convolutions without groups; others are missing.

        The loss is that of labels drawn from what the model itself predicts (the true Fisher information).
        """

    def output_slopes(
        self, model: Model, layers: Sequence[str], batches: Sequence[Batch], centred: bool, seed: int
    ) -> dict[str, NDArray[np.float64]]:
        """Return for each layer `[out]` the mean squared derivative of the model's outputs by its outputs.

        Summed over positions and over the model's outputs; `centred`: of outputs less their mean over the
        last axis, which softmax does not see.
        """

    def hessian_diagonals(self, model: Model, sample: Sample) -> Iterator[dict[str, dict[str, NDArray[Any]]]]:
        """Yield, batch by batch, an unbiased estimate of the diagonal of the mean loss's Hessian."""


@runtime_checkable
class MaskBackend(Backend, Protocol):
    """A backend that remembers which weights have to stay zero."""

    def masks_of(self, model: Model) -> dict[str, NDArray[np.bool_]]:
        """Return the masks by tensor name (`layer.tensor`), True where the weight is kept."""

    def set_masks(self, model: Model, masks: Mapping[str, NDArray[np.bool_]]) -> None:
        """Mask tensors and zero what the masks remove; masks of tensors not named stay."""


_BACKENDS: tuple[tuple[str, str], ...] = (
    ("keras.", "penjing.backends.keras"),
    ("torch.nn.modules.module", "penjing.backends.torch"),
    ("penjing.backends.onnx.model", "penjing.backends.onnx"),
    ("penjing.backends.numpy", "penjing.backends.numpy"),
)


def backend_named(name: str) -> Backend:
    """Import a backend by name (`torch`, `onnx`, `numpy`)."""
    if name in EXTRAS:
        need(name, f"the {name} backend")
    backend: Backend = importlib.import_module(f"penjing.backends.{name}").BACKEND
    return backend


def backend_for(model: Model) -> Backend:
    """Find the backend from the classes that a model inherits from, and import it.

    Raises:
        Refused: no backend knows the class.
    """
    modules = [cls.__module__ for cls in type(model).__mro__]
    for prefix, target in _BACKENDS:
        if any(module == prefix or module.startswith(prefix) for module in modules):
            if importlib.util.find_spec(target) is None:
                break
            return backend_named(target.rpartition(".")[2])
    raise Refused(
        "must be of a supported framework",
        value=f"{type(model).__module__}.{type(model).__qualname__}",
        place="model",
        fix="pass a torch.nn.Module, a penjing OnnxModel (pj.load_onnx) or a NumPy net",
    )


def without_choice(model: Model, output: Any) -> Model:
    """Implement `Backend.select` for models that have one output only.

    Raises:
        Refused: the task names an output.
    """
    if output is not None:
        raise Refused(
            "cannot be given: a model of this framework has one output",
            value=repr(output),
            place="task.output",
            fix="leave task.output out",
        )
    return model


def enter(model: Model, task: Task) -> tuple[Backend, Model, Task]:
    """Find the backend of a model, and make the output that the task names its only one.

    The task that comes back names no output any more: what follows sees a model with one.
    """
    backend = backend_for(model)
    return backend, backend.select(model, task.output), replace(task, output=None)
