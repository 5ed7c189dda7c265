"""Masks that are chosen again and again while a network trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from penjing.arrays.sparsity.patterns import Pattern
from penjing.arrays.sparsity.weights import weight_masks

if TYPE_CHECKING:
    from torch import Tensor, nn

Schedule = Callable[[float], float]
"""From the share of the training that lies behind to the share of zeros."""


@dataclass(frozen=True)
class MaskChoice:
    """How masks are chosen.

    Attributes:
        criterion: `magnitude`, the squares of the weights, or `movement`: `-Σ w ∂L/∂w` over the steps, with
            gradients also for weights that are masked (Sanh, Wolf & Rush 2020, "Movement pruning": straight
            through). What moves away from zero stays.
        pattern, scope, floor: as of `penjing.arrays.sparsity.weights.weight_masks`.
    """

    criterion: Literal["magnitude", "movement"]
    pattern: Pattern
    scope: Literal["global", "layer"]
    floor: float


class Sparsifier:
    """Keeps the values that masked weights had last, so that they can come back.

    `after_backward` and `after_step` are hooks of the training loop.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        choice: MaskChoice,
        schedule: Schedule,
        moments: Sequence[float],
    ) -> None:
        """Prepare; nothing is masked yet.

        Args:
            model: a torch module.
            names: parameters `[out, in, *kernel]` that fit the pattern.
            choice: what stays.
            schedule: sparsity over the training.
            moments: shares of the training at which masks are chosen, ascending.
        """
        self._model, self._choice, self._schedule = model, choice, schedule
        self._parameters = {name: model.get_parameter(name) for name in names}
        self._values = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._scores = {name: p.detach().new_zeros(p.shape) for name, p in self._parameters.items()}
        self._moments = list(moments)
        self._sparsity = 0.0

    def after_backward(self, progress: float) -> None:
        """Add to the scores of movement; gradients are those by the weights as the network used them."""
        if self._choice.criterion == "movement":
            for name, parameter in self._parameters.items():
                if parameter.grad is not None:
                    self._scores[name] -= parameter.grad * self._values[name]

    def after_step(self, progress: float) -> None:
        """Note the new values, and choose masks where it is time."""
        self._remember()
        if self._moments and progress >= self._moments[0]:
            self._moments = [moment for moment in self._moments if moment > progress]
            self.mask(self._schedule(progress))

    def finish(self) -> None:
        """Choose masks of the final sparsity where the training ended too early for them."""
        if self._sparsity < self._schedule(1.0):
            self._remember()
            self.mask(self._schedule(1.0))

    def mask(self, sparsity: float) -> None:
        """Choose masks of a sparsity now; weights that come back have the values that they had last."""
        import torch

        from penjing.backends.torch.masks import set_masks
        from penjing.backends.torch.tensors import to_numpy

        self._sparsity = sparsity
        if sparsity <= 0:
            return
        scores = self._scores if self._choice.criterion == "movement" else _squares(self._values)
        masks = weight_masks(
            {name: to_numpy(score) for name, score in scores.items()},
            sparsity,
            self._choice.pattern,
            self._choice.scope,
            self._choice.floor,
        )
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._values[name])
        set_masks(self._model, masks)

    def _remember(self) -> None:
        from penjing.backends.torch.masks import MASKS

        for name, parameter in self._parameters.items():
            owner, _, local = name.rpartition(".")
            mask = getattr(self._model.get_submodule(owner), MASKS, {}).get(local)
            value = parameter.detach()
            self._values[name] = value.clone() if mask is None else value.where(mask, self._values[name])


def _squares(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.square() for name, value in values.items()}
