"""The outputs of a model in memory, kept beside its file until both are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.core.errors import Refused
from penjing.core.files import MANIFEST, refusing, write_file

EXPECTED = "expected.npy"


def write_expected(folder: Path, outputs: NDArray[Any]) -> None:
    """Keep outputs durably: they are on disk before the ledger's row that counts on them.

    Args:
        folder: of the candidate, or of the original.
        outputs: `[examples, ...]` of the model in memory.

    Raises:
        Refused: the disk's reasons (environment).
    """
    write_file(folder / EXPECTED, lambda file: np.save(file, outputs, allow_pickle=False))


def read_expected(folder: Path) -> NDArray[Any]:
    """Return the outputs that `write_expected` kept.

    Raises:
        Refused: the file is missing, empty or damaged.
    """
    path = folder / EXPECTED
    try:
        with refusing(path, "read"):
            outputs: NDArray[Any] = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise Refused(
            "must hold the outputs of the model in memory",
            value=error,
            place=str(path),
            fix="delete the file and resume: it is made again",
        ) from error
    return outputs


def is_whole(folder: Path, artefact: str) -> bool:
    """Tell whether a folder has what its row in the ledger promises: expected outputs and the artefact.

    After a power cut files may be missing or empty that a finished row counts on.

    Args:
        folder: of the candidate, or of the original.
        artefact: name of the artefact's folder in it.
    """
    try:
        read_expected(folder)
    except Refused:
        return False
    return (folder / artefact / MANIFEST).is_file()
