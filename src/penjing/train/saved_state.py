"""The state of a training run on disk: written whole or not at all, read back without pickle."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from penjing.core.errors import Exit, Refused
from penjing.core.files import write_bytes
from penjing.train.distributed import ONE_PROCESS, Processes
from penjing.train.sharding import gather_tensor

if TYPE_CHECKING:
    from torch import Tensor

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


class SavedState:
    """One file of safetensors whose header holds all that is no tensor.

    Of several processes all call every method together; the main one reads, writes and decides.

    Args:
        path: of the file.
        key: what the run depends on; a file of another key is refused.
        every: seconds between two saves.
        also: whose state is saved with that of the training.
        processes: that train.
        clock: seconds that pass.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     SavedState(Path(folder) / "state", "key").save({"step": 3, "weights": [torch.ones(2)]})
    ...     SavedState(Path(folder) / "state", "key").load()
    {'step': 3, 'weights': [tensor([1., 1.])]}
    """

    def __init__(
        self,
        path: Path,
        key: str,
        every: float = SAVE_EVERY_S,
        also: Stateful | None = None,
        processes: Processes = ONE_PROCESS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._path, self._key, self._every = path, key, every
        self._also, self._processes, self._clock = also, processes, clock
        self._last = clock()
        self._cost = 0.0

    def is_due(self, step: int) -> bool:
        """Tell whether it is time to save again; several processes do after every fifth step only."""
        if self._processes.world_size > 1 and step % ASKED_EVERY:
            return False
        late = self._clock() - self._last >= max(self._every, self._cost / SHARE)
        return self._processes.broadcast(late)

    def save(self, state: Any) -> None:
        """Write a state: dictionaries, lists, tuples, numbers, words and tensors.

        Raises:
            Refused: the file cannot be written, or the state holds anything else.
        """
        from safetensors.torch import save

        start = self._clock()
        tensors: dict[str, Tensor] = {}
        also = None if self._also is None else self._also.state()
        words = json.dumps(_encode([state, also], tensors))
        if not self._processes.is_main:  # it was needed to put shards together
            return
        write_bytes(self._path, save(tensors, metadata={"key": self._key, "state": words}))
        self._last = self._clock()
        self._cost = self._last - start

    def load(self) -> Any:
        """Return the state saved last, or None without any.

        Raises:
            Refused: the file is damaged, or of another run.
        """
        found = self._processes.broadcast(self._read() if self._processes.is_main else None)
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
                "a saved state must be complete",
                value=str(error)[:80],
                place=str(self._path),
                fix="delete the file: training begins anew",
                code=Exit.ENVIRONMENT,
            ) from error
        if key != self._key:
            raise Refused(
                "must be of a run with the same model, data and strategy",
                value=f"one of key {key[:12]}, not {self._key[:12]}",
                place=str(self._path),
                fix="give another folder, or delete this one",
                code=Exit.USAGE,
            )
        return _decode(state, tensors)


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        name = f"t{len(tensors)}"
        full = gather_tensor(value.detach())
        tensors[name] = full.cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[_encode(k, tensors), _encode(v, tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_encode(part, tensors) for part in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise Refused(
        "must be made of tensors, numbers and words",
        value=type(value).__name__,
        place="the optimizer's state",
        fix="train with another optimizer",
    )


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
    made = [_decode(part, tensors) for part in content]
    return tuple(made) if kind == "tuple" else made
