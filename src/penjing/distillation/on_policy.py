"""Distillation of decoders on texts that the student continues itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.kind import IGNORED_TARGET
from penjing.core.method import Outcome
from penjing.core.registry import handles
from penjing.train.method import DistillationMethod
from penjing.train.objective import Tensors, make_objective
from penjing.train.outcome import train_by_method
from penjing.train.teacher import Teacher, freeze_teacher, list_teachers, wrap_context

if TYPE_CHECKING:
    from torch import Tensor, nn


class DistillOnPolicy(DistillationMethod):
    """Train a causal decoder towards a teacher's next tokens, partly on its own continuations.

    A student that only sees the texts of the data meets its own mistakes first when it is used. Here a share
    of the batches keeps the beginnings of the examples only: the student draws the rest, and the teacher says
    at every position what should have come next (Agarwal et al., "On-policy distillation of language models:
    learning from self-generated mistakes", ICLR 2024, "GKD"). No gradient goes through the drawing. The loss
    is `alpha` of the generalized Jensen-Shannon divergence, the mean over the positions behind the prompt;
    on batches of the data the rest is the task's own, and positions whose label is -100 are left out.

    Models take token ids `[n, t]` and give logits `[n, t, vocabulary]`; prompts hold no padding. `sam`
    cannot be used.

    Attributes:
        on_policy: share of the batches that the student continues, in [0, 1]; drawn for each
            micro-batch.
        prompt: tokens of each example that are kept, at least 1 and fewer than an example has.
        beta: of the divergence, in [0, 1]; 0: forward Kullback-Leibler, 1: reverse; between them it is
            smaller, at most log 2.
        sampling_temperature: of the softmax that tokens are drawn from; losses are at temperature 1.
        end: id of the token that ends a text; what is behind it does not count. None: there is none.
        alpha: share of the teacher's loss, above 0; at 1 labels are not used.

    >>> DistillOnPolicy(epochs=2, prompt=8, beta=1)
    DistillOnPolicy(epochs=2.0, prompt=8, beta=1.0)
    """

    unsupported: ClassVar[Mapping[str, str]] = {
        "sam": "where both gradients of a step would see texts of their own"
    }
    on_policy: float = Field(default=0.5, ge=0, le=1)
    prompt: int = Field(default=1, ge=1)
    beta: float = Field(default=0.5, ge=0, le=1)
    sampling_temperature: float = Field(default=1.0, gt=0, le=1000)
    end: int | None = Field(default=None, ge=0)
    alpha: float = Field(default=1.0, gt=0, le=1)


@handles(DistillOnPolicy, "torch")
def distill_on_policy(model: nn.Module, method: DistillOnPolicy, context: Context) -> Outcome:
    """Train a torch module; one change for the model, with the number of batches that it continued.

    Raises:
        Refused: inputs that are not one array of token ids longer than the prompt, outputs that are not
            logits of every token, a vocabulary that the teacher does not share or that lacks `end`, a model
            that sees tokens ahead, or what `penjing.train.loop.fit` refuses.
    """
    from penjing.backends.torch.distill.continuation import OnPolicyStudent, Sampling, mask_predictions
    from penjing.backends.torch.distill.distillation import generalized_divergence

    sampling = Sampling(method.on_policy, method.prompt, method.sampling_temperature, method.end)
    hard = make_objective(context.task, method.strategy.label_smoothing)
    with freeze_teacher(context, method.strategy.precision) as teacher:
        _check(model, method, context)
        student = OnPolicyStudent(model, sampling)

        def objective(outputs: Any, inputs: Tensors, targets: Tensor) -> Tensor:
            logits = outputs.float()
            wanted = _mean_logits(teacher, teacher((student.ids,)))
            counts = mask_predictions(student.ids, sampling)
            if not student.sampled:
                counts = counts & _labelled(targets, counts)
            if not counts.any():
                empty: Tensor = logits.sum() * 0.0
                return empty
            loss = method.alpha * generalized_divergence(logits[counts], wanted[counts], method.beta)
            if method.alpha == 1 or student.sampled:
                return loss
            return loss + (1 - method.alpha) * hard(outputs, inputs, targets)

        outcome = train_by_method(student, method, wrap_context(context, model, "student"), objective)
    sampled = {"continued_batches": student.batches}
    changes = [change.model_copy(update={"detail": change.detail | sampled}) for change in outcome.changes]
    return Outcome(model, changes)


def _mean_logits(teacher: Teacher, logits: Tensor) -> Tensor:
    """Return logits `[n, t, vocabulary]` of the teachers' weighted mean distribution."""
    from penjing.backends.torch.distill.distillation import softened_mean

    if logits.shape[1] == 1:
        return logits[:, 0]
    return softened_mean(logits, logits.new_tensor(teacher.weights), 1.0)


def _labelled(targets: Tensor, like: Tensor) -> Tensor:
    """Return where there is a target, `[n, t]`; everywhere if targets are no labels of positions."""
    if targets.is_floating_point() or targets.ndim != 2:
        return like | True
    if targets.shape != like.shape:
        raise Refused(
            "each position of the outputs must have a label",
            place="task.train",
            value=f"tokens {list(like.shape)}, labels {list(targets.shape)}",
            fix="give labels of the outputs' positions, -100 where none counts",
        )
    return targets != IGNORED_TARGET


def _check(model: nn.Module, method: DistillOnPolicy, context: Context) -> None:
    """Refuse before training what cannot be continued or compared."""
    from penjing.backends.torch.distill.continuation import sees_future
    from penjing.backends.torch.tensors import to_inputs

    example = context.task.valid.example()
    ids, given = example[0], ", ".join(f"{x.dtype}{list(x.shape)}" for x in example)
    if len(example) != 1 or ids.dtype.kind not in "iu" or ids.ndim != 2 or ids.shape[1] <= method.prompt:
        raise Refused(
            "an example must be one row of token ids, longer than the prompt",
            value=given,
            place=f"DistillOnPolicy.prompt={method.prompt}",
            fix="pack texts to rows of one length without padding or masks",
        )
    networks = [("student", model), *(("teacher", other) for other in list_teachers(context))]
    shapes = {}
    for whose, network in networks:
        context.backend.check(network, (ids[:, : method.prompt],))
        shapes[whose] = context.backend.run(network, (ids,)).shape
    if shapes["student"] != shapes["teacher"] or shapes["student"][:-1] != ids.shape:
        words = ", ".join(f"{whose} {list(shape)}" for whose, shape in shapes.items())
        raise Refused(
            "student and teacher must give logits [n, t, vocabulary] of one vocabulary",
            value=words,
            place="teacher",
            fix="take models with one tokenizer",
        )
    vocabulary = shapes["student"][-1]
    if method.end is not None and method.end >= vocabulary:
        raise Refused(
            "must be a token of the vocabulary",
            value=f"{method.end} of {vocabulary}",
            place="DistillOnPolicy.end",
            fix=f"give the id of a token, 0 to {vocabulary - 1}, or leave it out",
        )
    for whose, network in networks:
        if sees_future(network, to_inputs(network, (ids,))[0], method.prompt):
            raise Refused(
                "must be causal",
                place=whose,
                value="logits that depend on later tokens",
                fix="give causal decoders, or use Distill",
            )
