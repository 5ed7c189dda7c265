"""Distillation from what layers of a teacher give on the way."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.method import Change, Outcome
from penjing.core.registry import handles
from penjing.train.method import DistillationMethod
from penjing.train.objective import Tensors, make_objective, pick
from penjing.train.outcome import train_by_method
from penjing.train.teacher import (
    DistillationConfig,
    freeze_teacher,
    make_matching_loss,
    refuse_several_teachers,
    wrap_context,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from penjing.backends.torch.observe.taps import Guided, Seen

Relation = Literal["features", "attention", "relational"]
Shape = tuple[int, ...]

BETA: dict[Relation, float] = {"features": 0.3, "attention": 10.0, "relational": 0.1}
"""Weights of the losses, for training as short as a recovery. The papers' (100 times the mean square, 1000,
and 1) keep a small student busy with its layers: on digits it ended below one without a teacher."""

RELATIONAL_WEIGHTS = (25.0, 50.0)
"""Weights of distances and angles, of Park et al. 2019."""


class DistillFeatures(DistillationMethod):
    """Train towards the outputs of a teacher and towards what its layers give on the way.

    The loss is `alpha` of Hinton's on standardized logits, the rest of the task's own, and `beta` times that
    of the features.

    Attributes:
        relation: `features`: squared difference over the squares of the teacher's (Romero et al., ICLR 2015,
            "FitNets"); `attention`: where a layer is active, whatever its channels (Zagoruyko and Komodakis,
            ICLR 2017); `relational`: distances and angles between the examples of a batch (Park et al., CVPR
            2019, "RKD"), at the last pair that is found.
        pairs: layers that belong together, as pairs of a name in the student and one in the teacher; a
            mapping is taken too. Empty: found, the ends of the stages of networks for images, the blocks of
            others.
        projection: of the student's `features` to the teacher's channels, thrown away after the training:
            `auto` where their numbers differ, `always`, or `none`.
        beta: weight of the features, above 0; None: 0.3 for `features`, 10 for `attention`, 0.1 for
            `relational` (of which distances have 25 and angles 50).
        alpha: share of the teacher's outputs in the rest of the loss, in [0, 1]; at 0 only features teach.
        temperature: softens both distributions, above 0.

    >>> DistillFeatures(epochs=2, relation="attention")
    DistillFeatures(epochs=2.0, relation='attention')
    """

    relation: Relation = "features"
    pairs: tuple[tuple[str, str], ...] = ()
    projection: Literal["auto", "always", "none"] = "auto"
    beta: float | None = Field(default=None, gt=0, le=1e6)
    alpha: float = Field(default=0.9, ge=0, le=1)
    temperature: float = Field(default=2.0, gt=0, le=1000)

    @field_validator("pairs", mode="before")
    @classmethod
    def _listed(cls, pairs: Any) -> Any:
        return tuple(pairs.items()) if isinstance(pairs, Mapping) else pairs


@handles(DistillFeatures, "torch")
def distill_features(model: nn.Module, method: DistillFeatures, context: Context) -> Outcome:
    """Train a torch module; one change for the model, which names the pairs.

    Raises:
        Refused: several teachers, unknown layers, none found, shapes that no projection brings together, or
            what `penjing.train.loop.fit` refuses.
    """
    import torch

    from penjing.backends.torch.observe.taps import pair_layers, tapped

    refuse_several_teachers(context)
    example = context.task.valid.example()
    pairs = list(method.pairs) or pair_layers(model, context.original, example)
    if not method.pairs and method.relation == "relational":
        pairs = pairs[-1:]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(context.seed)
        guided = _guided(model, method, context, pairs)
        teacher = stack.enter_context(freeze_teacher(context, method.strategy.precision))
        features = stack.enter_context(tapped(model, [name for name, _ in pairs]))
        teacher_features = stack.enter_context(tapped(teacher.module, [name for _, name in pairs]))
        match = make_matching_loss(DistillationConfig(method.temperature), teacher, context)
        hard = make_objective(context.task, method.strategy.label_smoothing)

        def objective(outputs: Any, inputs: Tensors, targets: Tensor) -> Tensor:
            logits = teacher(inputs)
            loss = _feature_loss(guided, method, pairs, features, teacher_features)
            if method.alpha > 0:
                loss = loss + method.alpha * match(pick(outputs, context.task.output), logits, targets)
            return loss if method.alpha == 1 else loss + (1 - method.alpha) * hard(outputs, inputs, targets)

        outcome = train_by_method(guided, method, wrap_context(context, model, "student"), objective)
    return Outcome(model, [_named(change, pairs) for change in outcome.changes])


def _named(change: Change, pairs: list[tuple[str, str]]) -> Change:
    words = ", ".join(f"{student} to {teacher}" for student, teacher in pairs)
    return change.model_copy(update={"detail": change.detail | {"pairs": words}})


def _feature_loss(
    guided: Guided,
    method: DistillFeatures,
    pairs: list[tuple[str, str]],
    features: Seen,
    teacher_features: Seen,
) -> Tensor:
    """Return the weighted mean loss of the pairs of the pass that just ended."""
    from penjing.backends.torch.distill import feature_losses as losses

    found = []
    for number, (mine, its) in enumerate(pairs):
        given = features[mine]
        wanted = teacher_features[its].to(given.device).float()
        if method.relation == "features":
            found.append(losses.relative_squares(guided.projected(number, given).float(), wanted))
        elif method.relation == "attention":
            found.append(losses.attention_loss(given.float(), wanted))
        else:
            vectors = losses.pool_positions(given.float()), losses.pool_positions(wanted)
            found.append(losses.relational_loss(*vectors, RELATIONAL_WEIGHTS))
    total = sum(found[1:], found[0])
    return (BETA[method.relation] if method.beta is None else method.beta) * total / len(pairs)


def _guided(
    model: nn.Module, method: DistillFeatures, context: Context, pairs: list[tuple[str, str]]
) -> Guided:
    """Return the student with the projections of its pairs, after their shapes were checked."""
    from penjing.backends.torch.observe.taps import Guided, make_projection, read_output_shapes

    example = context.task.valid.example()
    mine = read_output_shapes(model, [name for name, _ in pairs], example, "student")
    its = read_output_shapes(context.original, [name for _, name in pairs], example, "teacher")
    projections = {}
    for number, (student, teacher) in enumerate(pairs):
        shapes = mine[student], its[teacher]
        place = f"student.{student}, teacher.{teacher}"
        if method.relation != "relational":
            _refuse_positions(*shapes, place)
        if method.relation != "features" or (shapes[0] == shapes[1] and method.projection != "always"):
            continue
        if method.projection == "none":
            raise Refused(
                "paired layers must have one shape",
                value=_words(*shapes),
                place=place,
                fix=f"projection='auto' puts {_fitting(*shapes)} between them",
            )
        projections[number] = make_projection(*shapes, next(iter(model.parameters())))
    return Guided(model, projections)


def _refuse_positions(student: Shape, teacher: Shape, place: str) -> None:
    """Refuse features whose positions differ; their channels may."""
    sizes = [shape[1:] if len(shape) > 2 else shape[:-1] for shape in (student, teacher)]
    if sizes[0] == sizes[1] and len(student) == len(teacher) <= 3:
        return
    raise Refused(
        "paired layers must have one number of positions",
        value=_words(student, teacher),
        place=place,
        fix=f"{_fitting(student, teacher)} would fit; pair layers of one size, or use relation='relational'",
    )


def _words(student: Shape, teacher: Shape) -> str:
    return f"student {list(student)}, teacher {list(teacher)}"


def _fitting(student: Shape, teacher: Shape) -> str:
    """Name the projection from one shape to another."""
    if len(student) != len(teacher):
        return "a pooling that gives both the same axes"
    if len(student) < 3:
        return f"a linear layer of {student[-1]} to {teacher[-1]}"
    between = f"{student[0]} to {teacher[0]} channels"
    if student[1:] == teacher[1:]:
        return f"a 1x1 convolution of {between}"
    steps = [a // b for a, b in zip(student[1:], teacher[1:], strict=True) if a % b == 0 and a > b]
    if len(steps) == len(student) - 1 and len(set(steps)) == 1:
        return f"a convolution of {between} with stride {steps[0]}"
    return f"an interpolation to {list(teacher[1:])} and a 1x1 convolution of {between}"
