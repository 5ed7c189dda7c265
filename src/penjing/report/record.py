"""The record of a run as one value: the content of `record.json`, described in docs/json.md."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from penjing.core.artefact import ArtefactFile
from penjing.core.errors import Exit, Refused
from penjing.core.measurement import Measurement, Operations, Quantity
from penjing.core.method import Change
from penjing.core.target import Target
from penjing.core.value import Value
from penjing.core.verdict import Verdict
from penjing.planners.candidates import Probed
from penjing.planners.forecast import Forecast

SCHEMA = 1
"""Newest schema of a record that this version reads, and the one that it writes."""

Plain = dict[str, Any]


class Recorded(Value):
    """Base of the parts of a record; fields that a later version added are kept as they are."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)


class TrialRow(Recorded):
    """A trial as the record lists it; `pareto`: no other is both at least as fast and at least as good."""

    id: int
    name: str
    plan: list[Plain]
    status: Literal["done", "failed"]
    reason: str
    measurement: Measurement | None
    drop: float | None
    flips: float | None
    feasible: bool
    breaks: dict[str, float]
    pareto: bool
    seconds: float


class StepRow(Recorded):
    """A row of the ablation: what is there after one step of the plan."""

    step: str
    quality: Quantity
    latency_ms: float | None
    low: float | None
    high: float | None
    size_bytes: int | None
    operations: Operations | None


class ArtefactPlace(Recorded):
    """Where the delivered model lies in the run directory, with the SHA-256 of its manifest."""

    path: str
    sha256: str
    files: list[ArtefactFile]


class RuntimeRow(Recorded):
    """The float model in one of the runtimes that were compared."""

    measurement: Measurement | None
    drop: float | None
    flips: float | None
    status: Literal["done", "failed"]
    reason: str


class RuntimeRows(Recorded):
    """The runtimes that were compared before the search, if any."""

    asked: str = ""
    chosen: str = ""
    words: list[str] = Field(default_factory=list)
    rows: dict[str, RuntimeRow] = Field(default_factory=dict)


class RecipeRows(Recorded):
    """The precision recipes whose latency was measured before the search, if any."""

    words: list[str] = Field(default_factory=list)
    rows: list[Probed] = Field(default_factory=list)
    cached: bool = False


class Asked(Recorded):
    """What the run was asked, as resolved."""

    budget: Plain
    target: Target
    seed: int
    metric: str
    class_names: list[str]


class Originals(Recorded):
    """The float model in PyTorch eager, where it was measured, and in the reference of the target."""

    eager: Measurement | None
    target: Measurement


class Spent(Recorded):
    """Wall time of the run in seconds, by activity; `other` is the cost of the tool itself."""

    seconds: float
    by: dict[str, float]
    trials: int


class Record(Recorded):
    """A finished run.

    Attributes:
        version: of this form (`schema` in JSON).
        result, runners_up: measured on the unseen split.
        plan, changes, ablation: of the result.
        environment: versions and machine.

    >>> Record.model_fields["version"].alias
    'schema'
    """

    version: int = Field(default=SCHEMA, alias="schema")
    penjing: str = ""
    name: str = "run"
    created: str = ""
    config: Asked
    verdict: Verdict
    artefact: ArtefactPlace
    forecast: Forecast | None = None
    baselines: Originals
    runtimes: RuntimeRows = Field(default_factory=RuntimeRows)
    recipes: RecipeRows = Field(default_factory=RecipeRows)
    result: Measurement
    runners_up: list[Measurement]
    plan: list[Plain]
    changes: list[Change]
    ablation: list[StepRow]
    trials: list[TrialRow]
    environment: Plain
    spent: Spent
    notes: list[str]

    def to_json(self) -> Plain:
        """Return the plain data of `record.json` and of `--json`."""
        return self.model_dump(mode="json", by_alias=True)

    @property
    def metric(self) -> str:
        """Name of the metric that judges."""
        return self.result.metric

    def measurements(self) -> list[tuple[str, Measurement]]:
        """Return what the table of before and after shows, in its order, each with its role."""
        eager = self.baselines.eager
        return [
            *([] if eager is None else [("float model in PyTorch eager", eager)]),
            ("float model in the target", self.baselines.target),
            ("result", self.result),
            *(("runner-up", measurement) for measurement in self.runners_up),
        ]


def check_schema(content: Any) -> None:
    """Refuse plain data that are no record, or one of a newer schema.

    Raises:
        Refused: see above.
    """
    if not isinstance(content, dict) or "verdict" not in content:
        raise Refused(
            "must have a verdict",
            value=type(content).__name__,
            place="record.json",
            fix="give the record.json of a finished run",
        )
    version = content.get("schema", 1)
    if not isinstance(version, int) or version > SCHEMA:
        raise Refused(
            f"must have a schema of at most {SCHEMA}",
            value=version,
            place="record.json",
            fix="read it with the version of Penjing that wrote it, or a newer one",
            code=Exit.ENVIRONMENT,
        )
