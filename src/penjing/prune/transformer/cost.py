"""What every width of every group costs: probed on truly cut models, one class of like groups at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.structure.mask_search import ranked
from penjing.core.backend import Group, Groups, Layer
from penjing.core.context import Context
from penjing.core.measurement import Operations
from penjing.core.value import Model
from penjing.prune.transformer.method import PruneTransformer

Floats = NDArray[np.float64]
Options = Mapping[str, NDArray[np.int64]]
"""By group name: the widths that it may have, ascending, the last the whole group."""

PROBES = 4
"""Widths of a class that are timed beside the whole; times between them are interpolated."""


@dataclass(frozen=True)
class Clock:
    """Tells what a cut model costs, as a share of what the uncut model costs.

    Attributes:
        dense: parameters and multiply-adds of the uncut model.
        share: of a cut model.
        linear: whether the cost of a group is proportional to its width.
        near: how far below the share that is asked for a cut may land.
        noise: how far above it.
        words: what was measured, for the record.
    """

    dense: Operations
    share: Callable[[Model], float]
    linear: bool
    near: float
    noise: float
    words: str


@contextmanager
def clock(model: Model, method: PruneTransformer, context: Context) -> Iterator[Clock]:
    """Give what measures the cost that the method's ratio is a share of."""
    backend, example = context.backend, context.task.valid.example()
    dense = backend.operations(model, example)
    if method.of == "latency":
        from penjing.measurement.side_by_side import beside

        with beside(model, method.target, context.task.valid) as ratio_of:
            yield Clock(
                dense, lambda cut: ratio_of(cut).value, False, 0.02, 0.01, f"latency on {method.target.label}"
            )
        return
    whole = max(getattr(dense, method.of), 1)

    def share(cut: Model) -> float:
        return float(getattr(backend.operations(cut, example), method.of) / whole)

    yield Clock(dense, share, True, 1e-3, 1e-9, method.of.replace("_", "-"))


def cost_table(
    model: Model, groups: Groups, options: Options, measured: Clock, context: Context
) -> tuple[float, dict[str, Floats]]:
    """Return what the model costs with every group at its narrowest, and what each width adds to that.

    Groups whose layers have the same shapes and multiply-adds cost the same: a probe cuts all of such a class
    together, so that what they add stands out of the noise of a clock.

    Args:
        model: uncut.
        groups: of the model.
        options: of the groups that may be cut.
        measured: what tells costs.
        context: the surroundings.

    Returns:
        A share of the uncut model's cost, and by group name shares `[widths]`, ascending from 0.
    """
    chosen = [group for group in groups.groups if group.name in options]
    base = 1.0
    added: dict[str, Floats] = {}
    for alike in _classes(chosen, context.backend.layers(model), measured.dense):
        widths = options[alike[0].name]
        places = np.unique(np.linspace(0, len(widths) - 1, 2 if measured.linear else PROBES + 1).astype(int))
        probed = []
        for width in widths[places[:-1]]:
            kept = {g.name: np.sort(ranked(np.zeros(g.size), g.blocks)[:width]) for g in alike}
            probed.append(measured.share(context.backend.keep(model, groups, kept)))
        saved = np.interp(widths, widths[places], [*probed, 1.0]) - 1
        # A clock may say that a wider layer is faster; it is not counted on.
        rising = np.minimum.accumulate(np.minimum(saved, 0.0)[::-1])[::-1]
        base += float(rising[0])
        added |= {group.name: (rising - rising[0]) / len(alike) for group in alike}
    return base, added


def _classes(groups: Sequence[Group], layers: Sequence[Layer], counts: Operations) -> list[list[Group]]:
    shapes = {layer.name: layer.shapes for layer in layers}
    found: dict[object, list[Group]] = {}
    for group in groups:
        slots = tuple(
            (s.tensor, s.axis, s.role, shapes[s.layer][s.tensor], counts.by_layer.get(s.layer, 0))
            for s in group.slots
        )
        found.setdefault((group.kind, group.size, group.blocks.tobytes(), slots), []).append(group)
    return list(found.values())
