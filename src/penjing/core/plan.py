"""Plans: tuples of methods in a legal order, and how they are written and named."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable
from typing import Any

from penjing.core.errors import Exit, Refused
from penjing.core.method import Method, Only, name_of, stage_of
from penjing.core.registry import method_from_json, method_to_json
from penjing.core.value import Value

Plan = tuple[Method, ...]
"""Methods in a legal order: stages never descend."""


def chain(*parts: Method | Iterable[Method]) -> Plan:
    """Join methods and plans into one plan.

    Raises:
        Refused: something is no method, or a method of an earlier stage follows one of a later stage.

    >>> import penjing as pj
    >>> chain(pj.PruneChannels(ratio=0.5), pj.Int8Static())
    (PruneChannels(ratio=0.5), Int8Static())
    """
    flat: list[Method] = []
    for part in parts:
        flat.extend(part if isinstance(part, Iterable) and not isinstance(part, Value) else [part])
    for method in flat:
        if not isinstance(method, Method):
            raise Refused(
                "a plan must consist of methods",
                value=repr(method)[:80],
                place="chain",
                fix="write for example PruneChannels(ratio=0.5)",
                code=Exit.USAGE,
            )
    for first, second in itertools.pairwise(flat):
        if stage_of(second) < stage_of(first):
            raise Refused(
                "the stages of a plan must not descend",
                value=f"{name_of(second)} ({stage_of(second).name}) after "
                f"{name_of(first)} ({stage_of(first).name})",
                place="chain",
                fix="order the methods STRUCTURE, WEIGHTS, PRECISION, FORM",
                code=Exit.USAGE,
            )
    return tuple(flat)


def only(pattern: str, method: Method) -> Method:
    """Limit a method to some layers.

    Args:
        pattern: names of layers with the wildcards `*` and `?`, several with `|` between them. A name behind
            `!` is left out: `only("!head", method)` takes every layer but the head, and
            `only("layer1.* | !layer1.0.*", method)` all of `layer1` but its first block. Each of them has to
            match a layer, or a module with layers, of the model that the plan is applied to.
        method: what is done to the layers.

    Raises:
        Refused: the pattern is empty, or the method is none; `apply` refuses what matches no layer.

    >>> import penjing as pj
    >>> method = only("layer1.* | !layer1.0.*", pj.PruneChannels(ratio=0.5))
    >>> [method.covers(layer) for layer in ("layer1.0.conv1", "layer1.1.conv1", "fc")]
    [False, True, False]
    """
    if not isinstance(pattern, str) or not pattern.strip() or not isinstance(method, Method):
        raise Refused(
            "needs a pattern that is not empty, and a method",
            place="only",
            value=f"{pattern!r}, {method!r}"[:160],
            fix="write only('layer1.*', method)",
            code=Exit.USAGE,
        )
    return Only(pattern=pattern, method=method)


def plan_to_json(plan: Plan) -> list[dict[str, Any]]:
    """Return a plan as plain data."""
    return [method_to_json(method) for method in plan]


def plan_from_json(data: Any) -> Plan:
    """Rebuild a plan from plain data; the order is checked again.

    Raises:
        Refused: it is no list, an entry is wrong, or stages descend.
    """
    if not isinstance(data, list | tuple):
        raise Refused(
            "must be a list of methods",
            value=repr(data)[:80],
            place="plan",
            fix="write it as [{method: PruneChannels, ratio: 0.5}]",
            code=Exit.USAGE,
        )
    return chain(*[method_from_json(entry) for entry in data])


def plan_name(plan: Plan) -> str:
    """Return a short name for tables: `PruneChannels(ratio=0.5) + Int8Static()`; `float` for no method."""
    return " + ".join(repr(method) for method in plan) or "float"


def digest(value: Any) -> str:
    """Return the SHA-256 of plain data in canonical JSON: sorted keys, no spaces, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
