"""Splits that were not given, and what a reader of the report should know of those that are there."""

from __future__ import annotations

from typing import Any

import numpy as np

from penjing.core.data.copies import contents
from penjing.core.data.split import Split, divide, divide_groups
from penjing.core.errors import Refused

SMALL_TEST = 300
HELD_BACK = 0.15
"""Share of the training data taken for each of valid and test where it is missing."""


def complete(splits: dict[str, Any], seed: int) -> tuple[dict[str, Any], list[str]]:
    """Make the splits that are missing, the same share of every class, and say so."""
    notes: list[str] = []
    train, valid, test = (splits[name] for name in ("train", "valid", "test"))
    if valid is None:
        share = HELD_BACK if test is not None else 2 * HELD_BACK
        train, valid = _halves(train, ("train", "valid"), share, seed)
        notes.append(f"valid was not given: {share:.0%} of train was taken for it")
    if test is None:
        valid, test = _halves(valid, ("valid", "test"), 0.5, seed)
        notes.append(f"test was not given: half of valid ({len(test)} examples) was held back for it")
    return {"train": train, "valid": valid, "test": test}, notes


def _halves(split: Split, names: tuple[str, str], share: float, seed: int) -> tuple[Split, Split]:
    if split.groups is not None:
        rest, drawn = divide_groups(split.groups, share, seed)
    else:  # copies stay together
        first, number = contents(split)
        taken = np.isin(number, divide(split.targets[first], share, seed)[1])
        rest, drawn = np.flatnonzero(~taken), np.flatnonzero(taken)
    if len(rest) == 0 or len(drawn) == 0:
        raise Refused(
            f"{names[0]} must have enough examples to take {names[1]} from",
            value=len(split),
            place=f"task.{names[0]}",
            fix=f"pass {names[1]}",
        )
    return split.take(rest, names[0]), split.take(drawn, names[1])


def refuse_different_examples(splits: dict[str, Any]) -> None:
    """Refuse splits whose examples differ in shape or type.

    Raises:
        Refused: with both, and the split.
    """
    kinds = {name: [(x.dtype, x.shape[1:]) for x in split.example()] for name, split in splits.items()}
    for name in ("valid", "test"):
        if kinds[name] != kinds["train"]:
            both = f"{_kinds(kinds[name])} beside {_kinds(kinds['train'])} in train"
            raise Refused(
                "the examples of all splits must have one shape and type",
                value=both,
                place=f"task.{name}",
                fix="prepare every split in the same way",
            )


def _kinds(kinds: list[tuple[Any, tuple[int, ...]]]) -> str:
    return ", ".join(f"{dtype} {shape}" for dtype, shape in kinds)


def observations(splits: dict[str, Any]) -> list[str]:
    """Return what a reader of the report should know: few examples, one class, constant inputs."""
    notes: list[str] = []
    arrays = {name: split for name, split in splits.items() if isinstance(split, Split)}
    n = len(splits["test"])
    if n < SMALL_TEST:
        notes.append(
            f"test has {n} examples: drops below about {min(1.0, 3 / n):.1%} cannot be certified at 95%"
        )
    for name, split in arrays.items():
        if split.targets.ndim == 1 and split.targets.dtype.kind in "iu" and np.ptp(split.targets) == 0:
            notes.append(f"{name} has only one class ({split.targets[0]})")
        if any(x.dtype.kind == "f" and np.ptp(x) == 0 for x in split.inputs):
            notes.append(f"an input of {name} has the same value everywhere")
    return notes
