"""A trial: one plan tried, what came of it, and the limits it breaks."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from penjing.core.budget import Budget
from penjing.core.measurement import Estimate, Latency, Measurement, Operations, Quantity
from penjing.core.value import Value


class StepQuality(Value):
    """What one step of a plan left: its `step` as plain data, quality in memory and operations."""

    step: dict[str, Any]
    quality: Quantity
    operations: Operations


class Trial(Value):
    """One plan tried on the data of the search.

    Attributes:
        key: digest of plan, model, data, target and seed; equal keys mean equal work.
        plan: the plan as plain data (`plan_to_json`).
        drop: loss of the metric against the baseline on the same examples; negative: better.
        flips: share of these examples whose prediction differs from the baseline's.
        breaks: for every limit that is broken, the measured value over the limit (above 1).
        folder: the artefact, relative to the run directory.
        seconds: wall time by activity (`training`, `evaluation`, `export`, `measurement`, ...).
        steps: what each step of the plan left, for the ablation.
    """

    key: str
    name: str
    plan: list[dict[str, Any]]
    status: Literal["done", "failed"]
    reason: str = ""
    measurement: Measurement | None = None
    drop: float | None = None
    flips: float | None = None
    breaks: dict[str, float] = Field(default_factory=dict)
    folder: str | None = None
    seconds: dict[str, float] = Field(default_factory=dict)
    steps: tuple[StepQuality, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def feasible(self) -> bool:
        """Whether the trial was done and its point estimates keep every limit."""
        return self.status == "done" and not self.breaks

    @property
    def latency_ms(self) -> float | None:
        """Median latency in milliseconds, where it was measured."""
        m = self.measurement
        return m.latency.p50_ms.value if m is not None and isinstance(m.latency, Latency) else None


def get_cost(measurement: Measurement, name: str) -> float | None:
    """Return the value of a cost (`latency` in ms, `size` and `memory` in bytes, `operations`), or None."""
    if name == "latency":
        return measurement.latency.p50_ms.value if isinstance(measurement.latency, Latency) else None
    if name == "size":
        return measurement.size_bytes
    if name == "memory":
        return measurement.memory_bytes.value if isinstance(measurement.memory_bytes, Estimate) else None
    assert name == "operations", name
    return None if measurement.operations is None else measurement.operations.multiply_adds


ROUNDING = 1e-9
"""Relative excess over a limit that the subtraction of two floats can make; it breaks no limit."""


def find_broken_limits(
    budget: Budget, measurement: Measurement, baseline: Measurement, drop: float | None
) -> dict[str, float]:
    """Return the limits that the point estimates break, each with measured value over limit.

    A limit whose value was not measured counts as broken (infinitely: 1e9), never as kept.
    A relative latency limit is judged by the ratio measured round by round with the baseline.
    """
    ratios: dict[str, float] = {}
    for name, limit in budget.costs.items():
        value, base = get_cost(measurement, name), get_cost(baseline, name)
        if value is None or (limit.relative and not base):
            ratios[name] = 1e9
            continue
        bound = limit.absolute(base or 0.0)
        latency = measurement.latency
        if (
            name == "latency"
            and limit.relative
            and isinstance(latency, Latency)
            and latency.ratio is not None
        ):
            value, bound = latency.ratio.value, limit.value
        ratios[name] = value / bound
    if budget.max_drop is not None:
        ratios["max_drop"] = 1e9 if drop is None else max(drop, 0.0) / budget.max_drop
    return {name: ratio for name, ratio in ratios.items() if ratio > 1 + ROUNDING}
