"""The base of every saved value, and the name of a model's type."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict

Model = Any
"""A model of any framework; the backend that fits is found from its class."""


class Value(BaseModel):
    """Base of every saved value: frozen, compared by content, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        return ((k, v) for k, v in super().__repr_args__() if k is None or v != self._default(k))

    def _default(self, field: str) -> object:
        info = type(self).model_fields.get(field)
        return object() if info is None or info.is_required() else info.get_default(call_default_factory=True)
