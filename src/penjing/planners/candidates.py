"""Every precision recipe that a model and a target allow, and their order once they were measured."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pydantic import Field

from penjing.core.budget import Budget
from penjing.core.measurement import Estimate
from penjing.core.method import inner, with_fields
from penjing.core.plan import Plan, chain, digest, only, plan_from_json, plan_to_json
from penjing.core.target import Target, runtime_for
from penjing.core.value import Value
from penjing.planners.recipes import SMOOTHED, STATIC
from penjing.quantize.int8_dynamic import Int8Dynamic
from penjing.quantize.int8_static import Int8Static
from penjing.quantize.weight_only import WeightOnly
from penjing.repair.bias import CorrectBias

CLOSE = 1.03
"""Latencies within this ratio count as equal: the recipe that is expected to lose less comes first."""

PAYS = 0.95
"""A recipe pays below this share of float's latency: nearer, the next measurement may find it slower."""

MOST = 4
"""Recipes that a search tries at most; its trials are for the other levers too."""

_KINDS = ("conv", "depthwise", "linear")
_WORTH = 0.1
"""A part of the layers is a recipe of its own where it and the rest hold this share of the multiply-adds."""
_SMALL = (0.02, 0.1)
"""Shares of the multiply-adds that the smallest layers may hold together, to stay float."""


@dataclass(frozen=True)
class Candidate:
    """A legal recipe.

    Attributes:
        name: for people.
        plan: steps of the stage PRECISION.
        loss: rank by the quality that it is expected to lose, from 0.
    """

    name: str
    plan: Plan
    loss: int


class Probed(Value):
    """What was measured of a recipe.

    Attributes:
        name: for people.
        plan: as plain data.
        loss: rank by the quality that it is expected to lose, from 0.
        ratio: its latency over that of the float model; None where it was not measured.
        float_layers: layers with weights that stayed float.
        layers: how many layers there are.
        reason: why it was not measured.
    """

    name: str
    plan: list[dict[str, Any]]
    loss: int = Field(ge=0)
    ratio: Estimate | None = None
    float_layers: tuple[str, ...] = ()
    layers: int = Field(default=0, ge=0)
    reason: str = ""


def list_recipes(
    kinds: Mapping[str, str], multiply_adds: Mapping[str, int], target: Target
) -> tuple[Candidate, ...]:
    """Return the recipes that are worth a measurement, the most promising first.

    Static int8 of everything, of convolutions or linear layers alone, and with the layers of least work left
    float (where the change to integers and back may cost more than it saves), with signed activations, with
    one step for a whole weight; for models of linear layers also with smoothed activations, dynamic int8 (but
    in OpenVINO, which runs its operators in float), and weights alone in 8 and 4 bits.

    Args:
        kinds: of each layer, by its name.
        multiply_adds: of one example, by layer.
        target: where the result must run; none where its runtime takes no integer graph.
    """
    kinds = {name: kind for name, kind in kinds.items() if kind in _KINDS}
    if "onnx" not in runtime_for(target).backends() or not kinds:
        return ()
    linear = [name for name, kind in kinds.items() if kind == "linear"]
    others = [name for name in kinds if name not in linear]
    static = Candidate("static int8", STATIC, 5)
    found = []
    if linear and not others:
        found.append(Candidate("smoothed static int8", SMOOTHED, 1))
        if target.runtime != "openvino":
            found.append(Candidate("dynamic int8", chain(Int8Dynamic()), 3))
        found.append(static)
        found.append(Candidate("8-bit weights", chain(WeightOnly("int8 group 32")), 0))
        found.append(Candidate("4-bit weights", chain(WeightOnly("int4 group 32")), 6))
    else:
        found.append(static)
    first = found[0]
    return (*found, *_partly_float(list(kinds), linear, others, multiply_adds), *_other_integers(first))


def _other_integers(usual: Candidate) -> Iterator[Candidate]:
    """Yield the forms of a static recipe that kernels of some processors are made for."""
    signed, whole = ({"inputs": "int8"}, usual.loss), ({"weights": "int8 tensor"}, usual.loss + 3)
    for words, (fields, loss) in (("signed activations", signed), ("one step for a weight", whole)):
        plan = chain(*(with_fields(x, **fields) if isinstance(x, Int8Static) else x for x in usual.plan))
        yield Candidate(f"{usual.name}, {words}", plan, loss)


def _partly_float(
    names: list[str], linear: list[str], others: list[str], multiply_adds: Mapping[str, int]
) -> Iterator[Candidate]:
    work = {name: multiply_adds.get(name, 0) for name in names}
    total = sum(work.values())
    if not total:
        return
    smallest = sorted(names, key=lambda name: work[name])
    sums = list(itertools.accumulate(work[name] for name in smallest))
    counts = {share: sum(held <= share * total for held in sums) for share in _SMALL}
    for index, (share, count) in enumerate(counts.items()):
        if 0 < count < len(names) and count not in list(counts.values())[:index]:
            yield Candidate(
                f"static int8 but for the smallest layers ({share:.0%} of the work)",
                _static_without(smallest[:count], names),
                2 - index,
            )
    for words, left in (("convolutions", linear), ("linear layers", others)):
        share = sum(work[name] for name in left) / total
        if _WORTH <= share <= 1 - _WORTH:
            yield Candidate(f"static int8, {words} alone", _static_without(left, names), 2)


def _static_without(left: list[str], names: list[str]) -> Plan:
    left_out = match_with_patterns(left, [name for name in names if name not in left])
    return chain(only(" | ".join(f"!{pattern}" for pattern in left_out), Int8Static()), CorrectBias())


def match_with_patterns(names: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """Return shell patterns that match all of some names and none of the others, in which `*` is a number.

    >>> match_with_patterns(["a.0.x", "a.1.x"], ["a.0.y"])
    ('a.*.x',)
    """
    found: list[str] = []
    for name in names:
        if not any(fnmatchcase(name, pattern) for pattern in found):
            found.append(_widest(name, others))
    return tuple(found)


def _widest(name: str, others: Sequence[str]) -> str:
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdecimal()][:4]
    exact = [glob.escape(part) for part in parts]
    for count in range(len(numbers), 0, -1):
        for chosen in itertools.combinations(numbers, count):
            pattern = ".".join("*" if index in chosen else part for index, part in enumerate(exact))
            if not any(fnmatchcase(other, pattern) for other in others):
                return pattern
    return ".".join(exact)


def order_recipes(rows: Sequence[Probed], budget: Budget) -> tuple[Plan, ...]:
    """Return the recipes that a search is to try, in this order, the first that keeps quality being the last.

    The fastest first, those that are as fast by expected loss. A recipe that does not pay in speed is tried
    only where the budget limits bytes, after the others, those with the fewest float layers first. Of two
    that compute the same values only the faster one is tried.

    Args:
        rows: what was measured.
        budget: its limits and number of trials.
    """
    slowest_first = sorted((row for row in rows if row.ratio is not None), key=get_ratio, reverse=True)
    measured = [*{_values(row): row for row in slowest_first}.values()]
    tried = _by_speed([row for row in measured if get_ratio(row) < PAYS])
    if limits_bytes(budget):
        others = _by_speed([row for row in measured if get_ratio(row) >= PAYS])
        tried += sorted(others, key=lambda row: len(row.float_layers))
    most = MOST if budget.trials is None else min(MOST, max(1, budget.trials // 3))
    return tuple(plan_from_json(row.plan) for row in tried[:most])


def _by_speed(rows: Sequence[Probed]) -> list[Probed]:
    """Return the fastest first, those that are as fast by expected loss."""
    found: list[Probed] = []
    left = sorted(rows, key=get_ratio)
    while left:
        close = [row for row in left if get_ratio(row) <= CLOSE * get_ratio(left[0])]
        found += sorted(close, key=lambda row: row.loss)
        left = left[len(close) :]
    return found


def _values(row: Probed) -> str:
    """Return what a recipe computes: how activations are stored changes nothing."""
    plan = plan_from_json(row.plan)
    same = (with_fields(x, inputs="uint8") if isinstance(inner(x), Int8Static) else x for x in plan)
    return digest(plan_to_json(chain(*same)))


def limits_bytes(budget: Budget) -> bool:
    """Tell whether fewer bits may be wanted for their size alone."""
    return bool(budget.costs.keys() & {"size", "memory"})


def get_ratio(row: Probed) -> float:
    """Return the measured ratio of a recipe that has one."""
    assert row.ratio is not None
    return row.ratio.value
