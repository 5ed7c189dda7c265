"""Which of several formats each layer gets: losses from the backend, the choice from the knapsack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.knapsack import choose_options
from penjing.calibration.inputs import no_examples
from penjing.calibration.rounding import MixedBits
from penjing.core.backend import Sample
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.value import Model

if TYPE_CHECKING:
    from penjing.backends.torch.curvature.rounding_loss import Pair
    from penjing.backends.torch.quantizers import Quantizer

BATCH = 32


@dataclass(frozen=True)
class Choice:
    """What a layer gets.

    Attributes:
        option: index of its option.
        facts: expected rise of the loss, stored bits for each weight, and the share of all bits; none where
            nothing was chosen.
    """

    option: int
    facts: dict[str, float | int | str] = field(default_factory=dict)


def choose_formats(
    model: Model,
    pairs: Mapping[str, Sequence[tuple[Quantizer, Quantizer | None]]],
    mixed: MixedBits | None,
    context: Context,
) -> dict[str, Choice]:
    """Return for each layer the option that it gets, in the order of `pairs`.

    Args:
        model: in float, on which losses are taken.
        pairs: by layer the quantizers of weight and input of each option; one option where `mixed` is None.
        mixed: the size and the examples.
        context: its training data are used, without targets.

    Raises:
        Refused: the size is less than that of the smallest options; losses are not finite; no data.
    """
    if mixed is None or not pairs:
        return {name: Choice(0) for name in pairs}
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in pairs}
    counts = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    bits = {
        name: np.array([round(w.format.bits_per_value(shapes[name]) * counts[name]) for w, _ in made])
        for name, made in pairs.items()
    }
    budget, least = int(mixed.bits * sum(counts.values())), sum(int(b.min()) for b in bits.values())
    if least > budget:
        raise Refused(
            f"must be at least {least / sum(counts.values()):.4g}, which the smallest options take",
            place="MixedBits.bits",
            value=f"{mixed.bits:g}",
            fix="raise bits, or add a smaller option; scales and ends at 8 bits count",
        )
    losses = _losses(model, pairs, mixed, context)
    chosen = choose_options([losses[name] for name in pairs], list(bits.values()), budget)
    total = sum(int(b[i]) for b, i in zip(bits.values(), chosen, strict=True))
    return {
        name: Choice(
            int(i),
            {
                "expected_loss": float(losses[name][i]),
                "bits_per_weight": float(bits[name][i] / counts[name]),
                "share_of_bits": float(bits[name][i] / total),
            },
        )
        for name, i in zip(pairs, chosen, strict=True)
    }


def _losses(
    model: Model, pairs: Mapping[str, Sequence[Pair]], mixed: MixedBits, context: Context
) -> dict[str, NDArray[np.float64]]:
    from penjing.backends.torch.curvature.rounding_loss import rounding_losses

    split = context.task.train
    if len(split) == 0:
        raise no_examples()
    sample = Sample(split, context.task.loss, -(-mixed.examples // BATCH), BATCH, context.seed)
    losses = rounding_losses(model, pairs, sample)
    for name, found in losses.items():
        if not np.isfinite(found).all():
            raise Refused(
                "must leave the loss finite when it is rounded",
                value="NaN or infinite",
                place=name,
                fix="look for overflow in the model, or leave the layer out with only('!...', ...)",
            )
    return losses
