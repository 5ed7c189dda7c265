"""How far the outputs of a student are from those of its teachers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from penjing.core.errors import Refused
from penjing.core.kind import IGNORED_TARGET, Kind

if TYPE_CHECKING:
    from torch import Tensor

LossName = Literal["auto", "logits", "dkd", "dist", "mse", "ranking", "sigmoid"]
LOSS_NAMES: tuple[LossName, ...] = get_args(LossName)

SIGNS_ONLY = 2
"""So many logits, standardized, are 1 and -1 whatever they were."""

_OTHERWISE = "use Distill(loss='sigmoid') for labels, Distill(loss='mse') for numbers"

FITTING: dict[Kind, tuple[LossName, ...]] = {
    Kind.CLASSES: ("logits", "dkd", "dist", "mse", "ranking", "sigmoid"),
    Kind.LABELS: ("sigmoid", "mse"),
    Kind.VALUES: ("mse", "ranking"),
    Kind.OTHER: ("logits", "dkd", "dist", "mse", "ranking", "sigmoid"),
}
"""Losses that mean something for each kind of outputs, the one that `auto` takes first."""


def choose_loss(asked: LossName, kind: Kind, outputs: tuple[int, ...], targets: tuple[int, ...]) -> LossName:
    """Return the loss by which outputs of a kind are compared.

    A softmax ties outputs together that compete; between independent labels, or numbers, it compares what
    nobody asked for.

    Args:
        asked: a name, or `auto`.
        kind: of the outputs.
        outputs, targets: shapes, for the refusal.

    Raises:
        Refused: a loss that means nothing for the kind, or `auto` for outputs of no kind that is known.

    >>> choose_loss("auto", Kind.LABELS, (32, 20), (32, 20))
    'sigmoid'
    """
    fitting = FITTING[kind]
    shapes = f"outputs {outputs}, targets {targets}"
    if asked == "auto":
        if kind is Kind.OTHER:
            raise Refused(
                "loss 'auto' needs targets that tell what the outputs are",
                value=shapes,
                place="distillation",
                fix="say loss='logits' for classes, 'sigmoid' for labels, 'mse' for numbers",
            )
        return fitting[0]
    if asked not in fitting:
        raise Refused(
            f"loss {asked!r} cannot compare outputs that are {kind}",
            value=shapes,
            place="distillation",
            fix=f"leave loss out, or take {' or '.join(repr(name) for name in fitting)}",
        )
    return asked


@dataclass(frozen=True)
class MatchingLoss:
    """A loss between outputs, as `penjing.arrays.distillation` defines it.

    `logits`: Hinton et al. 2015; `dkd`: Zhao et al. 2022; `dist`: Huang et al. 2022; `mse`: the mean squared
    difference of outputs of any shape; `sigmoid`: the divergence of independent labels, each of its own
    logit, summed over the last axis; `ranking`: listwise, of scores `[n, candidates]` (Cao et al. 2007).
    Several teachers are one whose softened distribution is their weighted mean (for `mse`: whose outputs).

    Attributes:
        loss: its name; `auto` was chosen before (`choose_loss`).
        temperature: above 0; `mse` has none.
        standardize: whether logits of both sides are standardized row by row first; two stay as they are.
        balance: weights of the two terms of `dkd` and `dist`.
        weights: of the teachers.
        classes_first: whether outputs with more than two axes are `[n, classes, ...]`; else the classes are
            on the last axis.

    >>> import torch
    >>> student, teacher = torch.tensor([[2.0, 1.0]]), torch.tensor([[[2.0, 1.0]]])
    >>> MatchingLoss()(student, teacher, torch.tensor([0])).item()
    0.0
    """

    loss: LossName = "logits"
    temperature: float = 2.0
    standardize: bool = True
    balance: tuple[float, float] = (1.0, 1.0)
    weights: tuple[float, ...] = (1.0,)
    classes_first: bool = False

    def __call__(self, student: Tensor, teachers: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over rows.

        A row is an example, or a position of it where the outputs have more than two axes; positions whose
        label is -100 are left out then, as in the task's own loss. `dkd` leaves out all rows with it.

        Args:
            student: outputs `[n, ...]`.
            teachers: their outputs `[n, teachers, ...]`.
            labels: targets of the batch; only `dkd` reads more of them than the positions left out.

        Raises:
            Refused: shapes that differ, or outputs that are not what the loss compares.
        """
        from penjing.backends.torch.distill import distillation as losses

        self._check(student, teachers)
        if student.ndim > 2:
            student, teachers, labels = self._rows(student, teachers, labels)
        if self.loss == "dkd":
            student, teachers, labels = _labelled(student, teachers, labels)
        if len(student) == 0:
            return student.sum() * 0.0
        if self.standardize and not self._elementwise and student.shape[-1] > SIGNS_ONLY:
            student, teachers = losses.standardize(student), losses.standardize(teachers)
        teacher = self._average(teachers)
        if self.loss == "mse":
            return losses.squared_loss(student, teacher)
        if self.loss == "sigmoid":
            return losses.sigmoid_loss(student, teacher, self.temperature)
        if self.loss == "dkd":
            return losses.decoupled_loss(student, teacher, labels, self.balance, self.temperature)
        if self.loss == "dist":
            return losses.correlation_loss(student, teacher, self.balance, self.temperature)
        plain = losses.hinton_loss if self.loss == "logits" else losses.listwise_loss
        return plain(student, teacher, self.temperature)

    def _average(self, teachers: Tensor) -> Tensor:
        from penjing.backends.torch.distill.distillation import softened_labels, softened_mean

        if teachers.shape[1] == 1:
            return teachers[:, 0]
        weights = teachers.new_tensor(self.weights)
        if self.loss == "mse":
            return (teachers.movedim(1, -1) * (weights / weights.sum())).sum(dim=-1)
        mean = softened_labels if self.loss == "sigmoid" else softened_mean
        return mean(teachers, weights, self.temperature)

    @property
    def _elementwise(self) -> bool:
        return self.loss in ("mse", "sigmoid")

    def _check(self, student: Tensor, teachers: Tensor) -> None:
        wanted = (len(teachers), *teachers.shape[2:])
        if tuple(student.shape) != wanted:
            raise Refused(
                "student and teacher must give outputs of one shape",
                place="distillation",
                value=f"student {tuple(student.shape)}, teacher {wanted}",
                fix="give the student as many outputs as the teacher has",
            )
        if self._elementwise:
            return
        classes = student.shape[1 if self.classes_first else -1] if student.ndim > 1 else 1
        if classes < 2:
            raise Refused(
                f"loss {self.loss!r} needs at least two logits for each example",
                value=f"outputs {tuple(student.shape)}",
                place="distillation",
                fix=_OTHERWISE,
            )
        if self.loss == "ranking" and student.ndim != 2:
            raise Refused(
                "loss 'ranking' needs scores [n, candidates]",
                value=f"outputs {tuple(student.shape)}",
                place="distillation",
                fix=_OTHERWISE,
            )

    def _rows(self, student: Tensor, teachers: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return positions as rows: `[m, classes]`, `[m, teachers, classes]` and `[m]`."""
        if self.classes_first:
            student, teachers = student.movedim(1, -1), teachers.movedim(2, -1)
        teachers = teachers.movedim(1, -2)
        places = student.shape[:-1]
        if labels.is_floating_point() or labels.ndim != student.ndim - 1:
            return student.flatten(0, -2), teachers.flatten(0, -3), labels
        if labels.shape != places:
            raise Refused(
                "each position of the outputs must have a label",
                place="task.train",
                value=f"outputs {tuple(student.shape)}, labels {tuple(labels.shape)}",
                fix="give labels of the outputs' positions, -100 where none counts",
            )
        counts = labels != IGNORED_TARGET
        return student[counts], teachers[counts], labels[counts]


def _labelled(student: Tensor, teachers: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    classes = student.shape[-1]
    if labels.is_floating_point() or labels.shape != student.shape[:1]:
        raise Refused(
            "loss 'dkd' needs a class index for every row",
            place="task.train",
            value=f"labels {tuple(labels.shape)} of {labels.dtype}",
            fix="use loss='logits', which needs no labels",
        )
    known = labels != IGNORED_TARGET
    wrong = known & ((labels < 0) | (labels >= classes))
    if bool(wrong.any()):
        raise Refused(
            f"class indices must lie in [0, {classes - 1}]",
            value=int(labels[wrong][0]),
            place="task.train",
            fix="number the classes from 0",
        )
    return student[known], teachers[known], labels[known]
