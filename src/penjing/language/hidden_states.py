"""What goes from block to block of a language model, kept in files while the blocks change."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from penjing.core.errors import Refused
from penjing.core.files import refusing, write_file


def write_hidden_states(path: Path, shape: tuple[int, ...], batches: Iterable[NDArray[np.float32]]) -> None:
    """Write hidden states as they come, whole or not at all, as a file of NumPy's.

    Args:
        path: of the file.
        shape: of all of them, `[examples, length, width]`.
        batches: float32 parts along the first axis.

    Raises:
        Refused: a value is NaN or infinite; or as `write_file`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_hidden_states(Path(folder, "a.npy"), (2, 3, 4), [np.ones((2, 3, 4), np.float32)])
    ...     read_hidden_states(Path(folder, "a.npy")).shape
    (2, 3, 4)
    """

    def write(file: BinaryIO) -> None:
        facts = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, facts)
        for batch in batches:
            if not np.isfinite(batch).all():
                raise Refused(
                    "must be finite",
                    value="NaN or infinity",
                    place=f"hidden states {path.stem}",
                    fix="look for overflow in the blocks so far: a float16 checkpoint may need bfloat16",
                )
            file.write(np.ascontiguousarray(batch, "<f4").data)

    write_file(path, write)


def read_hidden_states(path: Path) -> NDArray[Any]:
    """Return the states in a file, which are read from it as they are used.

    Raises:
        Refused: the file is missing or damaged.
    """
    with refusing(path, "read"):
        try:
            found: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise Refused(
                "must hold hidden states",
                value=error,
                place=str(path),
                fix=f"remove {path.parent} and start again",
            ) from error
    return found
