"""Examples that occur more than once: within a split, and in two splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.core.data.split import Arrays, Batch, LiveSplit, Split
from penjing.core.errors import Refused

Ints = NDArray[np.int64]

HASHED_BYTES = 2_000_000_000
"""Inputs of all splits together beyond which no copies are looked for."""

PAIRS = (("train", "test"), ("valid", "test"), ("train", "valid"))
"""Splits that are compared: the later is judged on, and the earlier was used before."""

READ = 5_000
"""Examples of training data that are read on every pass, of which copies are looked for."""


def row_hashes(arrays: Arrays) -> list[bytes]:
    """Return a hash of every example's content; the same in every process, equal for equal examples.

    >>> first, second, third = row_hashes((np.array([[1, 2], [3, 4], [1, 2]]),))
    >>> first == third, first == second
    (True, False)
    """
    columns = [np.ascontiguousarray(x) for x in arrays]
    found = []
    for i in range(len(columns[0])):
        digest = hashlib.blake2b(digest_size=16)
        for x in columns:
            digest.update(x[i].tobytes())
        found.append(digest.digest())
    return found


def counted_once(split: Split) -> tuple[Split, str]:
    """Return a split with one of every set of exact copies, inputs and targets alike, and a note if any went.

    Copies tell nothing new of a model, and a test that takes them for independent examples claims too much.
    """
    if split.nbytes > HASHED_BYTES:
        return split, ""
    first: dict[bytes, int] = {}
    for i, row in enumerate(row_hashes((*split.inputs, split.targets))):
        first.setdefault(row, i)
    if len(first) == len(split):
        return split, ""
    kept = split.take(np.array(sorted(first.values())), split.name)
    gone = len(split) - len(kept)
    return kept, (
        f"{gone} of {len(split)} examples of {split.name} are copies of others in it: each counts once, "
        f"{len(kept)} are left"
    )


def contents(split: Split) -> tuple[Ints, Ints]:
    """Return the first example of every content of a split, and for each example the number of its own."""
    if split.nbytes > HASHED_BYTES:
        return np.arange(len(split)), np.arange(len(split))
    _, first, number = np.unique(row_hashes(split.inputs), return_index=True, return_inverse=True)
    return first, np.asarray(number, np.int64)


def refuse_overlaps(splits: dict[str, Any], share: float, same: bool) -> list[str]:
    """Return notes on examples that are in two splits.

    Args:
        splits: train, valid and test.
        share: largest share of valid or of test that may be in a split before it.
        same: whether valid was given as being train, which is the user's to decide.

    Raises:
        Refused: the share is exceeded.
    """
    if sum(split.nbytes for split in splits.values() if isinstance(split, Split)) > HASHED_BYTES:
        return [
            f"the data is larger than {HASHED_BYTES / 1e9:g} GB: no examples were compared between splits"
        ]
    hashes = {name: _hashes(split) for name, split in splits.items()}
    notes = []
    for first, second in PAIRS:
        seen, read = hashes[first]
        own = hashes[second][0]
        found = len(own & seen) / max(len(own), 1)
        estimate = found * max(1.0, len(splits[first]) / max(read, 1))
        if found and estimate > share and not (same and second == "valid"):
            raise _seen(first, second, estimate, read < len(splits[first]), share)
        if found:
            count = round(found * len(splits[second]))
            notes.append(f"{count} of {len(splits[second])} examples of {second} are also in {first}")
    return notes


def _hashes(split: Split | LiveSplit) -> tuple[set[bytes], int]:
    """Return the hashes of a split's inputs, and of how many examples they are."""
    if isinstance(split, Split):
        return set(row_hashes(split.inputs)), len(split)
    found: set[bytes] = set()
    read = 0
    for inputs, targets in _some(split):
        found |= set(row_hashes(inputs))
        read += len(targets)
    return found, read


def _some(split: LiveSplit) -> Iterator[Batch]:
    read = 0
    for batch in split.batches(256, seed=0):
        yield batch
        read += len(batch[1])
        if read >= READ:
            return


def _seen(first: str, second: str, found: float, estimated: bool, share: float) -> Refused:
    about, held = "about " if estimated else "", "valid" if second == "test" else "train"
    rule = "the test split must be unseen by the search" if second == "test" else "valid must not be in train"
    return Refused(
        rule,
        value=f"{about}{min(found, 1.0):.0%} of {second} in {first}, where {share:.0%} may be",
        place=f"task.{second}",
        fix=f"leave {second} out, a part of {held} is then held back for it; or set Task(max_overlap=...)",
    )
