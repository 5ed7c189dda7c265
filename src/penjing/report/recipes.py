"""What the probe of precision recipes found, in words; shared by the terminal and the HTML file."""

from __future__ import annotations

import math

from penjing.planners.candidates import PAYS
from penjing.report.words import NOT_MEASURED, Json, clean


def recipe_rows(record: Json) -> list[tuple[str, str, str, str]]:
    """Return name, latency over that of float, its interval and the layers left float, of each recipe.

    The fastest first; what was not measured comes last, with the reason in place of the interval.
    """
    rows = (record.get("recipes") or {}).get("rows") or ()
    found = []
    for row in sorted(rows, key=lambda row: (row.get("ratio") or {}).get("value", math.inf)):
        ratio, stays = row.get("ratio"), row.get("float_layers") or ()
        left = f"{len(stays)} of {row.get('layers', 0)}: {', '.join(stays)}" if stays else "none"
        times = f"{ratio['value']:.2f}" if ratio else NOT_MEASURED
        interval = f"{ratio['low']:.2f} to {ratio['high']:.2f}" if ratio else row.get("reason", "")
        found.append((clean(row.get("name", ""), 80), times, clean(interval, 160), clean(left, 160)))
    return found


def probed_recipes(record: Json) -> str:
    """Say in one sentence what the probe of precision recipes found; nothing where there was none."""
    rows = [row for row in (record.get("recipes") or {}).get("rows") or () if row.get("ratio")]
    if not rows:
        return ""
    best = min(rows, key=lambda row: row["ratio"]["value"])
    value = float(best["ratio"]["value"])
    if value >= PAYS:
        return (
            f"Lower precision does not pay here: the fastest recipe, {clean(best['name'], 80)}, takes "
            f"{value:.2f} times the latency of float."
        )
    slower = sum(1 for row in rows if row["ratio"]["value"] >= PAYS)
    others = f"; {slower} of {len(rows)} recipes do not pay" if slower else ""
    return (
        f"The fastest precision recipe, {clean(best['name'], 80)}, takes {value:.2f} times the latency of "
        f"float before any pruning{others}."
    )
