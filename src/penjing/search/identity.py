"""What a run was asked: all that its verdict depends on, so that nothing else is taken for the same."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import penjing
from penjing.core.backend import Backend
from penjing.core.budget import Budget
from penjing.core.content import digest_content
from penjing.core.errors import Exit, Refused
from penjing.core.plan import digest
from penjing.core.target import Target
from penjing.core.task import Task
from penjing.core.value import Model, Value
from penjing.planners.bisection import Bisection
from penjing.run.folder import RunFolder, read_config, write_config

SPLITS = ("train", "valid", "test")
_FOUND = ("notes", "prepared")
_SHORT = (str, int, float, bool, type(None))


class Identity(Value):
    """The question of a run.

    Attributes:
        parts: by name, as plain data; callables and objects as their name and a digest of their content.
        unknown: names of parts whose content could not be read as a whole, with what could not.
    """

    parts: dict[str, Any]
    unknown: dict[str, str]

    @property
    def sha256(self) -> str:
        """Digest of all parts."""
        return digest(self.parts)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader of the record should know: changes that a resumed run would not notice."""
        return tuple(
            f"{name} holds what cannot be read ({what}): where that changes, a resumed run does not notice"
            for name, what in self.unknown.items()
        )


@dataclass(frozen=True)
class Question:
    """What is asked of a run: `model` with the output that counts, the rest as it was given."""

    model: Model
    task: Task
    budget: Budget
    target: Target
    seed: int
    planner: Bisection


def identify(question: Question, backend: Backend) -> Identity:
    """Return the identity of a question: model and data by content, everything else by value or content.

    Args:
        question: with a prepared task.
        backend: of the model.
    """
    parts: dict[str, Any] = {
        "model": backend.fingerprint(question.model),
        "data": question.task.fingerprint(),
        "budget": question.budget.model_dump(mode="json"),
        "target": question.target.model_dump(mode="json"),
        "seed": question.seed,
        "planner": question.planner.model_dump(mode="json"),
        "penjing": penjing.__version__,
    }
    unknown = {}
    for field in fields(question.task):
        if field.name in (*SPLITS, *_FOUND):
            continue
        value = getattr(question.task, field.name)
        content = digest_content(value)
        parts[field.name] = value if isinstance(value, _SHORT) else str(content)
        if content.unknown:
            unknown[f"task.{field.name}"] = ", ".join(content.unknown)
    return Identity(parts=parts, unknown=unknown)


def keep_identity(run: RunFolder, config: dict[str, Any], identity: Identity) -> None:
    """Write the configuration of a new run; refuse to resume a run of something else.

    Args:
        run: new, or begun before.
        config: what the command line wants kept besides.
        identity: of what is asked now.

    Raises:
        Refused: the run was started with something else; what differs is named.
    """
    parts = identity.parts
    if not run.config.is_file():
        asked = {name: parts[name] for name in ("budget", "target", "seed")}
        write_config(run, config | asked | {"identity": parts})
        return
    before = read_config(run).get("identity", {})
    changed = sorted(name for name in {*parts, *before} if before.get(name) != parts.get(name))
    if not changed:
        return
    raise Refused(
        "must be resumed with what it was started with",
        value="; ".join(
            f"{name} was {_shorten(before.get(name))}, is {_shorten(parts.get(name))}" for name in changed
        ),
        place=str(run.path),
        fix="give what it was started with, or choose another --out for a new run",
        code=Exit.USAGE,
    )


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}..."
