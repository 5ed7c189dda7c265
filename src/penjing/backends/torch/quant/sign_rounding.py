"""Rounding and clipping learned by the sign of the gradient, block by block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from penjing.backends.torch.observe.blockwise import relative_error
from penjing.backends.torch.quantizers import Quantizer, broadcast_scale, quantized_layers

LEAST, MOST = 0.5, 1.5
"""Bounds of the factors of a range's ends; 1 is the range that clip search gave."""
CHECKS = 10


@dataclass(frozen=True)
class SignLearning:
    """How it is learned.

    Attributes:
        steps: for each block, at a rate that falls from `1 / steps` to 0.
        size: examples in each.
        seed: of the batches.
    """

    steps: int
    size: int
    seed: int = 0


class SignRounding(nn.Module):  # type: ignore[misc]
    """A weight's quantizer that learns an offset of every value and the ends of every range.

    Cheng et al. 2024, "Optimize weight rounding via signed gradient descent for the quantization of LLMs",
    equations 3 and 4. Starts on nearest rounding under the quantizer's scales. Integers only.
    """

    def __init__(self, weight: Tensor, quantizer: Quantizer) -> None:
        super().__init__()
        self.format, scale = quantizer.format, quantizer.scale.detach()
        zero = scale.new_zeros(()) if quantizer.zero_point is None else quantizer.zero_point
        self._low = (self.format.lowest - zero) * scale
        self._high = (self.format.highest - zero) * scale
        self.offset = nn.Parameter(torch.zeros_like(weight))
        self.ends = nn.Parameter(scale.new_ones((2, *scale.shape)))

    def range(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point, of the format's `scale_shape`; the zero point is 0 where symmetric."""
        low, high = self._low * self.ends[0], self._high * self.ends[1]
        if self.format.symmetric:
            return high / self.format.highest, torch.zeros_like(high)
        scale = ((high - low) / (self.format.highest - self.format.lowest)).clamp(min=1e-12)
        zero = _round(-low / scale) + self.format.lowest
        return scale, zero.clamp(self.format.lowest, self.format.highest)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the rounded weight."""
        scale, zero = (broadcast_scale(part, self.format, weight.shape) for part in self.range())
        codes = _round(weight / scale + self.offset) + zero
        return (codes.clamp(self.format.lowest, self.format.highest) - zero) * scale

    def step(self, rate: float) -> None:
        """Move against the signs of the gradients, within bounds."""
        with torch.no_grad():
            for tensor, low, high in ((self.offset, -0.5, 0.5), (self.ends, LEAST, MOST)):
                tensor.sub_(rate * tensor.grad.sign()).clamp_(low, high)
                tensor.grad = None

    def state(self) -> list[Tensor]:
        """Return copies of what is learned."""
        return [self.offset.detach().clone(), self.ends.detach().clone()]

    def final(self, weight: Tensor, state: list[Tensor]) -> tuple[Tensor, Quantizer]:
        """Return the weight on its codes and the quantizer that leaves it there, for what `state` gave."""
        with torch.no_grad():
            self.offset.copy_(state[0])
            self.ends.copy_(state[1])
            scale, zero = self.range()
            made = Quantizer(self.format, scale, None if self.format.symmetric else zero)
            return self(weight), made


def _round(x: Tensor) -> Tensor:
    """Round half to even; gradients pass straight through."""
    return x + (torch.round(x) - x).detach()


def learn_by_signs(
    block: nn.Module, data: tuple[Tensor, Tensor, Tensor], learning: SignLearning
) -> list[str]:
    """Learn on one block, in place; return the names of its layers.

    The best of the start and `CHECKS` moments is kept, by the error on all examples.

    Args:
        block: with quantizers on integers.
        data: what the quantized model gives the block, what the float model gives it, and the float output.
        learning: how.
    """
    given, _, wanted = data
    layers = dict(quantized_layers(block))
    plain = {name: layer.weight_quantizer for name, layer in layers.items()}
    roundings = {name: SignRounding(layer.weight.detach(), plain[name]) for name, layer in layers.items()}
    frozen = [(p, p.requires_grad) for p in block.parameters()]
    modes = [(module, module.training) for module in block.modules()]
    generator = torch.Generator().manual_seed(learning.seed)
    best, states = relative_error(block, given, wanted), {name: r.state() for name, r in roundings.items()}
    try:
        block.eval()
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        for name, layer in layers.items():
            layer.weight_quantizer = roundings[name]
        for step in range(learning.steps):
            chosen = torch.randint(len(given), (learning.size,), generator=generator)
            with torch.enable_grad():
                (block(given[chosen]) - wanted[chosen]).square().mean().backward()
            for rounding in roundings.values():
                rounding.step((1 - step / learning.steps) / learning.steps)
            if (step + 1) % max(learning.steps // CHECKS, 1) == 0:
                error = relative_error(block, given, wanted)
                if error < best:
                    best, states = error, {name: r.state() for name, r in roundings.items()}
    finally:
        for parameter, flag in frozen:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
        for name, layer in layers.items():
            weight, layer.weight_quantizer = roundings[name].final(layer.weight.detach(), states[name])
            layer.weight.data.copy_(weight)
    return list(layers)
