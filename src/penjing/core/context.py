"""What a handler may know beside the model and the method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from penjing.core.progress import Say, silent

if TYPE_CHECKING:
    from penjing.core.backend import Backend
    from penjing.core.task import Task


@dataclass(frozen=True)
class Context:
    """The surroundings of one application of a plan.

    Attributes:
        task: data, loss and metric; `task.train` fits, `task.valid` is for the search.
        backend: the backend of the model that the handler receives.
        original: the model before the plan, never changed (teacher of distillation).
        seed: every random choice derives from it.
        covers: tells whether a layer name may be touched (from `only`).
        say: called with lines of progress, for example once an epoch.
        notes: facts for the record, for example seconds spent in training.
    """

    task: Task
    backend: Backend
    original: Any
    seed: int = 0
    covers: Callable[[str], bool] = field(default=lambda layer: True)
    say: Say = silent
    notes: dict[str, Any] = field(default_factory=dict)
