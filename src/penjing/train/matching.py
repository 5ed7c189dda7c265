"""How far the outputs of a student are from those of its teachers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from penjing.core.errors import Refused
from penjing.train.objective import IGNORED_TARGET

Name = Literal["logits", "dkd", "dist", "mse", "ranking"]
NAMES: tuple[Name, ...] = get_args(Name)

SIGNS_ONLY = 2
"""So many logits, standardized, are 1 and -1 whatever they were."""

_OTHERWISE = (
    "use Distill(loss='mse') for outputs of another kind, or train without a teacher, as FineTune does"
)


@dataclass(frozen=True)
class Matching:
    """A loss between outputs.

    `logits`: Hinton et al. 2015; `dkd`: Zhao et al. 2022; `dist`: Huang et al. 2022; `mse`: the mean squared
    difference of outputs of any shape; `ranking`: listwise, of scores `[n, candidates]` (Cao et al. 2007).
    Several teachers are one whose softened distribution is their weighted mean (for `mse`: whose outputs).

    Attributes:
        loss: its name.
        temperature: above 0; `mse` has none.
        standardize: whether logits of both sides are standardized row by row first; two stay as they are.
        parts: weights of the two parts of `dkd` and `dist`.
        weights: of the teachers.
        classes_first: whether outputs with more than two axes are `[n, classes, ...]`; else the classes are
            on the last axis.
    """

    loss: Name = "logits"
    temperature: float = 2.0
    standardize: bool = True
    parts: tuple[float, float] = (1.0, 1.0)
    weights: tuple[float, ...] = (1.0,)
    classes_first: bool = False

    def __call__(self, student: Any, told: Any, labels: Any) -> Any:
        """Return the mean over rows.

        A row is an example, or a position of it where the outputs have more than two axes; positions whose
        label is -100 are left out then, as in the task's own loss. `dkd` leaves out all rows with it.

        Args:
            student: outputs `[n, ...]`.
            told: the teachers' outputs `[n, teachers, ...]`.
            labels: targets of the batch; only `dkd` reads more of them than the positions left out.

        Raises:
            Refused: shapes that differ, or outputs that are not what the loss compares.
        """
        from penjing.backends.torch.distill import distillation as losses

        self._check(student, told)
        if student.ndim > 2:
            student, told, labels = self._rows(student, told, labels)
        if self.loss == "dkd":
            student, told, labels = _labelled(student, told, labels)
        if len(student) == 0:
            return student.sum() * 0.0
        if self.standardize and self.loss != "mse" and student.shape[-1] > SIGNS_ONLY:
            student, told = losses.standardize(student), losses.standardize(told)
        teacher = self._one(told)
        if self.loss == "mse":
            return losses.squared_loss(student, teacher)
        if self.loss == "dkd":
            return losses.decoupled_loss(student, teacher, labels, self.parts, self.temperature)
        if self.loss == "dist":
            return losses.correlation_loss(student, teacher, self.parts, self.temperature)
        plain = losses.hinton_loss if self.loss == "logits" else losses.listwise_loss
        return plain(student, teacher, self.temperature)

    def _one(self, told: Any) -> Any:
        from penjing.backends.torch.distill.distillation import softened_mean

        if told.shape[1] == 1:
            return told[:, 0]
        weights = told.new_tensor(self.weights)
        if self.loss == "mse":
            return (told.movedim(1, -1) * (weights / weights.sum())).sum(dim=-1)
        return softened_mean(told, weights, self.temperature)

    def _check(self, student: Any, told: Any) -> None:
        taught = (len(told), *told.shape[2:])
        if tuple(student.shape) != taught:
            raise Refused(
                "student and teacher give outputs of one shape",
                place="teacher",
                value=f"student {tuple(student.shape)}, teacher {taught}",
                fix="give the student as many outputs as the teacher has",
            )
        if self.loss == "mse":
            return
        classes = student.shape[1 if self.classes_first else -1] if student.ndim > 1 else 1
        if classes < 2:
            raise Refused(
                "the model gives one row of at least two logits for each example",
                value=f"output shape {tuple(student.shape)}",
                place="teacher",
                fix=_OTHERWISE,
            )
        if self.loss == "ranking" and student.ndim != 2:
            raise Refused(
                "scores to rank are [n, candidates]",
                value=tuple(student.shape),
                place="teacher",
                fix=_OTHERWISE,
            )

    def _rows(self, student: Any, told: Any, labels: Any) -> tuple[Any, Any, Any]:
        """Return positions as rows: `[m, classes]`, `[m, teachers, classes]` and `[m]`."""
        if self.classes_first:
            student, told = student.movedim(1, -1), told.movedim(2, -1)
        told = told.movedim(1, -2)
        places = student.shape[:-1]
        if labels.is_floating_point() or labels.ndim != student.ndim - 1:
            return student.flatten(0, -2), told.flatten(0, -3), labels
        if labels.shape != places:
            raise Refused(
                "each position of the outputs has a label",
                place="task.train",
                value=f"outputs {tuple(student.shape)}, labels {tuple(labels.shape)}",
                fix="give labels of the outputs' positions, -100 where none counts",
            )
        counts = labels != IGNORED_TARGET
        return student[counts], told[counts], labels[counts]


def _labelled(student: Any, told: Any, labels: Any) -> tuple[Any, Any, Any]:
    classes = student.shape[-1]
    if labels.is_floating_point() or labels.shape != student.shape[:1]:
        raise Refused(
            "dkd has a class index for every row",
            place="task.train",
            value=f"labels {tuple(labels.shape)} of {labels.dtype}",
            fix="use loss='logits', which needs no labels",
        )
    known = labels != IGNORED_TARGET
    wrong = known & ((labels < 0) | (labels >= classes))
    if bool(wrong.any()):
        raise Refused(
            f"class indices lie in [0, {classes - 1}]",
            value=int(labels[wrong][0]),
            place="task.train",
            fix="number the classes from 0",
        )
    return student[known], told[known], labels[known]
