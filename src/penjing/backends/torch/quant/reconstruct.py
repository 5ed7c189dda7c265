"""Rounding learned block by block: each block of a quantized network learns to give what it gave in float."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from penjing.backends.torch.observe.blockwise import partition_into_blocks, record_block, relative_error
from penjing.backends.torch.quantizers import Quantizer, broadcast_scale, quantized_layers
from penjing.backends.torch.tensors import to_inputs
from penjing.core.backend import Arrays
from penjing.core.progress import Line, Say

GAMMA, ZETA = -0.1, 1.1
"""The sigmoid is stretched to this range and clipped, so that it reaches 0 and 1 (Nagel et al. 2020)."""

WARM_UP = 0.2
"""Share of the steps without pressure towards 0 and 1."""

FIRST_BETA, LAST_BETA = 20.0, 2.0
PRESSURE = 0.01


@dataclass(frozen=True)
class Learning:
    """How rounding is learned.

    Attributes:
        steps: of Adam for each block.
        size: examples in each.
        rate: of the rounding variables; the scales of inputs learn at `scale_rate` of their own size.
        drop: probability of leaving an input value unrounded while learning (Wei et al. 2022, "QDrop").
        seed: of batches and of `drop`.
    """

    steps: int
    size: int
    rate: float = 1e-2
    scale_rate: float = 1e-3
    drop: float = 0.5
    seed: int = 0


class LearnedRounding(nn.Module):  # type: ignore[misc]
    """A weight's quantizer that learns for every value whether it is rounded up or down.

    Nagel et al. 2020, "Up or down? Adaptive rounding for post-training quantization". Starts at the value
    itself, ends at the two codes around it.
    """

    def __init__(self, weight: Tensor, quantizer: Quantizer) -> None:
        super().__init__()
        self._format = quantizer.format
        scale = broadcast_scale(quantizer.scale.detach(), quantizer.format, weight.shape)
        zero = quantizer.zero_point
        self._scale = scale
        self._zero = (
            weight.new_zeros(()) if zero is None else broadcast_scale(zero, quantizer.format, weight.shape)
        )
        steps = weight.detach() / scale
        self._floor = torch.floor(steps)
        share = ((steps - self._floor) - GAMMA) / (ZETA - GAMMA)
        self.up = nn.Parameter(torch.logit(share))

    def share(self) -> Tensor:
        """Return how far each value is rounded up, from 0 to 1."""
        return (torch.sigmoid(self.up) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight between the codes around it."""
        return self._value(self.share())

    def final(self) -> Tensor:
        """Return the weight on the codes that were chosen."""
        return self._value((self.share() >= 0.5).to(self._floor.dtype)).detach()

    def pressure(self, beta: float) -> Tensor:
        """Return how far the choices are from being made: 0 where all are."""
        return (1 - (2 * self.share() - 1).abs().pow(beta)).sum()

    def _value(self, share: Tensor) -> Tensor:
        codes = (self._floor + share + self._zero).clamp(self._format.lowest, self._format.highest)
        return (codes - self._zero) * self._scale


@dataclass(frozen=True)
class Reconstructed:
    """How far a block's outputs were from the float model's, before and after: relative squared errors."""

    block: str
    layers: tuple[str, ...]
    before: float
    after: float


Learn = Callable[[nn.Module, tuple[Tensor, Tensor, Tensor]], list[str]]
"""From a block and its data (what the quantized model gives it, what the float model gives it, and the float
output) to the names of its layers, which have learned."""


def reconstruct(
    model: nn.Module,
    reference: nn.Module,
    arrays: Arrays,
    learn: Learn,
    largest: int,
    say: Say,
) -> list[Reconstructed]:
    """Learn the rounding of every quantized layer's weight, block by block, in place.

    Each block is given what the quantized blocks before it give and learns to give the float model's output.
    Labels are not used.

    Args:
        model: with quantizers on nearest rounding.
        reference: the same model in float, BatchNorm folded alike.
        arrays: inputs that are learned from.
        learn: how.
        largest: most quantized layers in a block.
        say: progress.
    """
    inputs = to_inputs(model, arrays)
    names = [name for name, _ in quantized_layers(model)]
    blocks = partition_into_blocks(model, names, tuple(x[:2] for x in inputs), largest)
    found: list[Reconstructed] = []
    for number, name in enumerate(blocks, 1):
        say(Line.step(f"reconstructing {name} ({number} of {len(blocks)})"))
        given, _ = record_block(model, name, inputs)
        clean, wanted = record_block(reference, name, inputs)
        block = model.get_submodule(name)
        before = relative_error(block, given, wanted)
        layers = learn(block, (given, clean, wanted))
        after = relative_error(block, given, wanted)
        found.append(Reconstructed(name, tuple(f"{name}.{x}".rstrip(".") for x in layers), before, after))
    return found


def learn_up_or_down(
    block: nn.Module, data: tuple[Tensor, Tensor, Tensor], learning: Learning, learned: set[Quantizer]
) -> list[str]:
    """Learn, then write the weights that were chosen; return the layers' names within the block.

    Args:
        block: with quantizers on nearest rounding.
        data: as of `Learn`; the first two are mixed (QDrop).
        learning: how.
        learned: quantizers of inputs that learn no more; those that did here are added.
    """
    given, clean, wanted = data
    layers = dict(quantized_layers(block))
    channels = len(list(layers.values())[-1].weight)
    plain = {name: layer.weight_quantizer for name, layer in layers.items()}
    roundings = {}
    for name, layer in layers.items():
        if _can_learn(plain[name]):
            roundings[name] = layer.weight_quantizer = LearnedRounding(layer.weight, plain[name])
    # One that several layers share is learned by the first block that has it, once.
    steppers = list(dict.fromkeys(q for layer in layers.values() if _can_learn(q := layer.input_quantizer)))
    steppers = [quantizer for quantizer in steppers if quantizer not in learned]
    learned.update(steppers)
    for quantizer in steppers:
        quantizer.learned()
        quantizer.drop = learning.drop
    groups = [{"params": [r.up for r in roundings.values()], "lr": learning.rate}]
    groups += [
        {"params": [q.scale], "lr": learning.scale_rate * float(q.scale.detach().mean())} for q in steppers
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, learning.steps)
    generator = torch.Generator().manual_seed(learning.seed)
    modes = [(module, module.training) for module in block.modules()]
    try:
        _mode(block, steppers)
        with torch.enable_grad(), torch.random.fork_rng():
            torch.manual_seed(learning.seed)
            for step in range(learning.steps):
                chosen = torch.randint(len(given), (learning.size,), generator=generator)
                x = given[chosen]
                if learning.drop:
                    x = torch.where(torch.rand_like(x) < learning.drop, clean[chosen], x)
                loss = channels * (block(x) - wanted[chosen]).square().mean()
                loss = loss + _pressure(list(roundings.values()), step / learning.steps)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    finally:
        for module, mode in modes:
            module.training = mode
        for quantizer in steppers:
            quantizer.learned(False)
            quantizer.drop = 0.0
        for name, rounding in roundings.items():
            layers[name].weight_quantizer = plain[name]
            layers[name].weight.data.copy_(rounding.final())
    return list(layers)


def _mode(block: nn.Module, steppers: Sequence[Quantizer]) -> None:
    """Dropping values needs training mode, everything else computes as it is used."""
    block.eval()
    for quantizer in steppers:
        quantizer.training = True


def _can_learn(quantizer: Quantizer | None) -> bool:
    return (
        quantizer is not None
        and quantizer.format.kind == "integer"
        and quantizer.format.granularity != "token"
    )


def _pressure(roundings: Sequence[LearnedRounding], progress: float) -> Tensor | float:
    if progress < WARM_UP:
        return 0.0
    left = (progress - WARM_UP) / (1 - WARM_UP)
    beta = LAST_BETA + 0.5 * (FIRST_BETA - LAST_BETA) * (1 + math.cos(left * math.pi))
    return PRESSURE * sum(rounding.pressure(beta) for rounding in roundings)
