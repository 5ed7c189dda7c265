"""What was done to a model: remembered beside the model that `apply` returned, for as long as it lives."""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass

from penjing.core.method import Change
from penjing.core.plan import Plan
from penjing.core.value import Model


@dataclass(frozen=True)
class Provenance:
    """The methods that were carried out on a model, in order, and what each did to the layers."""

    plan: Plan = ()
    changes: tuple[Change, ...] = ()


_KNOWN: dict[int, tuple[weakref.ReferenceType[Model], Provenance]] = {}


def remember(model: Model, done: Provenance) -> None:
    """Remember what was done to a model; a copy of it, or one read from a file, is another model."""
    place = id(model)
    with contextlib.suppress(TypeError):  # plain data cannot be referred to weakly, and is no model in memory
        _KNOWN[place] = (weakref.ref(model, lambda _: _KNOWN.pop(place, None)), done)


def provenance_of(model: Model) -> Provenance:
    """Return what was done to a model; nothing where it was not made by `apply` in this process."""
    found = _KNOWN.get(id(model))
    return found[1] if found is not None and found[0]() is model else Provenance()
