"""The original model as a teacher: the objective of distillation from outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.kind import KINDS, Kind, find_kind
from penjing.core.plan import digest
from penjing.core.task import Split
from penjing.train.augment import changes_inputs
from penjing.train.matching import LossName, MatchingLoss, choose_loss
from penjing.train.numerics import Numerics, numerics_for
from penjing.train.objective import Objective, Tensors, make_objective, pick, to_tensors
from penjing.train.strategy import Strategy
from penjing.train.teacher_outputs import is_fixed, load_outputs, query_outputs, remember_outputs

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn


KIND_EXAMPLES = 256
"""Examples whose targets tell what the outputs are."""

RUN_EXAMPLES = 8
"""Of these, examples that the teacher runs on, for the shape of its outputs."""


@dataclass(frozen=True)
class DistillationConfig:
    """How the original teaches.

    Attributes:
        temperature: softens both distributions, above 0.
        alpha: share of the teacher's loss in [0, 1]; the rest is the task's own.
        standardize: whether logits are standardized row by row first.
        precision: in which the teacher computes.
        loss: by which outputs are compared (`penjing.train.matching`); `auto`: by what they are.
        balance: weights of the two terms of `dkd` and `dist`.
        loss_warmup: share of the training in which the teacher's loss rises to its weight, from 0.
        cache: whether outputs on data that do not change are kept on disk, for the next training.
        live: whether the training changes its inputs, so that the teacher has to see every batch.
        smoothing: share of each label that the task's own loss spreads over all classes.
    """

    temperature: float = 2.0
    alpha: float = 0.9
    standardize: bool = True
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    loss: LossName = "auto"
    balance: tuple[float, float] = (1.0, 1.0)
    loss_warmup: float = 0.0
    cache: bool = False
    live: bool = False
    smoothing: float = 0.0

    @classmethod
    def for_strategy(cls, strategy: Strategy, **fields: Any) -> DistillationConfig:
        """Return how the original teaches in a training by a strategy.

        >>> DistillationConfig.for_strategy(Strategy(flip=True), alpha=1.0).live
        True
        """
        live, smoothing = changes_inputs(strategy), strategy.label_smoothing
        return cls(precision=strategy.precision, live=live, smoothing=smoothing, **fields)


class TrainingShare:
    """How much of the training lies behind, in [0, 1); `update` is a hook of the training loop."""

    def __init__(self) -> None:
        self.share = 0.0

    def update(self, progress: float) -> None:
        """Note the share of the training that lies behind."""
        self.share = progress


class Teacher:
    """A module that only runs: one model, or an ensemble of several."""

    def __init__(self, module: nn.Module, output: Any, numerics: Numerics) -> None:
        self.module, self.numerics = module, numerics
        self.weights: tuple[float, ...] = getattr(module, "weights", (1.0,)) if _several(module) else (1.0,)
        self._output = output

    def __call__(self, inputs: Tensors) -> Tensor:
        """Return the outputs in float32, `[n, teachers, ...]`, on the device of the inputs."""
        import torch

        own = self._own(inputs)
        with torch.no_grad(), self.numerics.autocast():
            outputs = self.module(*self.numerics.to_layout(own))
        stacked: Tensor = outputs if _several(self.module) else pick(outputs, self._output).unsqueeze(1)
        return stacked.to(inputs[0].device)

    def _own(self, inputs: Tensors) -> Tensors:
        """Return inputs on the teacher's device; floating ones in its type."""
        like = next(iter(self.module.parameters()), None)
        if like is None:
            return inputs
        return tuple(x.to(like.device, like.dtype if x.is_floating_point() else None) for x in inputs)


def _several(module: nn.Module) -> bool:
    from penjing.backends.torch.distill.ensemble import Ensemble

    return isinstance(module, Ensemble)


@contextmanager
def freeze_teacher(context: Context, precision: Literal["auto", "float32", "bfloat16"]) -> Iterator[Teacher]:
    """Yield a copy of `context.original` as a teacher, frozen and in evaluation mode."""
    module = context.backend.copy(context.original).requires_grad_(False).eval()
    numerics = numerics_for(module, precision)
    with numerics.applied(module):
        yield Teacher(module, context.task.output, numerics)


def refuse_several_teachers(context: Context) -> None:
    """Refuse an ensemble, for methods that look at one teacher's layers.

    Raises:
        Refused: see above.
    """
    if _several(context.original):
        raise Refused(
            "must be one model for a method that looks at its layers",
            value=f"{len(list_teachers(context))} teachers",
            place="teacher",
            fix="use Distill, or chain two calls",
        )


def list_teachers(context: Context) -> list[nn.Module]:
    """Return the models that teach, at least one."""
    original = context.original
    return list(original.models) if _several(original) else [original]


def wrap_context(context: Context, model: nn.Module, name: str) -> Context:
    """Return the context of a module that holds the model under a name; what is beside it may be touched.

    Raises:
        Refused: the context covers no layer of the model.
    """
    covers = context.covers
    if not any(covers(parameter.rpartition(".")[0]) for parameter, _ in model.named_parameters()):
        raise Refused(
            "must cover a layer with parameters",
            value="a pattern that covers none",
            place="only",
            fix="list the layer names with `penjing inspect`",
        )

    def covers_below(layer: str) -> bool:
        return not f"{layer}.".startswith(f"{name}.") or covers(layer[len(name) + 1 :])

    return replace(context, covers=covers_below)


@contextmanager
def prepare_distillation(
    context: Context, config: DistillationConfig, progress: TrainingShare | None = None
) -> Iterator[tuple[Split, Objective]]:
    """Yield what to train on, and the objective that draws a model towards `context.original`.

    The loss is `alpha` of that between the outputs of the two and the rest of the task's own. The original
    never changes.

    Args:
        context: its original teaches.
        config: how it does.
        progress: of the training, told by its hook; without it the teacher's loss has its weight at once.

    Raises:
        Refused: when called, outputs that the loss cannot compare.
    """
    with freeze_teacher(context, config.precision) as teacher:
        task = context.task
        hard, match = make_objective(task, config.smoothing), make_matching_loss(config, teacher, context)
        if config.live:
            split, look_up = query_outputs(task.train, teacher)
        else:
            table = _cached_outputs(context, teacher) if config.cache else None
            split, look_up = remember_outputs(task.train, teacher, table)

        def objective(outputs: Any, inputs: Tensors, targets: Tensor) -> Tensor:
            labels, teacher_outputs = look_up(inputs, targets)
            alpha = config.alpha * warm_up(progress, config.loss_warmup)
            loss = alpha * match(pick(outputs, task.output), teacher_outputs, labels)
            return loss if config.alpha == 1 else loss + (1 - config.alpha) * hard(outputs, inputs, labels)

        yield split, objective


def _cached_outputs(context: Context, teacher: Teacher) -> NDArray[Any] | None:
    """Return the teacher's outputs of all training examples through the disk; None where that cannot be."""
    task = context.task
    if not is_fixed(task.train) or len(task.train) == 0 or callable(task.output):
        return None
    parts = (context.backend.fingerprint(context.original), task.train.fingerprint(), repr(task.output))
    return load_outputs(task.train, teacher, digest([*parts, str(teacher.numerics)]), context.notes)


def make_matching_loss(config: DistillationConfig, teacher: Teacher, context: Context) -> MatchingLoss:
    """Return how a student's outputs are compared with a teacher's; a choice of `auto` goes to the notes.

    Raises:
        Refused: a loss that means nothing for what the outputs are, with the shapes of outputs and targets.
    """
    task = context.task
    return MatchingLoss(
        _choose_loss(config.loss, teacher, context),
        config.temperature,
        config.standardize,
        config.balance,
        teacher.weights,
        classes_first=task.loss == "cross_entropy",
    )


def _choose_loss(asked: LossName, teacher: Teacher, context: Context) -> LossName:
    task = context.task
    if task.loss == "cross_entropy":
        return choose_loss(asked, Kind.CLASSES, (), ())
    split = task.train if task.valid is None else task.valid
    batch = next(split.batches(KIND_EXAMPLES), None)
    if batch is None:
        return "mse" if asked == "auto" else asked
    inputs, targets = batch
    first = to_tensors(tuple(x[:RUN_EXAMPLES] for x in inputs), next(iter(teacher.module.parameters()), None))
    outputs = teacher(first)
    shape = (len(targets), *outputs.shape[2:])
    kind = find_kind(task.loss, shape, targets)
    chosen = choose_loss(asked, kind, shape, targets.shape)
    if asked == "auto" and kind is Kind.LABELS and task.loss not in KINDS and _probabilities(outputs):
        chosen = "mse"
    if asked == "auto":
        events = context.notes.setdefault("events", [])
        events.append(f"distillation: the outputs are {kind}, compared by {chosen!r}")
    return chosen


def _probabilities(outputs: Tensor) -> bool:
    return bool(((outputs >= 0) & (outputs <= 1)).all())


def warm_up(progress: TrainingShare | None, share: float) -> float:
    """Return the weight in [0, 1] of a loss that rises linearly over a share of the training.

    >>> warm_up(TrainingShare(), 0.5), warm_up(None, 0.5), warm_up(TrainingShare(), 0.0)
    (0.0, 1.0, 1.0)
    """
    return 1.0 if progress is None or share == 0 else min(1.0, progress.share / share)
