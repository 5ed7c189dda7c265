"""Examples that depend on each other: of a patient, a user, a document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.core.data.copies import PAIRS
from penjing.core.data.split import Split
from penjing.core.errors import Exit, Refused


def groups_by_split(groups: Any, given: tuple[str, ...]) -> dict[str, Any]:
    """Return groups by the name of the split; an array alone is of test.

    Args:
        groups: an array, a mapping from splits to arrays, or None.
        given: names of the splits that the user gives.

    Raises:
        Refused: groups of a split that is not given.
    """
    if groups is None:
        return {}
    by_split = dict(groups) if isinstance(groups, Mapping) else {"test": groups}
    for name in by_split:
        if name not in given:
            raise Refused(
                "the groups must be of a split that is given",
                value=repr(name),
                place="task.groups",
                fix='give them by split, such as Task(groups={"valid": patients})',
                code=Exit.USAGE,
            )
    return by_split


def groups_of(splits: dict[str, Any], given: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """Return the groups of each split after it was read and divided; of data that is read anew, as given."""
    found = {}
    for name, split in splits.items():
        if isinstance(split, Split):
            if split.groups is not None:
                found[name] = split.groups
        elif name in given:
            found[name] = np.asarray(given[name])
    return found


def refuse_shared_groups(groups: dict[str, NDArray[Any]], share: float) -> list[str]:
    """Return notes on groups, such as patients, with examples in two splits; raises as `refuse_overlaps`."""
    notes = []
    for first, second in PAIRS:
        if first not in groups or second not in groups:
            continue
        names, seen = np.unique(groups[second]), np.unique(groups[first])
        shared = int(np.isin(names, seen).sum())
        if shared > share * len(names):
            raise Refused(
                f"the groups of {second} must not be in {first}",
                value=f"{shared} of {len(names)}",
                place="task.groups",
                fix="divide the data by groups, or set max_overlap to the share that you accept",
            )
        if shared:
            notes.append(f"{shared} of {len(names)} groups of {second} are also in {first}")
    return notes
