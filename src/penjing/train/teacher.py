"""The original model as a teacher: the objective of distillation from outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.plan import digest
from penjing.core.task import Split
from penjing.train.augment import changes_inputs
from penjing.train.matching import Matching, Name
from penjing.train.numerics import Numerics, numerics_for
from penjing.train.objective import Objective, Tensors, pick, task_objective
from penjing.train.recall import asking, fixed, known_outputs, recalling
from penjing.train.strategy import Strategy


@dataclass(frozen=True)
class Teaching:
    """How the original teaches.

    Attributes:
        temperature: softens both distributions, above 0.
        alpha: share of the teacher's loss in [0, 1]; the rest is the task's own.
        standardize: whether logits are standardized row by row first.
        precision: in which the teacher computes.
        loss: by which outputs are compared (`penjing.train.matching`).
        parts: weights of the two parts of `dkd` and `dist`.
        rise: share of the training in which the teacher's loss rises to its weight, from 0.
        cache: whether outputs on data that do not change are kept on disk, for the next training.
        live: whether the training changes its inputs, so that the teacher has to see every batch.
        smoothing: share of each label that the task's own loss spreads over all classes.
    """

    temperature: float = 2.0
    alpha: float = 0.9
    standardize: bool = True
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    loss: Name = "logits"
    parts: tuple[float, float] = (1.0, 1.0)
    rise: float = 0.0
    cache: bool = False
    live: bool = False
    smoothing: float = 0.0

    @classmethod
    def by(cls, strategy: Strategy, **how: Any) -> Teaching:
        """Return how the original teaches in a training by a strategy."""
        live, smoothing = changes_inputs(strategy), strategy.label_smoothing
        return cls(precision=strategy.precision, live=live, smoothing=smoothing, **how)


class Taught(Strategy):
    """What trains towards a teacher: the model before the plan, or one given; abstract, it has no handler."""


class Progress:
    """How much of the training lies behind; `stepped` is a hook of the training loop."""

    def __init__(self) -> None:
        self.share = 0.0

    def stepped(self, progress: float) -> None:
        """Note the share of the training that lies behind, in [0, 1)."""
        self.share = progress


class Teacher:
    """A module that only runs: one model, or a committee of several."""

    def __init__(self, module: Any, output: Any, numerics: Numerics) -> None:
        self.module, self.numerics = module, numerics
        self.weights: tuple[float, ...] = getattr(module, "weights", (1.0,)) if _several(module) else (1.0,)
        self._output = output

    def __call__(self, inputs: Tensors) -> Any:
        """Return the outputs in float32, `[n, teachers, ...]`, on the device of the inputs."""
        import torch

        own = self._own(inputs)
        with torch.no_grad(), self.numerics.autocast():
            outputs = self.module(*self.numerics.lay_out(own))
        told = outputs if _several(self.module) else pick(outputs, self._output).unsqueeze(1)
        return told.to(inputs[0].device)

    def _own(self, inputs: Tensors) -> Tensors:
        """Return inputs on the teacher's device; floating ones in its type."""
        like = next(iter(self.module.parameters()), None)
        if like is None:
            return inputs
        return tuple(x.to(like.device, like.dtype if x.is_floating_point() else None) for x in inputs)


def _several(module: Any) -> bool:
    from penjing.backends.torch.distill.committee import Committee

    return isinstance(module, Committee)


@contextmanager
def resting(context: Context, precision: Literal["auto", "float32", "bfloat16"]) -> Iterator[Teacher]:
    """Yield a copy of `context.original` as a teacher, frozen and in evaluation mode."""
    module = context.backend.copy(context.original).requires_grad_(False).eval()
    numerics = numerics_for(module, precision)
    with numerics.applied(module):
        yield Teacher(module, context.task.output, numerics)


def alone(context: Context) -> None:
    """Refuse several teachers, for methods that look at one teacher's layers."""
    if _several(context.original):
        raise Refused(
            "one teacher's layers are looked at",
            value=f"{len(teachers_of(context))} teachers",
            place="teacher",
            fix="use Distill, or chain two calls",
        )


def teachers_of(context: Context) -> list[Any]:
    """Return the models that teach, at least one."""
    original = context.original
    return list(original.models) if _several(original) else [original]


def layers_below(context: Context, model: Any, name: str) -> Context:
    """Return the context of a module that holds the model under a name; what is beside it may be touched.

    Raises:
        Refused: the context covers no layer of the model.
    """
    covers = context.covers
    if not any(covers(parameter.rpartition(".")[0]) for parameter, _ in model.named_parameters()):
        raise Refused(
            "at least one parameter can train",
            value="no layer is covered",
            place="only",
            fix="list the layer names with `penjing inspect`",
        )

    def below(layer: str) -> bool:
        return not f"{layer}.".startswith(f"{name}.") or covers(layer[len(name) + 1 :])

    return replace(context, covers=below)


@contextmanager
def taught(
    context: Context, how: Teaching, progress: Progress | None = None
) -> Iterator[tuple[Split, Objective]]:
    """Yield what to train on, and the objective that draws a model towards `context.original`.

    The loss is `alpha` of that between the outputs of the two and the rest of the task's own. The original
    never changes.

    Args:
        context: its original teaches.
        how: it does.
        progress: of the training, told by its hook; without it the teacher's loss has its weight at once.

    Raises:
        Refused: when called, outputs that the loss cannot compare.
    """
    with resting(context, how.precision) as teacher:
        task = context.task
        hard, match = task_objective(task, how.smoothing), matching(how, teacher, task.loss)
        if how.live:
            split, recall = asking(task.train, teacher)
        else:
            split, recall = recalling(task.train, teacher, _table(context, teacher) if how.cache else None)

        def objective(outputs: Any, inputs: Tensors, targets: Any) -> Any:
            labels, told = recall(inputs, targets)
            share = how.alpha * rising(progress, how.rise)
            loss = share * match(pick(outputs, task.output), told, labels)
            return loss if how.alpha == 1 else loss + (1 - how.alpha) * hard(outputs, inputs, labels)

        yield split, objective


def _table(context: Context, teacher: Teacher) -> Any:
    """Return the teacher's outputs of all training examples through the disk; None where that cannot be."""
    task = context.task
    if not fixed(task.train) or len(task.train) == 0 or callable(task.output):
        return None
    parts = (context.backend.fingerprint(context.original), task.train.fingerprint(), repr(task.output))
    return known_outputs(task.train, teacher, digest([*parts, str(teacher.numerics)]), context.notes)


def matching(how: Teaching, teacher: Teacher, loss: Any) -> Matching:
    """Return how a student's outputs are compared with a teacher's; `loss` is the task's own."""
    return Matching(
        how.loss,
        how.temperature,
        how.standardize,
        how.parts,
        teacher.weights,
        classes_first=loss == "cross_entropy",
    )


def rising(progress: Progress | None, rise: float) -> float:
    """Return the weight in [0, 1] of a loss that rises over a share of the training.

    >>> rising(Progress(), 0.5), rising(None, 0.5), rising(Progress(), 0.0)
    (0.0, 1.0, 1.0)
    """
    return 1.0 if progress is None or rise == 0 else min(1.0, progress.share / rise)
