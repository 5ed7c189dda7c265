"""Queries, keys and values of the attention of a network, seen where torch computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

HIDDEN = -1e4
"""A number added to a product hides its key if it is at most this."""


@dataclass(frozen=True)
class Attention:
    """One call: tensors `[n, tokens, width]`, their heads side by side.

    Attributes:
        query, key, value: with their gradients' history where the pass has one.
        heads: of the queries; keys and values may have fewer.
        scale: factor of the products of queries and keys.
        mask: `[n, heads, tokens, tokens]`, False where a query does not see a key; None where there is none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    heads: int
    scale: float
    mask: Tensor | None

    @property
    def seen(self) -> Tensor | None:
        """Return `[n, tokens]`, False for keys that no query sees; None where there is no mask."""
        return None if self.mask is None else self.mask.any(dim=2).any(dim=1)

    @property
    def pairs(self) -> Tensor | None:
        """Return `[n, heads, tokens, tokens]`, True where a token that is seen sees a key; None: all do."""
        seen = self.seen
        return None if self.mask is None or seen is None else self.mask & seen[:, None, :, None]


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

    def _note(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **more: Any,
    ) -> None:
        if query.ndim != 4 or query.shape[2] != key.shape[2]:
            return
        q, k, v = (x.transpose(1, 2).flatten(2) for x in (query, key, value))
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        mask = _mask(attn_mask, query, is_causal)
        self.calls.append(Attention(q, k, v, query.shape[1], factor, mask))


def _mask(given: Tensor | None, query: Tensor, causal: bool) -> Tensor | None:
    n, heads, tokens, _ = query.shape
    if given is not None:
        shows = given if given.dtype == torch.bool else given > HIDDEN
    elif causal:
        shows = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    else:
        return None
    return shows.expand(n, heads, tokens, tokens)


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
