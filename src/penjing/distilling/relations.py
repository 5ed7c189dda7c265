"""Distillation from how the tokens of a transformer relate to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.method import Model, Outcome, handles
from penjing.train.objective import pick, task_objective
from penjing.train.outcome import trained
from penjing.train.teacher import Taught, Teaching, alone, layers_below, matching, resting

if TYPE_CHECKING:
    from penjing.backends.torch.attention_calls import Attention

KINDS = ("query", "key", "value")


class DistillRelations(Taught):
    """Train towards the relations of queries, keys and values in one layer of a teacher, and its outputs.

    A relation is the softmax over tokens of the scaled products of the queries (or keys, or values) of one
    layer with themselves; it has no width, so that neither widths nor heads of the two networks need agree,
    and one layer is enough (Wang et al. 2021, "MiniLMv2"). The loss is `beta` times the sum of the three
    divergences, `alpha` of Hinton's on standardized logits, and the rest of the task's own. Keys that a mask
    hides from all queries are left out.

    Attributes:
        student_layer, teacher_layer: which call of attention in a pass, from 0, or from -1 backwards.
        heads: relation heads that widths are divided into; None: the teacher's attention heads.
        beta: weight of the relations, above 0.
        alpha: share of the teacher's outputs in the rest of the loss, in [0, 1]; None: there is no rest,
            relations alone teach.
        temperature: softens both distributions of outputs.
    """

    student_layer: int = -1
    teacher_layer: int = -1
    heads: int | None = Field(default=None, ge=1)
    beta: float = Field(default=1.0, gt=0, le=1e6)
    alpha: float | None = Field(default=0.9, ge=0, le=1)
    temperature: float = Field(default=2.0, gt=0, le=1000)


@handles(DistillRelations, "torch")
def distill_relations(model: Model, method: DistillRelations, context: Context) -> Outcome:
    """Train a torch module.

    Raises:
        Refused: several teachers, a network without such attention or layer, other numbers of tokens, widths
            that the heads do not divide, or what `penjing.train.loop.fit` refuses.
    """
    from penjing.backends.torch.attention_calls import Attending

    alone(context)
    task, student = context.task, Attending(model)
    with resting(context, method.precision) as teacher:
        teacher.module = Attending(teacher.module).eval()
        heads = _checked(student, teacher.module, method, context)
        match = matching(Teaching(method.temperature), teacher, task.loss)
        hard = task_objective(task, method.label_smoothing)

        def objective(outputs: Any, inputs: Any, targets: Any) -> Any:
            logits = teacher(inputs)
            pair = student.calls[method.student_layer], teacher.module.calls[method.teacher_layer]
            loss = method.beta * _relations(*pair, heads)
            if method.alpha is None:
                return loss
            loss = loss + method.alpha * match(pick(outputs, task.output), logits, targets)
            return loss if method.alpha == 1 else loss + (1 - method.alpha) * hard(outputs, inputs, targets)

        outcome = trained(student, method, layers_below(context, model, "student"), objective)
    return Outcome(model, outcome.changes)


def _relations(student: Attention, teacher: Attention, heads: int) -> Any:
    from penjing.backends.torch.feature_losses import relation_loss

    device = student.query.device
    seen = None if teacher.seen is None else teacher.seen.to(device)
    pairs = [(getattr(student, kind), getattr(teacher, kind).to(device)) for kind in KINDS]
    return sum(relation_loss(mine.float(), its.float(), heads, seen) for mine, its in pairs)


def _checked(student: Any, teacher: Any, method: DistillRelations, context: Context) -> int:
    """Return the number of relation heads, after an example went through both networks."""
    import torch

    from penjing.backends.torch.tensors import evaluating, to_inputs

    example, found = context.task.valid.example(), []
    for network, layer, whose in (
        (student, method.student_layer, "student"), (teacher, method.teacher_layer, "teacher"),
    ):  # fmt: skip
        with evaluating(network), torch.no_grad():
            network(*to_inputs(network, example))
        if not -len(network.calls) <= layer < len(network.calls):
            raise Refused("the layer of attention is there", place=f"{whose}_layer",
                          value=f"{layer} of {len(network.calls)} calls of scaled_dot_product_attention",
                          fix="choose another; attention that is computed otherwise (nn.MultiheadAttention, "
                          "attn_implementation='eager') cannot be watched")  # fmt: skip
        found.append(network.calls[layer])
    heads = method.heads or found[1].heads
    for kind in KINDS:
        mine, its = (getattr(attention, kind).shape[1:] for attention in found)
        if mine[0] != its[0]:
            raise Refused("student and teacher see one number of tokens", place="DistillRelations",
                          value=f"{mine[0]} beside {its[0]}")  # fmt: skip
        if mine[1] % heads or its[1] % heads:
            raise Refused("the heads divide both widths", place="DistillRelations.heads",
                          value=f"{heads} heads, {kind} of {mine[1]} and {its[1]}",
                          fix="choose a common divisor")  # fmt: skip
    return int(heads)
