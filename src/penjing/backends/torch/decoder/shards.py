"""Tensors of a checkpoint in safetensors files, read and written one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from penjing.core.errors import Refused
from penjing.core.files import read_json, write_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TYPES: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types that are read and written, by their names in the format."""
_NAMES = {kind: name for name, kind in TYPES.items()}
_ALIGNMENT = 8


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies and what it is.

    Attributes:
        file: name of the shard.
        kind: its type's name in the format, a key of `TYPES`.
        shape: its shape.
    """

    file: str
    kind: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of its values."""
        return math.prod(self.shape) * int(TYPES[self.kind].itemsize)


class Shards:
    """The tensors of a checkpoint folder, by name; nothing is held.

    Attributes:
        folder: of the checkpoint.
        stored: by the names of the files.

    Raises:
        Refused: there are no safetensors files, one is missing, truncated or no such file, the index names a
            tensor that its file does not have, or a tensor is of a type that networks are not trained in.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stored: dict[str, Stored] = {}
        wanted = _wanted(folder)
        for file in dict.fromkeys(wanted.values()) if wanted else [SINGLE]:
            self._read_header(file)
        for name, file in wanted.items():
            if name not in self.stored or self.stored[name].file != file:
                raise Refused(
                    "a shard must hold what the index says",
                    value=f"no {name} in {file}",
                    place=str(folder),
                    fix="copy the checkpoint again",
                )

    @property
    def files(self) -> list[str]:
        """Names of the shards."""
        return list(dict.fromkeys(entry.file for entry in self.stored.values()))

    @property
    def bytes(self) -> int:
        """Size of all values."""
        return sum(entry.bytes for entry in self.stored.values())

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, in memory of its own, of the type that it is stored in."""
        with self._opened(self.stored[name].file) as file:
            return file.get_tensor(name).clone()

    def refuse_not_finite(self) -> None:
        """Read every tensor once and refuse NaN and infinite values.

        Raises:
            Refused: names the first tensor with such values, and its shard.
        """
        for shard in self.files:
            with self._opened(shard) as file:
                for name in (name for name, entry in self.stored.items() if entry.file == shard):
                    tensor = file.get_tensor(name)
                    bad = tensor.is_floating_point() and int((~torch.isfinite(tensor)).sum())
                    if bad:
                        raise Refused(
                            "weights must be finite",
                            value=f"{bad} NaN or infinite values in {name}",
                            place=str(self.folder / shard),
                            fix="load an earlier checkpoint, from before the training diverged",
                        )

    def _read_header(self, shard: str) -> None:
        with self._opened(shard) as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                part = file.get_slice(name)
                kind = part.get_dtype()
                if kind not in TYPES:
                    raise Refused(
                        "weights must be float32, float16 or bfloat16, not quantized yet",
                        value=f"{name} is {kind}",
                        place=str(self.folder / shard),
                        fix="start from the float model",
                    )
                self.stored[name] = Stored(shard, kind, tuple(part.get_shape()))

    @contextmanager
    def _opened(self, shard: str) -> Iterator[Any]:
        path = self.folder / shard
        if not path.is_file():
            raise Refused(
                "every shard of the checkpoint must be there",
                value=f"no file {shard}",
                place=str(self.folder),
                fix="copy the checkpoint again",
            )
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise Refused(
                "a shard must be a whole safetensors file",
                value=error,
                place=str(path),
                fix="copy the checkpoint again",
            ) from error


def _wanted(folder: Path) -> dict[str, str]:
    """Return the shard of every tensor by the index; empty where one file holds all."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        wanted: Any = index.get("weight_map") if isinstance(index, dict) else None
        good = isinstance(wanted, dict) and bool(wanted)
        if not good or not all(isinstance(x, str) and x == Path(x).name for x in wanted.values()):
            raise Refused(
                "the index must say which shard holds each tensor",
                value=f"{wanted!r}"[:80],
                place=str(folder / INDEX),
                fix="copy the checkpoint again",
            )
        return {str(name): file for name, file in wanted.items()}
    if not (folder / SINGLE).is_file():
        pickles = sorted(x.name for x in folder.glob("*") if x.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        raise Refused(
            "the checkpoint must hold safetensors",
            place=str(folder),
            value=f"only {', '.join(pickles)}, which are never unpickled" if pickles else f"no {SINGLE}",
            fix="save the model again with save_pretrained, which writes safetensors",
        )
    return {}


@dataclass(frozen=True)
class Part:
    """A tensor that is to be written: its type, its shape, and what gives it when its turn comes."""

    kind: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Part:
        """Return the part of a tensor that is in memory."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def write_shard(path: Path, parts: Mapping[str, Part]) -> None:
    """Write tensors as a safetensors file, one at a time, whole or not at all.

    The form is that of the format's documentation: the length of the header in 8 bytes, the header in JSON,
    the values in its order, those of large types first, so that all are aligned.

    Raises:
        Refused: as `write_file`.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    order = sorted(parts.items(), key=lambda entry: -entry[1].kind.itemsize)
    end = 0
    for name, part in order:
        start, end = end, end + math.prod(part.shape) * int(part.kind.itemsize)
        header[name] = {
            "dtype": _NAMES[part.kind],
            "shape": list(part.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, part in order:
            tensor = part.load()
            assert tensor.dtype == part.kind
            assert tuple(tensor.shape) == part.shape
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    write_file(path, write)
