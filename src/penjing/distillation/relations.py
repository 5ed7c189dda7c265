"""Distillation from how the tokens of a transformer relate to each other in its attention."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from penjing.arrays.distillation import uniform_mapping
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.method import Outcome
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

    from penjing.backends.torch.observe.attention_calls import Attending, Attention

KINDS = ("query", "key", "value")


class DistillRelations(DistillationMethod):
    """Train towards how the tokens of a teacher relate to each other in its attention, and its outputs.

    Attention is seen where torch computes it, whatever the modules are called. The loss is `beta` times that
    of the relations, `alpha` of Hinton's on standardized logits, and the rest of the task's own. Keys that a
    mask hides from all queries are left out. Layers are counted in every pass: `stochastic_depth`
    cannot be used.

    Attributes:
        relation: `self`: the softmax over tokens of the scaled products of the queries of one layer with
            themselves, the same of keys and of values, by divergence; it has no width, so that neither widths
            nor heads of the two networks need agree, and one layer is enough (Wang et al. 2021, "MiniLMv2").
            `scores`: the products of queries and keys before the softmax, head by head, by squared
            difference, the mean over layers (Jiao et al. 2020, "TinyBERT"); heads agree in number.
        student_layer, teacher_layer: which call of attention in a pass, from 0, or from -1 backwards; None:
            the last, and for `scores` with neither given all of the student, the i-th of m beside the
            teacher's i n / m-th of n, rounded up.
        heads: relation heads that widths are divided into; None: the teacher's attention heads. `scores` have
            the attention's.
        beta: weight of the relations, above 0.
        alpha: share of the teacher's outputs in the rest of the loss, in [0, 1]; None: there is no rest,
            relations alone teach.
        temperature: softens both distributions of outputs, above 0.

    >>> DistillRelations(epochs=2, heads=12)
    DistillRelations(epochs=2.0, heads=12)
    """

    unsupported: ClassVar[Mapping[str, str]] = {
        "stochastic_depth": "where calls of attention are counted in every pass"
    }

    relation: Literal["self", "scores"] = "self"
    student_layer: int | None = None
    teacher_layer: int | None = None
    heads: int | None = Field(default=None, ge=1)
    beta: float = Field(default=1.0, gt=0, le=1e6)
    alpha: float | None = Field(default=0.9, ge=0, le=1)
    temperature: float = Field(default=2.0, gt=0, le=1000)

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.heads is not None and self.relation == "scores":
            raise ValueError("heads cannot be given for relation 'scores'; leave it out")
        return self


@handles(DistillRelations, "torch")
def distill_relations(model: nn.Module, method: DistillRelations, context: Context) -> Outcome:
    """Train a torch module; one change for the model, which names the layers.

    Raises:
        Refused: several teachers, a network without such attention or layer, other numbers of tokens, widths
            that the heads do not divide, for `scores` other numbers of heads, or what
            `penjing.train.loop.fit` refuses.
    """
    from penjing.backends.torch.observe.attention_calls import Attending

    refuse_several_teachers(context)
    task, student = context.task, Attending(model)
    with freeze_teacher(context, method.strategy.precision) as teacher:
        teacher.module = attending = Attending(teacher.module).eval()
        pairs = _pairs(student, attending, method, context)
        for mine, its in pairs:
            _check(student.calls[mine], attending.calls[its], method)
        compare = _scores if method.relation == "scores" else partial(_relations, method.heads)
        match = make_matching_loss(DistillationConfig(method.temperature), teacher, context)
        hard = make_objective(task, method.strategy.label_smoothing)

        def objective(outputs: Any, inputs: Tensors, targets: Tensor) -> Tensor:
            logits = teacher(inputs)
            found = [compare(student.calls[mine], attending.calls[its]) for mine, its in pairs]
            loss = method.beta * sum(found[1:], found[0]) / len(found)
            if method.alpha is None:
                return loss
            loss = loss + method.alpha * match(pick(outputs, task.output), logits, targets)
            return loss if method.alpha == 1 else loss + (1 - method.alpha) * hard(outputs, inputs, targets)

        outcome = train_by_method(student, method, wrap_context(context, model, "student"), objective)
    layers = {"layers": ", ".join(f"{mine} to {its}" for mine, its in pairs)}
    changes = [change.model_copy(update={"detail": change.detail | layers}) for change in outcome.changes]
    return Outcome(model, changes)


def _relations(heads: int | None, student: Attention, teacher: Attention) -> Tensor:
    from penjing.backends.torch.distill.feature_losses import relation_loss

    device = student.query.device
    seen = None if teacher.seen is None else teacher.seen.to(device)
    pairs = [(getattr(student, kind), getattr(teacher, kind).to(device)) for kind in KINDS]
    found = [relation_loss(mine.float(), its.float(), heads or teacher.heads, seen) for mine, its in pairs]
    return sum(found[1:], found[0])


def _scores(student: Attention, teacher: Attention) -> Tensor:
    from penjing.backends.torch.distill.feature_losses import attention_scores, score_loss

    device = student.query.device
    seen = None if teacher.pairs is None else teacher.pairs.to(device)
    mine, its = (
        attention_scores(call.query.to(device).float(), call.key.to(device).float(), call.heads, call.scale)
        for call in (student, teacher)
    )
    return score_loss(mine, its, seen)


def _pairs(
    student: Attending, teacher: Attending, method: DistillRelations, context: Context
) -> list[tuple[int, int]]:
    """Return which calls of attention belong together, after an example went through both networks."""
    import torch

    from penjing.backends.torch.tensors import evaluating, to_inputs

    counts = []
    for network, layer, whose in (
        (student, method.student_layer, "student"),
        (teacher, method.teacher_layer, "teacher"),
    ):
        with evaluating(network), torch.no_grad():
            network(*to_inputs(network, context.task.valid.example()))
        count, layer = len(network.calls), -1 if layer is None else layer
        if not -count <= layer < count:
            raise Refused(
                "must be one of the model's calls of scaled_dot_product_attention",
                place=f"DistillRelations.{whose}_layer",
                value=f"{layer} of {count}",
                fix="choose another; attention that is computed otherwise (nn.MultiheadAttention, "
                "attn_implementation='eager') cannot be watched",
            )
        counts.append((layer % count, count))
    if method.relation == "scores" and method.student_layer is None and method.teacher_layer is None:
        return list(enumerate(uniform_mapping(counts[0][1], counts[1][1])))
    return [(counts[0][0], counts[1][0])]


def _check(student: Attention, teacher: Attention, method: DistillRelations) -> None:
    """Refuse two calls of attention that cannot be compared."""
    tokens = student.query.shape[1], teacher.query.shape[1]
    if tokens[0] != tokens[1]:
        raise Refused(
            "student and teacher must see one number of tokens",
            place="DistillRelations",
            value=f"{tokens[0]} beside {tokens[1]}",
            fix="use Distill, which looks at outputs only",
        )
    if method.relation == "scores":
        if student.heads != teacher.heads:
            raise Refused(
                "layers whose scores are compared must have one number of heads",
                value=f"student {student.heads}, teacher {teacher.heads}",
                place="DistillRelations",
                fix="relation='self' needs no equal heads",
            )
        return
    heads = method.heads or teacher.heads
    for kind in KINDS:
        widths = [getattr(attention, kind).shape[2] for attention in (student, teacher)]
        if widths[0] % heads or widths[1] % heads:
            raise Refused(
                "must divide both widths",
                place="DistillRelations.heads",
                value=f"{heads} heads, {kind} of {widths[0]} and {widths[1]}",
                fix="choose a common divisor",
            )
