"""Which heads and neurons a transformer can spare: Fisher information of masks, widths, rearrangement.

A mask multiplies what one unit (an attention head, a neuron of a feed-forward layer) hands on: 1 keeps it, 0
removes it. Near a trained model the loss changes by half the quadratic form of the removed units with the
Fisher matrix of the masks (Kwon et al., "A fast post-training pruning framework for transformers", NeurIPS
2022). Pure functions on arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.scores.units import consumers, to_units
from penjing.core.backend import GateGradients, Group
from penjing.core.errors import Refused

Floats = NDArray[np.float64]
Units = NDArray[np.int64]

POINTS = 8192
"""Partial sums of cost that `allocate` tells apart; with no more of them the optimum is exact."""


@dataclass(frozen=True)
class Widths:
    """What a group may be cut to.

    Attributes:
        kept: `[options]` units that stay, ascending; the last is the whole group.
        cost: `[options]` what that costs, at least 0.
        loss: `[options]` what that loses, at least 0.
    """

    kept: Units
    cost: Floats
    loss: Floats


def mask_gradients(
    groups: Sequence[Group], batches: Iterable[GateGradients]
) -> dict[str, NDArray[np.float64] | None]:
    """Return for each group the derivative of every example's loss by the masks of its units.

    Args:
        groups: the units; a mask multiplies what all layers that consume the unit take of it.
        batches: derivatives by gates on inputs of those layers; walked once.

    Returns:
        By group name `[examples, size]`, None where a consuming layer is missing in a batch.
    """
    parts: dict[str, list[Floats | None]] = {group.name: [] for group in groups}
    for batch in batches:
        for group in groups:
            slots = consumers(group)
            whole = bool(slots) and all(batch.width(slot.layer) == len(slot.units) for slot in slots)
            terms = [to_units(batch.sums[slot.layer], slot, group.size) for slot in slots] if whole else []
            parts[group.name].append(np.sum(terms, axis=0) if whole else None)
    found: dict[str, Floats | None] = {}
    for name, rows in parts.items():
        there = [row for row in rows if row is not None]
        found[name] = np.concatenate(there) if there and len(there) == len(rows) else None
    return found


def fisher(gradients: NDArray[np.floating]) -> Floats:
    """Return the empirical Fisher matrix of a group's masks, `[size, size]`.

    Args:
        gradients: `[examples, size]` of each example's own loss.
    """
    g = np.asarray(gradients, np.float64)
    matrix: Floats = g.T @ g / max(len(g), 1)
    return matrix


def width_options(size: int, blocks: NDArray[np.int64], step: int) -> Units:
    """Return the widths that a group may have: multiples of `step` that all blocks share, and the whole.

    >>> width_options(50, np.zeros(50, int), 16).tolist()
    [16, 32, 48, 50]
    """
    each = int(np.lcm(step, len(np.unique(blocks))))
    return np.unique(np.append(np.arange(each, size, each), size)).astype(np.int64)


def ranked(importance: Floats, blocks: NDArray[np.int64]) -> Units:
    """Return units from the most to the least important, so that every block gives one in each round.

    Args:
        importance: `[size]`; ties go to the lower index.
        blocks: `[size]`, the block of every unit; units go in equal numbers from each.
    """
    order = np.argsort(-np.asarray(importance, np.float64), kind="stable")
    turn = np.empty(len(order), np.int64)
    for block in np.unique(blocks):
        mine = order[blocks[order] == block]
        turn[mine] = np.arange(len(mine))
    found: Units = order[np.argsort(turn[order], kind="stable")]
    return found


def losses_of_widths(importance: Floats, order: Units, kept: Units) -> Floats:
    """Return for each width half the summed importance of the units that then go, `[widths]`."""
    total = np.concatenate([[0.0], np.cumsum(np.asarray(importance, np.float64)[order])])
    losses: Floats = np.maximum(total[-1] - total[kept], 0.0) / 2
    return losses


def allocate(groups: Sequence[Widths], budget: float) -> list[int]:
    """Choose one width for every group: the least summed loss whose summed cost is within the budget.

    A knapsack with one choice from each group (Kwon et al.'s algorithm 1 for costs that are not all alike),
    solved exactly over partial sums that no other beats; beyond `POINTS` of them only the best in each of as
    many ranges of cost are followed. Never above the budget.

    Returns:
        The index into each group's options.

    Raises:
        Refused: even the narrowest widths cost more than the budget.
    """
    least = float(sum(g.cost.min() for g in groups))
    if least > budget * (1 + 1e-9):
        raise Refused(
            "the budget must hold every group at its narrowest",
            value=f"{least:.6g} > {budget:.6g}",
            place="allocate",
            fix="ask for a smaller ratio",
        )
    cost, loss = np.zeros(1), np.zeros(1)
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    left = least
    for group in groups:
        left -= float(group.cost.min())
        sums = (cost[:, None] + group.cost).ravel()
        values = (loss[:, None] + group.loss).ravel()
        front = _front(sums, values, budget * (1 + 1e-9) - left)
        steps.append((front // len(group.cost), front % len(group.cost)))
        cost, loss = sums[front], values[front]
    at = int(np.argmin(loss))
    chosen = []
    for parents, options in reversed(steps):
        chosen.append(int(options[at]))
        at = int(parents[at])
    return chosen[::-1]


def _front(cost: Floats, loss: Floats, budget: float) -> NDArray[np.int64]:
    """Return the indices of sums within the budget that no cheaper one beats, cheapest first, thinned."""
    fits = np.flatnonzero(cost <= budget)
    order: NDArray[np.int64] = fits[np.lexsort((loss[fits], cost[fits]))]
    best = np.minimum.accumulate(loss[order])
    order = order[np.concatenate([[True], best[1:] < best[:-1]])]
    if len(order) <= POINTS:
        return order
    low, high = cost[order[0]], cost[order[-1]]
    cell = ((cost[order] - low) / max(high - low, 1e-300) * (POINTS - 1)).astype(np.int64)
    last = np.append(cell[1:] != cell[:-1], True)
    last[0] = True
    thinned: NDArray[np.int64] = order[last]
    return thinned


def rearrange(kept: Units, matrix: Floats, blocks: NDArray[np.int64], swaps: int | None = None) -> Units:
    """Exchange kept for removed units while that lowers what the removed ones lose together.

    The loss of removing a set is half the sum of the Fisher matrix over it, so that units which do the same
    are not all removed. Each step takes the best single exchange (Kwon et al., section 4.2, from a warm
    start).

    Args:
        kept: sorted units to start with.
        matrix: `[size, size]`, symmetric, positive semi-definite.
        blocks: `[size]`; only units of one block change places.
        swaps: at most this many; None: as many as there are units.

    Returns:
        As many units, sorted.
    """
    stays = np.zeros(len(matrix), bool)
    stays[kept] = True
    diagonal = np.diagonal(matrix)
    scale = 1e-12 * max(float(diagonal.sum()), 1e-300)
    for _ in range(len(matrix) if swaps is None else swaps):
        inside, outside = np.flatnonzero(stays), np.flatnonzero(~stays)
        if not len(outside) or not len(inside):
            break
        pull = matrix[:, outside].sum(1)
        change = (diagonal[inside] + 2 * pull[inside])[:, None] + (diagonal[outside] - 2 * pull[outside])
        change = change - 2 * matrix[np.ix_(inside, outside)]
        change[blocks[inside][:, None] != blocks[outside]] = np.inf
        best = int(np.argmin(change))
        if not change.flat[best] < -scale:
            break
        goes, comes = divmod(best, len(outside))
        stays[inside[goes]], stays[outside[comes]] = False, True
    return np.flatnonzero(stays).astype(np.int64)
