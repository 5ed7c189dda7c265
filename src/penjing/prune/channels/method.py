"""The configuration of channel pruning."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from penjing.arrays.scores import ScoreName
from penjing.arrays.structure.ranking import Selection
from penjing.core.method import Method, Stage
from penjing.core.target import Target

Share = Annotated[float, Field(ge=0, le=1)]
Shares = Share | tuple[tuple[str, Share], ...]
Kind = Literal["channel", "head", "head width", "hidden"]
Of = Literal["units", "parameters", "multiply_adds", "size", "latency"]


class PruneChannels(Method):
    """Remove channels, attention heads and neurons from groups of coupled layers.

    Channels go through residual adds, concatenation, BatchNorm, depthwise and grouped convolutions and
    flattening together (Fang et al. 2023); what cannot shrink is reported with the reason.

    Attributes:
        ratio: share that is removed, between 0 and 1, both excluded.
        of: what the ratio is a share of. `units`: of each group's (`local`) or of all groups' units. Else of
            the whole model's `parameters`, `multiply_adds` for one example, `size` of its ONNX file, or
            measured `latency` on the target: the smallest cut that removes at least this share.
        score: how units are ranked, a name in `penjing.arrays.scores.SCORES`.
        selection: which units compete. `local`: those of one group, so that every group loses the same share;
            `global`: all; `isomorphic`: those of groups with equal topology (Fang et al. 2024). Where
            groups compete for a share of the whole model's cost, scores that estimate the loss (`taylor`,
            `fisher`, `output_fisher`, `hessian`, `refit`) are taken for each multiply-add or parameter saved.
        floor: least share of every group that stays; or pairs of a layer pattern and a share, of which the
            first that matches counts, 0 for none. One multiple of `round_to` always stays.
        ceiling: largest share of every group that stays, in the same form, 1 for none.
        round_to: what stays is a multiple of this many channels, at least one multiple; narrower groups
            stay whole. A unit of several channels (a head) counts all of them.
        units: kinds of units that may go: `channel` (also neurons), `head`, `hidden` (the width of a
            residual stream that is normalized as a whole), or `head width` alone.
        target: where `latency` is measured.
        batches: batches of training data for scores that need data, at least 1.
        size: examples in each of them, at least 1.
    """

    stage: ClassVar[Stage] = Stage.STRUCTURE
    ratio: float = Field(gt=0, lt=1)
    of: Of = "units"
    score: ScoreName = "l2"
    selection: Selection = "local"
    floor: Shares = 0.1
    ceiling: Shares = 1.0
    round_to: int = Field(default=8, ge=1, le=1024)
    units: tuple[Kind, ...] = ("channel", "head")
    target: Target = Field(default_factory=Target)
    batches: int = Field(default=16, ge=1)
    size: int = Field(default=32, ge=1)

    def __init__(self, ratio: float, **fields: Any) -> None:
        super().__init__(**{"ratio": ratio, **fields})

    @field_validator("units")
    @classmethod
    def _units(cls, units: tuple[Kind, ...]) -> tuple[Kind, ...]:
        if not units or len(set(units)) < len(units):
            raise ValueError("at least one kind of unit, each once")
        if "head width" in units and len(units) > 1:
            raise ValueError(
                "'head width' stands alone: whole heads are seen as other units than their width"
            )
        return units

    def floor_of(self, layers: tuple[str, ...]) -> float:
        """Return the least share that stays of a group with these layers: the largest of theirs."""
        return max((_share(self.floor, layer, 0.0) for layer in layers), default=0.0)

    def ceiling_of(self, layers: tuple[str, ...]) -> float:
        """Return the largest share that stays of a group with these layers: the smallest of theirs."""
        return min((_share(self.ceiling, layer, 1.0) for layer in layers), default=1.0)


def _share(shares: Shares, layer: str, none: float) -> float:
    if isinstance(shares, float):
        return shares
    return next((share for pattern, share in shares if fnmatchcase(layer, pattern)), none)
