"""What each step of the main job hands to the next; the ledger keeps the JSON of these values."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from penjing.core.executor import Finished
from penjing.core.measurement import Measurement, Operations
from penjing.core.method import Change
from penjing.core.trial import StepQuality, Trial
from penjing.core.value import Value
from penjing.core.verdict import Certificate
from penjing.planners.candidates import Probed
from penjing.report.record import RecipeRows, RuntimeRow, RuntimeRows

Precision = Literal["float32", "bfloat16"]


class LayerFacts(Value):
    """A layer of the original: its kind and the shapes of its weights by name."""

    name: str
    kind: str
    shapes: dict[str, tuple[int, ...]]


class GroupFacts(Value):
    """Layers of the original whose units go together: how many units, and which layers."""

    name: str
    size: int
    layers: tuple[str, ...]


class Survey(Value):
    """What was found out about the original before anything is tried.

    Attributes:
        backend: its framework.
        fingerprint: digest of structure and weights.
        operations: of one example.
        outputs: length of the last axis of its output.
        frozen: layers that cannot be cut, with the reason.
        blocks: whole blocks that could go.
        eager: whether it was written for PyTorch eager too.
        noise: relative difference of two evaluations of the model in memory.
        spread: of the metric between evaluations, where there is any.
        precision, epoch_seconds: in which training was found faster, and the seconds of one epoch; None
            where the backend does not train.
        seconds: by activity.
        wall: seconds of the whole survey, the start of its process included.
    """

    backend: str
    fingerprint: str
    operations: Operations
    outputs: int
    layers: tuple[LayerFacts, ...]
    groups: tuple[GroupFacts, ...] = ()
    frozen: dict[str, str] = Field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    eager: bool
    noise: float
    spread: float
    notes: tuple[str, ...] = ()
    precision: Precision | None = None
    epoch_seconds: float | None = None
    seconds: dict[str, float]
    wall: float = 0.0

    @property
    def kinds(self) -> dict[str, str]:
        """Kind of each layer, by its name."""
        return {layer.name: layer.kind for layer in self.layers}


class Baselines(Value):
    """The float model in the reference of the target, as a trial of the empty plan, and in eager."""

    trial: Trial
    eager: Measurement | None = None
    notes: tuple[str, ...] = ()


class RuntimeChoice(Value):
    """What the comparison of runtimes found.

    Attributes:
        chosen: label of the target in which the trials run.
        words: what was found, for people.
        rows: for the record, by label.
        trials: the float model in each of them.
        seconds: by activity.
    """

    chosen: str
    words: tuple[str, ...] = ()
    rows: dict[str, RuntimeRow] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    trials: dict[str, Trial] = Field(default_factory=dict)
    seconds: dict[str, float] = Field(default_factory=dict)

    def recorded(self, asked: str) -> RuntimeRows:
        """Return what the record shows of it."""
        return RuntimeRows(asked=asked, chosen=self.chosen, words=list(self.words), rows=self.rows)


class RecipeChoice(Value):
    """What the probe of precision recipes found; no rows where rules decided.

    Attributes:
        words: what was found, for people.
        cached: whether every row came from the cache.
        seconds: by activity.
    """

    words: tuple[str, ...] = ()
    rows: tuple[Probed, ...] = ()
    notes: tuple[str, ...] = ()
    cached: bool = False
    seconds: dict[str, float] = Field(default_factory=dict)

    def recorded(self) -> RecipeRows:
        """Return what the record shows of it."""
        return RecipeRows(words=list(self.words), rows=list(self.rows), cached=self.cached)


class Built(Value):
    """What the process of a candidate returns.

    Attributes:
        operations: of one example of the candidate.
        steps: what each step of the plan left.
        noise: relative difference that the file's outputs may have besides the tolerance.
        notes: facts of the methods.
        seconds: by activity.
    """

    changes: tuple[Change, ...] = ()
    operations: Operations
    steps: tuple[StepQuality, ...] = ()
    noise: float
    notes: dict[str, Any] = Field(default_factory=dict)
    seconds: dict[str, float]


class BuildRow(Value):
    """The ledger's row of a build: how its process ended."""

    finished: Finished


class TrialRow(Value):
    """The ledger's row of a trial."""

    trial: Trial


class Tested(Value):
    """The candidates on the unseen split.

    Attributes:
        certificate: None where nothing was tested.
        certified: index of the fastest certified candidate.
        measurements: by the candidates' keys, with the original in eager and what the ablation needs.
        seconds: by activity.
    """

    certificate: Certificate | None
    certified: int | None
    measurements: dict[str, Measurement]
    seconds: dict[str, float]
