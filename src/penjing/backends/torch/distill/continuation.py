"""Texts that a decoder continues itself, in the place of those of the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from penjing.backends.torch.tensors import evaluating, select_output


@dataclass(frozen=True)
class Sampling:
    """How texts are continued.

    Attributes:
        share: of the batches, in [0, 1].
        prompt: tokens of each example that are kept, at least 1.
        temperature: of the softmax that tokens are drawn from, above 0.
        end: token behind which nothing counts; None: there is none.
    """

    share: float
    prompt: int
    temperature: float = 1.0
    end: int | None = None


class OnPolicyStudent(nn.Module):  # type: ignore[misc]
    """A causal decoder that, in training mode, continues a share of the batches itself.

    In evaluation mode it is the decoder. Which batches are continued, and how, comes from torch's generator.

    Attributes:
        ids: tokens `[n, t]` that the decoder saw in the last pass.
        sampled: whether it had made them.
        batches: continued so far.
    """

    def __init__(self, student: nn.Module, how: Sampling) -> None:
        super().__init__()
        self.student, self.how = student, how
        self.ids: Tensor | None = None
        self.sampled, self.batches = False, 0

    def forward(self, ids: Tensor) -> Tensor:
        """Return what the decoder gives for tokens `[n, t]`, or for its own in their place."""
        self.sampled = self.training and float(torch.rand(())) < self.how.share
        if self.sampled:
            ids = continue_texts(self.student, ids, self.how)
            self.batches += 1
        self.ids = ids
        return self.student(ids)


def continue_texts(model: nn.Module, ids: Tensor, how: Sampling) -> Tensor:
    """Return tokens `[n, t]` of which those behind the prompt are drawn from the model, one after another.

    Every token is a pass over all before it: no keys and values are kept, so that any causal module will do.
    The model computes in evaluation mode and without gradients. A model that gives no finite probabilities
    draws nothing: the tokens come back as they were.

    Args:
        model: from tokens `[n, t]` of any length to logits `[n, t, vocabulary]`.
        ids: int64 `[n, t]`; not changed.
        how: `prompt` tokens are kept.

    >>> def decoder(ids):  # always wants token 2 next
    ...     return torch.tensor([-1e4, -1e4, 0.0]).expand(*ids.shape, 3)
    >>> model = nn.Module()
    >>> model.forward = decoder
    >>> continue_texts(model, torch.tensor([[0, 1, 1]]), Sampling(share=1.0, prompt=1))
    tensor([[0, 2, 2]])
    """
    drawn = ids.clone()
    with evaluating(model), torch.no_grad():
        for at in range(how.prompt, ids.shape[1]):
            logits = select_output(model(drawn[:, :at]))[:, -1].float()
            chances = torch.softmax(logits / how.temperature, dim=-1)
            if not bool(chances.isfinite().all()):
                return ids
            drawn[:, at] = torch.multinomial(chances, 1)[:, 0]
    return drawn


def mask_predictions(ids: Tensor, how: Sampling) -> Tensor:
    """Return a mask `[n, t]`: True where the next token continues the prompt; behind an end none does.

    >>> mask_predictions(torch.tensor([[5, 7, 9, 9]]), Sampling(share=1.0, prompt=1, end=9))
    tensor([[ True,  True, False, False]])
    """
    counts = torch.zeros_like(ids, dtype=torch.bool)
    counts[:, how.prompt - 1 : -1] = True
    if how.end is not None:
        counts[:, how.prompt :] &= (ids[:, how.prompt :] == how.end).cumsum(dim=1) == 0
    return counts


def sees_future(model: nn.Module, ids: Tensor, prompt: int) -> bool:
    """Tell whether outputs at the first tokens change with those behind them; the model's mode stays.

    Args:
        model: from tokens `[n, t]` to logits `[n, t, vocabulary]`.
        ids: int64 `[n, t]`, more than `prompt` tokens.
        prompt: first tokens that are looked at, at least 1.
    """
    with evaluating(model), torch.no_grad():
        short, long = (select_output(model(x))[:, :prompt].float() for x in (ids[:, :prompt], ids))
    return not torch.allclose(short, long, rtol=1e-3, atol=1e-3 * float(long.abs().max()))
