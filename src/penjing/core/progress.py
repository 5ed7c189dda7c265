"""Progress as values: what kind of news a line is, and its text."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from penjing.core.value import Value


class Kind(StrEnum):
    """What a line of progress is about; how it is shown depends on it, not on its words."""

    PHASE = "phase"
    """A part of the job begins, which may take long: the survey, a trial, the certificate."""

    STEP = "step"
    """What goes on inside the phase: a layer, a block, a file."""

    TRAINING = "training"
    """A pass of training, with its loss or quality."""

    TRIAL = "trial"
    """A plan or a run was tried, and what came of it."""

    NOTE = "note"
    """Something found or decided that stays true."""

    WARNING = "warning"
    """Something that the user may want to change."""


class Line(Value):
    """One line of progress.

    Attributes:
        kind: what it is about.
        text: for people, without an end of line.

    >>> line = Line.training("epoch 1 of 3: loss 0.5").under("Distill")
    >>> print(line.kind, "|", line)
    training | Distill: epoch 1 of 3: loss 0.5
    """

    kind: Kind
    text: str

    @classmethod
    def phase(cls, text: str) -> Line:
        """Return the line that begins a part of the job."""
        return cls(kind=Kind.PHASE, text=text)

    @classmethod
    def step(cls, text: str) -> Line:
        """Return a line on what goes on inside the phase."""
        return cls(kind=Kind.STEP, text=text)

    @classmethod
    def training(cls, text: str) -> Line:
        """Return a line on a pass of training."""
        return cls(kind=Kind.TRAINING, text=text)

    @classmethod
    def trial(cls, text: str) -> Line:
        """Return a line on what came of a trial."""
        return cls(kind=Kind.TRIAL, text=text)

    @classmethod
    def note(cls, text: str) -> Line:
        """Return a line on something found or decided."""
        return cls(kind=Kind.NOTE, text=text)

    @classmethod
    def warning(cls, text: str) -> Line:
        """Return a line on something that the user may want to change."""
        return cls(kind=Kind.WARNING, text=text)

    def under(self, name: str) -> Line:
        """Return the line with the name of what it comes from in front."""
        return Line(kind=self.kind, text=f"{name}: {self.text}")

    def __str__(self) -> str:
        return self.text


Say = Callable[[Line], None]
"""Receives lines of progress as they come; `print` is one."""


def silent(line: Line) -> None:
    """Do nothing with a line: what progress goes to where nobody listens."""
