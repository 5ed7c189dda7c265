"""What was measured of one artefact, each number with its uncertainty and how it was taken."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from penjing.core.value import Value


class Estimate(Value):
    """A number with an interval: `low` and `high` at `confidence`, from `n` observations."""

    kind: Literal["estimate"] = "estimate"
    value: float
    low: float
    high: float
    confidence: float = 0.95
    n: int
    unit: str = ""
    how: str = ""


class NotMeasured(Value):
    """The absence of a number, with the reason. Never 0."""

    kind: Literal["not_measured"] = "not_measured"
    reason: str


Quantity = Annotated[Estimate | NotMeasured, Field(discriminator="kind")]


class Noise(Value):
    """By how much two processes of one file differ here: `relative`, found from some `processes`."""

    relative: float
    processes: int


class Latency(Value):
    """Time of one call on one batch, in milliseconds, from rounds interleaved with the baseline.

    `ratio` is this artefact's median over the reference's, round by round; `quantiles_ms` holds the
    0th, 1st, ..., 100th percentile for the distribution chart. The rounds are of several `sittings`, each
    with fresh processes; `noise` is what two processes of the reference's file differ by, which widens every
    interval.
    """

    kind: Literal["latency"] = "latency"
    p50_ms: Estimate
    p95_ms: Estimate
    p99_ms: Estimate
    throughput_per_s: Estimate
    ratio: Estimate | None = None
    reference: str = ""
    quantiles_ms: tuple[float, ...] = ()
    batch: int
    threads: int
    calls: int
    rounds: int
    sittings: int = 1
    noise: Noise | None = None


class BatchDependence(Value):
    """Whether an example's output depends on the others in its batch, as measured.

    Attributes:
        difference: largest |f(batch)[i] - f(one)| over the largest |f(one)|, f(one) an example on its own.
        dependent: whether that is more than rounding and noise make.
        batch: examples of the batches in which quality was taken: the task's, or the target's where the
            outputs depend on them.
        n: examples that were compared.
    """

    difference: float
    dependent: bool
    batch: int
    n: int


class Operations(Value):
    """Parameters and multiply-adds of one example (1 multiply-add = 2 FLOPs).

    `uncounted` names the operators without a formula; with any, the count is a lower bound. `by_layer` holds
    the multiply-adds with the weights of each layer; products of activations (attention) are in none.
    `zeros` counts the parameters with two or more axes that are exactly zero.
    """

    parameters: int
    multiply_adds: int
    uncounted: tuple[str, ...] = ()
    by_layer: dict[str, int] = Field(default_factory=dict)
    zeros: int = 0


class Measurement(Value):
    """Everything measured of one artefact on one target and one split of the data."""

    name: str
    target: str
    split: str
    metric: str
    quality: Quantity
    metrics: dict[str, float | None] = Field(default_factory=dict)
    per_class: dict[str, float | None] = Field(default_factory=dict)
    latency: Annotated[Latency | NotMeasured, Field(discriminator="kind")]
    memory_bytes: Quantity
    size_bytes: int | None
    compressed_bytes: int | None = None
    """Length of the model files after zlib at level 6: where zeros show."""
    operations: Operations | None = None
    difference: float | None = None
    """Largest relative difference between the outputs of the file and of the model in memory."""
    quality_in_memory: float | None = None
    """Metric of the model in memory, in batches of the task's size; what the file's should be."""
    batches: BatchDependence | None = None
    """Whether outputs depend on the batch, and in which batches quality was taken."""
