"""Give a fresh module of the user's class the structure that a recorded history describes."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from penjing.backends.torch.backend import TorchBackend
from penjing.backends.torch.cut.group_norms import replace_batchnorms
from penjing.backends.torch.observe.batch_statistics import find_batchnorms
from penjing.backends.torch.structure.blocks import find_blocks, remove_blocks
from penjing.backends.torch.structure.history import Entry, history
from penjing.core.backend import Arrays
from penjing.core.errors import Refused

_FIX = "pass the class that the artefact was made from"


def replay(module: nn.Module, entries: list[Entry], example: Arrays) -> nn.Module:
    """Return the module after a recorded history; weights are whatever the module has.

    Steps that the module carries already, because it was made by taking them, are not taken twice.

    Args:
        entries: what `history` returned of the module that was saved, read from a file.
        example: one batch of inputs, of any values.

    Raises:
        Refused: another history, a step of an unknown kind, or groups or blocks that the class lacks.
    """
    made = history(module)
    if entries[: len(made)] != made:
        raise Refused(
            "the class must not have been cut in another way",
            value=f"{len(made)} steps",
            place="model()",
            fix=_FIX,
        )
    for entry in entries[len(made) :]:
        kind = next((kind for kind in _STEPS if isinstance(entry, dict) and kind in entry), None)
        if kind is None:
            raise Refused(
                "the recorded step must be of a known kind",
                value=repr(entry)[:80],
                place="recipe",
                fix="open the artefact with the version of Penjing that wrote it",
            )
        module = _STEPS[kind](module, entry, example)
    return module


def _cut(module: nn.Module, entry: Entry, example: Arrays) -> nn.Module:
    backend = TorchBackend()
    views = {"heads": entry["heads"]} if "heads" in entry else {}
    groups = backend.groups(module, example, **views)
    unknown = sorted(set(entry["keep"]) - {group.name for group in groups.groups})
    if unknown:
        raise Refused(
            "the class must have the groups that were cut",
            value=", ".join(unknown[:5]),
            place="model()",
            fix=_FIX,
        )
    kept = {name: np.asarray(units, dtype=np.int64) for name, units in entry["keep"].items()}
    result: nn.Module = backend.keep(module, groups, kept)
    return result


def _skip(module: nn.Module, entry: Entry, example: Arrays) -> nn.Module:
    blocks = find_blocks(module, example)
    unknown = [name for name in entry["skip"] if name not in blocks.found]
    if unknown:
        raise Refused(
            "the class must have the blocks that were removed",
            value=", ".join(unknown[:5]),
            place="model()",
            fix=_FIX,
        )
    return remove_blocks(module, blocks, list(entry["skip"]), example)


def _normalize(module: nn.Module, entry: Entry, example: Arrays) -> nn.Module:
    layers = find_batchnorms(module)
    for name, count in entry["group_norm"].items():
        if name not in layers or layers[name].num_features % count:
            raise Refused(
                "the class must have the BatchNorm layers that were replaced",
                value=name,
                place="model()",
                fix=_FIX,
            )
    return replace_batchnorms(module, entry["group_norm"])


_STEPS: dict[str, Any] = {"keep": _cut, "skip": _skip, "group_norm": _normalize}
