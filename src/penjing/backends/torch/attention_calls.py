"""Queries, keys and values of the attention of a network, seen where torch computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

HIDDEN = -1e4
"""A number added to a product hides its key if it is at most this."""


@dataclass(frozen=True)
class Attention:
    """One call: tensors `[n, tokens, width]`, their heads side by side.

    Attributes:
        query, key, value: with their gradients' history where the pass has one.
        heads: of the queries.
        seen: `[n, tokens]`, False for keys that no query sees; None where there is no mask.
    """

    query: Any
    key: Any
    value: Any
    heads: int
    seen: Any


class AttentionCalls(TorchFunctionMode):  # type: ignore[misc]
    """While it is entered, `calls` collects the self-attention that torch computes in one function."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Attention] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the arguments of attention and go on."""
        kwargs = kwargs or {}
        if function is scaled_dot_product_attention:
            self._note(*args, **kwargs)
        return function(*args, **kwargs)

    def _note(self, query: Any, key: Any, value: Any, attn_mask: Any = None, *rest: Any, **more: Any) -> None:
        if query.ndim != 4 or query.shape[2] != key.shape[2]:
            return
        q, k, v = (x.transpose(1, 2).flatten(2) for x in (query, key, value))
        self.calls.append(Attention(q, k, v, query.shape[1], _seen(attn_mask, query)))


def _seen(mask: Any, query: Any) -> Any:
    if mask is None:
        return None
    shows = mask if mask.dtype == torch.bool else mask > HIDDEN
    n, heads, tokens, _ = query.shape
    return shows.expand(n, heads, tokens, tokens).any(dim=2).any(dim=1)


class Attending(nn.Module):  # type: ignore[misc]
    """A network whose attention of the last pass is kept in `calls`; it returns the network's outputs."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.calls: list[Attention] = []

    def forward(self, *inputs: Any) -> Any:
        """Return the network's outputs."""
        with AttentionCalls() as watch:
            outputs = self.student(*inputs)
        self.calls = watch.calls
        return outputs
