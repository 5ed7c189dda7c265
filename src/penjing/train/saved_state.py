"""The state of a training run on disk: written whole or not at all, read back without pickle."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Protocol

from penjing.core.errors import Exit, Refused
from penjing.core.files import write_bytes
from penjing.train.distributed import ALONE, Processes
from penjing.train.sharding import whole

SAVE_EVERY_S = 20.0
"""Seconds of training between two saves; more where a save is slow, so that it costs at most a twentieth."""

SHARE = 0.05

ASKED_EVERY = 5
"""Steps after which several processes agree whether it is time to save: to ask after each would cost more."""


class Stateful(Protocol):
    """What a run goes on with, beside the training itself."""

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs to go on."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""


class Checkpoint:
    """One file of safetensors whose header holds all that is no tensor.

    Of several processes all call every method together; the first reads, writes and decides.

    Args:
        path: of the file.
        key: what the run depends on; a file of another key is refused.
        every: seconds between two saves.
        also: whose state is saved with that of the training.
        together: the processes that train.
    """

    def __init__(
        self,
        path: Path,
        key: str,
        every: float = SAVE_EVERY_S,
        also: Stateful | None = None,
        together: Processes = ALONE,
    ) -> None:
        self._path, self._key, self._every = path, key, every
        self._also, self._together = also, together
        self._last = time.perf_counter()
        self._cost = 0.0

    def due(self, step: int) -> bool:
        """Tell whether it is time to save again; several processes do after some steps only."""
        if self._together.count > 1 and step % ASKED_EVERY:
            return False
        return self._together.agreed(time.perf_counter() - self._last >= max(self._every, self._cost / SHARE))

    def save(self, state: Any) -> None:
        """Write a state: dictionaries, lists, tuples, numbers, words and tensors.

        Raises:
            Refused: the file cannot be written.
        """
        from safetensors.torch import save

        start = time.perf_counter()
        tensors: dict[str, Any] = {}
        also = None if self._also is None else self._also.state()
        words = json.dumps(_plain([state, also], tensors))
        if not self._together.first:  # it was needed to put shards together
            return
        write_bytes(self._path, save(tensors, metadata={"key": self._key, "state": words}))
        self._last = time.perf_counter()
        self._cost = self._last - start

    def load(self) -> Any:
        """Return the state saved last, or None without any.

        Raises:
            Refused: the file is damaged, or of another run.
        """
        found = self._together.agreed(self._read() if self._together.first else None)
        if found is None:
            return None
        own, also = found
        if self._also is not None:
            self._also.restore(also)
        return own

    def _read(self) -> Any:
        from safetensors import SafetensorError, safe_open

        if not self._path.exists():
            return None
        try:
            with safe_open(self._path, framework="pt") as file:
                facts = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            key, state = facts["key"], json.loads(facts["state"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise Refused(
                "a saved state is whole",
                value=str(error)[:80],
                place=str(self._path),
                fix="delete the file: training begins anew",
                code=Exit.ENVIRONMENT,
            ) from error
        if key != self._key:
            raise Refused(
                "a run goes on with the model, data and strategy it began with",
                value=f"key {self._key[:12]}, saved {key[:12]}",
                place=str(self._path),
                fix="give another folder, or delete this one",
                code=Exit.USAGE,
            )
        return _whole(state, tensors)


def _plain(value: Any, tensors: dict[str, Any]) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = whole(value.detach()).cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[_plain(k, tensors), _plain(v, tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_plain(part, tensors) for part in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise Refused(
        "a state is made of tensors, numbers and words",
        value=type(value).__name__,
        place="the optimizer's state",
        fix="train with another optimizer",
    )


def _whole(value: Any, tensors: dict[str, Any]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_whole(k, tensors): _whole(v, tensors) for k, v in content}
    made = [_whole(part, tensors) for part in content]
    return tuple(made) if kind == "tuple" else made
