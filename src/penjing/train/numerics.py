"""In which number format and memory layout a network trains fastest, by rules measured beforehand.

Rules and not a stopwatch: the choice changes the last bits of the result, and the same seed must give the
same result again. `benchmarks/training_numerics.py` measures what the rules claim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

LARGE = 1_000_000
"""Parameters from which on bfloat16 gains whatever the layers are."""

BLOCK = 16


@dataclass(frozen=True)
class Numerics:
    """How the forward and backward passes compute; weights, their gradients and the loss stay float32.

    >>> print(Numerics(bfloat16=True, channels_last=False))
    bfloat16 autocast
    """

    bfloat16: bool
    channels_last: bool
    device: str = "cpu"

    def __str__(self) -> str:
        words = ["bfloat16 autocast" if self.bfloat16 else "float32"]
        return ", ".join([*words, "channels last"] if self.channels_last else words)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which the network runs."""
        import torch

        context: AbstractContextManager[Any] = torch.autocast(
            self.device, torch.bfloat16, enabled=self.bfloat16
        )
        return context

    def to_layout(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return inputs in the memory layout of the network."""
        import torch

        if not self.channels_last:
            return inputs
        return tuple(x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Lay the model's weights out while the context lasts; values and sharing do not change."""
        import torch

        if not self.channels_last:
            yield
            return
        model.to(memory_format=torch.channels_last)
        try:
            yield
        finally:
            model.to(memory_format=torch.contiguous_format)


def numerics_for(
    model: nn.Module,
    precision: Literal["auto", "float32", "bfloat16"],
    layout: Literal["auto", "contiguous", "channels_last"] = "auto",
) -> Numerics:
    """Choose what is left open by rule, from the hardware and the network's layers.

    `auto` takes bfloat16 where the hardware multiplies it natively, for convolutional networks and for
    those above a million weights: 1.0 to 2.9 times faster there, slower for small networks of linear layers
    and, on processors, for depthwise convolutions, which took twice the time on one with AMX. Channels last
    is 1.3 times faster for dense 2-D convolutions whose widths are multiples of 16 and up to 2.4 times for
    depthwise ones; at other widths it depends on the processor.
    """
    parameters = list(model.parameters())
    device = parameters[0].device.type if parameters else "cpu"
    last = _channels_last(model) if layout == "auto" else layout == "channels_last"
    return Numerics(_bfloat16(model, parameters, precision, device), last, device)


def _bfloat16(model: nn.Module, parameters: list[nn.Parameter], precision: str, device: str) -> bool:
    import torch

    if precision != "auto":
        return precision == "bfloat16"
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in parameters):
        return False
    if device == "cpu" and _depthwise(model):
        return False
    convolves = any(isinstance(m, torch.nn.modules.conv._ConvNd) for m in model.modules())
    gains = convolves or sum(p.numel() for p in parameters) >= LARGE
    return gains and bfloat16_is_native(device)


def bfloat16_is_native(device: str) -> bool:
    """Tell whether the hardware multiplies bfloat16 without emulating it."""
    import torch

    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # younger than our oldest torch
        return False
    can = torch.cpu.get_capabilities()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def _channels_last(model: nn.Module) -> bool:
    import torch

    if _depthwise(model):
        return True
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    dense = [m for m in convolutions if m.groups == 1]
    return bool(dense) and all(m.out_channels % BLOCK == 0 for m in dense)


def _depthwise(model: nn.Module) -> bool:
    import torch

    convolutions = (m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    return any(m.groups > 1 and m.groups == m.in_channels for m in convolutions)
