"""Layers that round weights and inputs to a number format: a quantized network in simulation.

A quantized layer is the user's own layer whose class computes with rounded values; its name, its tensors and
the module that it is in stay. What it computes is what an integer kernel computes up to the order of float32
sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from penjing.arrays.formats.coding import rounded
from penjing.core.errors import Refused
from penjing.core.number_format import NumberFormat

SMALLEST = 1e-12
"""Of a scale that is trained."""
PART = 2**20
"""Values that are rounded at a time where no gradient is wanted."""


class Quantizer(nn.Module):  # type: ignore[misc]
    """Round a tensor to the values of a format; gradients pass straight through.

    With `learned`, the gradient by the scale is that of learned step sizes (Esser et al. 2020, "LSQ"; with a
    zero point Bhalgat et al. 2020, "LSQ+"), divided by the square root of the values that share a scale times
    the largest code. Formats that are no integers follow the same rule, where a scale may have any value.

    Attributes:
        format: the number format; tokens get their scales from the tensor itself.
        scale: a parameter of the format's `scale_shape`, not trained until `learned`.
        zero_point: a buffer of the same shape; None for symmetric formats.
        tensor_scale: of nvfp4, a buffer of one number; None otherwise.
        drop: probability with which a value is left as it is in training mode (Wei et al. 2022, "QDrop").
    """

    def __init__(
        self,
        format: NumberFormat,
        scale: Tensor,
        zero_point: Tensor | None = None,
        tensor_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.format = format
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("tensor_scale", tensor_scale)
        self.drop = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Return the rounded tensor, of the same shape."""
        if self.format.granularity == "token":
            y = _AsIf.apply(x, rounded(x.detach(), self.format))
        elif self.format.kind == "integer":
            y = _integers(x, self)
        else:
            y = _values(x, self)
        if self.drop and self.training:
            y = torch.where(torch.rand_like(x) < self.drop, x, y)
        return y

    @property
    def learnable(self) -> bool:
        """Whether the scale can be trained: it is stored, and may have any value above 0."""
        return self.format.granularity != "token" and self.format.kind in ("integer", *_SATURATION)

    def learned(self, learn: bool = True) -> None:
        """Let the scale be trained, or not."""
        self.scale.data = self.positive().detach().clone()
        self.scale.requires_grad_(learn)

    def positive(self) -> Tensor:
        """Return the scale; one that training has moved across 0 counts with its magnitude."""
        return self.scale.abs().clamp(min=SMALLEST) if self.scale.requires_grad else self.scale


_SATURATION = {"nf4": 1.0, "fp8_e4m3": 448.0, "fp8_e5m2": 57344.0, "ternary": 1.5, "binary": 1.0}
"""By kind, how many scales a value may have before it is cut off."""


def _shrunk(x: Tensor, quantizer: Quantizer, largest: float) -> Tensor:
    """Return the scale, for every value; its gradient is shrunk, its value the same to the bit."""
    scale = quantizer.positive()
    if scale.requires_grad:
        factor = 1 / math.sqrt(x.numel() / max(scale.numel(), 1) * max(largest, 1))
        scale = scale.detach() + (scale - scale.detach()) * factor
    return broadcast_scale(scale, quantizer.format, x.shape).expand(x.shape)


def _values(x: Tensor, quantizer: Quantizer) -> Tensor:
    format, scale = quantizer.format, quantizer.scale
    y = rounded(x.detach(), format, quantizer.positive().detach(), None, quantizer.tensor_scale)
    if not (scale.requires_grad and quantizer.learnable):
        return _AsIf.apply(x, y)
    end = _SATURATION[format.kind]
    return _Table.apply(x, _shrunk(x, quantizer, end), y, end, format.kind == "binary")


def _integers(x: Tensor, quantizer: Quantizer) -> Tensor:
    by_rows = quantizer.format.granularity in ("channel", "group")
    if by_rows and not torch.is_grad_enabled() and x.numel() > PART:
        return _in_parts(x, quantizer)
    zero = quantizer.zero_point
    scale = _shrunk(x, quantizer, quantizer.format.highest)
    zero = x.new_zeros(()) if zero is None else broadcast_scale(zero.to(x.dtype), quantizer.format, x.shape)
    return _StraightThrough.apply(x, scale, zero, quantizer.format.lowest, quantizer.format.highest)


def _in_parts(x: Tensor, quantizer: Quantizer) -> Tensor:
    """Round some rows at a time, so that what lies between takes no memory of the size of the whole."""
    format, scale, zero = quantizer.format, quantizer.positive(), quantizer.zero_point
    y, step = torch.empty_like(x), max(1, PART * len(x) // x.numel())
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        part, shape = y[rows], x[rows].shape
        own = broadcast_scale(scale[rows], format, shape)
        torch.div(x[rows], own, out=part)
        part.round_()
        offset = 0 if zero is None else broadcast_scale(zero[rows].to(x.dtype), format, shape)
        part.add_(offset).clamp_(format.lowest, format.highest).sub_(offset).mul_(own)
    return y


def broadcast_scale(values: Tensor, format: NumberFormat, shape: tuple[int, ...]) -> Tensor:
    """Return scales (or zero points) so that they broadcast over a tensor of a shape."""
    if format.granularity == "channel":
        return values.reshape(-1, *[1] * (len(shape) - 1))
    if format.granularity == "group":
        columns = math.prod(shape[1:])
        return values.repeat_interleave(format.group, dim=1)[:, :columns].reshape(shape)
    return values


class _AsIf(torch.autograd.Function):  # type: ignore[misc]
    """The second argument, with gradients as if it were the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        return slopes[0], None


class _Table(torch.autograd.Function):  # type: ignore[misc]
    """Values of a table times a scale; straight through where nothing is cut off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, y: Tensor, end: float, signs: bool) -> Tensor:
        steps, values = x / scale, y / scale
        inside = steps.abs() <= end
        # The value of a sign does not follow x.
        ctx.save_for_backward(inside, values if signs else torch.where(inside, values - steps, values))
        return y

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        inside, by_scale = ctx.saved_tensors
        (slope,) = slopes
        return slope * inside, slope * by_scale, None, None, None


class _StraightThrough(torch.autograd.Function):  # type: ignore[misc]
    """(clip(round(x / scale) + zero) - zero) * scale; half to even, as ONNX's QuantizeLinear rounds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, lowest: int, highest: int) -> Tensor:
        steps = x / scale
        codes = torch.round(steps) + zero
        inside = (codes >= lowest) & (codes <= highest)
        whole = codes.clamp(lowest, highest) - zero
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(inside, torch.where(inside, whole - steps, whole))
        else:
            ctx.save_for_backward(inside)
        return whole * scale

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        inside, *by_scale = ctx.saved_tensors
        (slope,) = slopes
        return slope * inside, slope * by_scale[0] if by_scale else None, None, None, None


class _Quantized(nn.Module):  # type: ignore[misc]
    """A layer with quantizers as submodules; either may be None."""

    input_quantizer: Quantizer | None
    weight_quantizer: Quantizer | None

    def forward(self, x: Tensor) -> Tensor:
        """Compute with rounded values."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        weight = self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)
        return self._compute(x, weight)

    def _compute(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, self.bias)


class QuantizedLinear(_Quantized, nn.Linear):  # type: ignore[misc]
    """`nn.Linear` on rounded values."""

    def _compute(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.linear(x, weight, self.bias)


class QuantizedConv1d(_Quantized, nn.Conv1d):  # type: ignore[misc]
    """`nn.Conv1d` on rounded values."""


class QuantizedConv2d(_Quantized, nn.Conv2d):  # type: ignore[misc]
    """`nn.Conv2d` on rounded values."""


class QuantizedConv3d(_Quantized, nn.Conv3d):  # type: ignore[misc]
    """`nn.Conv3d` on rounded values."""


CLASSES: dict[type, type[_Quantized]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
}
"""The quantized class of each of torch's; subclasses of a user's own are not known."""


def set_quantizers(module: nn.Module, weight: Quantizer | None, inputs: Quantizer | None) -> None:
    """Make a layer compute with rounded values, in place; what it had before is replaced.

    Args:
        module: of a class in `CLASSES`, or quantized already.
        weight: of its weight.
        inputs: of its input.

    >>> layer, int8 = nn.Linear(2, 1), NumberFormat.model_validate("int8 tensor")
    >>> set_quantizers(layer, Quantizer(int8, torch.ones(int8.scale_shape((1, 2)))), None)
    >>> _ = layer.weight.data.copy_(torch.tensor([[0.4, 1.6]])), layer.bias.data.zero_()
    >>> layer(torch.ones(1, 2)).item()
    2.0
    """
    if not isinstance(module, _Quantized):
        module.__class__ = CLASSES[type(module)]
    module.weight_quantizer, module.input_quantizer = weight, inputs


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the names and modules of quantized layers, in the order of the model."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, _Quantized))


def refuse_simulated(model: nn.Module) -> None:
    """Refuse a model that computes with rounded values in float: no runtime gains from it.

    Raises:
        Refused: names the first quantized layer and its formats.
    """
    for name, layer in quantized_layers(model):
        made = [str(q.format) for q in (layer.weight_quantizer, layer.input_quantizer) if q is not None]
        raise Refused(
            "a delivered model cannot be a simulation of number formats",
            value=f"{' by '.join(made)} in {name}",
            place="deliver",
            fix="its quality can be measured, not its speed; Int8Static or WeightOnly "
            "behind it make integers of what a kernel can hold",
        )


def quantizers_of(model: nn.Module) -> list[Quantizer]:
    """Return all quantizers of a model."""
    return [module for module in model.modules() if isinstance(module, Quantizer)]


def remove_quantizers(model: nn.Module) -> None:
    """Make every quantized layer one of torch's own again, in place, its weights rounded for good."""
    for _, module in list(quantized_layers(model)):
        if module.weight_quantizer is not None:
            with torch.no_grad():
                module.weight.copy_(module.weight_quantizer(module.weight))
        del module.weight_quantizer, module.input_quantizer
        module.__class__ = next(plain for plain, own in CLASSES.items() if own is type(module))
