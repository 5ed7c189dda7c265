"""What the probe of precision recipes found, in words; shared by the terminal and the HTML file."""

from __future__ import annotations

import math

from penjing.planners.candidates import PAYS, Probed, get_ratio
from penjing.report.record import RecipeRows
from penjing.report.words import NOT_MEASURED, clean


def list_recipe_rows(recipes: RecipeRows) -> list[tuple[str, str, str, str]]:
    """Return name, latency over that of float, its interval and the layers left float, of each recipe.

    The fastest first; what was not measured comes last, with the reason in place of the interval.
    """
    return [_cells(row) for row in sorted(recipes.rows, key=_seconds)]


def _seconds(row: Probed) -> float:
    return math.inf if row.ratio is None else row.ratio.value


def _cells(row: Probed) -> tuple[str, str, str, str]:
    ratio, stays = row.ratio, row.float_layers
    left = f"{len(stays)} of {row.layers}: {', '.join(stays)}" if stays else "none"
    times = NOT_MEASURED if ratio is None else f"{ratio.value:.2f}"
    interval = row.reason if ratio is None else f"{ratio.low:.2f} to {ratio.high:.2f}"
    return clean(row.name, 80), times, clean(interval, 160), clean(left, 160)


def describe_recipes(recipes: RecipeRows) -> str:
    """Say in one sentence what the probe of precision recipes found; nothing where there was none."""
    rows = [row for row in recipes.rows if row.ratio is not None]
    if not rows:
        return ""
    best = min(rows, key=get_ratio)
    value = get_ratio(best)
    if value >= PAYS:
        return (
            f"Lower precision does not pay here: the fastest recipe, {clean(best.name, 80)}, takes "
            f"{value:.2f} times the latency of float."
        )
    slower = sum(1 for row in rows if get_ratio(row) >= PAYS)
    others = f"; {slower} of {len(rows)} recipes do not pay" if slower else ""
    return (
        f"The fastest precision recipe, {clean(best.name, 80)}, takes {value:.2f} times the latency of "
        f"float before any pruning{others}."
    )
