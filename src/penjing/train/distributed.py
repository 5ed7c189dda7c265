"""Training on several processes: each computes its part of every batch, and gradients are averaged."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, TypeVar

from penjing.core.errors import Refused
from penjing.core.extras import need

T = TypeVar("T")

RANK_SEED = 100_003
"""Distance between the seeds of the processes, whose examples must not be dropped out alike."""


@dataclass(frozen=True)
class Processes:
    """The processes that train one model together.

    Attributes:
        rank: number of this one, from 0.
        count: of all.
        accelerator: Hugging Face Accelerate's, which wraps the model; None where there is one process only.
        sharded: whether the model is in shards, which average their gradients themselves.
    """

    rank: int = 0
    count: int = 1
    accelerator: Any = None
    sharded: bool = False

    @property
    def first(self) -> bool:
        """Tell whether this is the process that speaks and writes."""
        return self.rank == 0

    def wrapped(self, model: Any) -> Any:
        """Return the model to call in training: gradients are averaged over the processes behind it."""
        plain = self.accelerator is None or self.sharded
        return model if plain else self.accelerator.prepare_model(model)

    def part(self, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return this process's part of a batch.

        Raises:
            Refused: fewer examples than processes.
        """
        if self.count == 1:
            return tensors
        if len(tensors[0]) < self.count:
            raise Refused(
                "every process has an example of each batch",
                place="training",
                value=f"{len(tensors[0])} examples, {self.count} processes",
                fix="take larger batches, or fewer processes",
            )
        return tuple(tensor.tensor_split(self.count)[self.rank] for tensor in tensors)

    def summed(self, value: float) -> float:
        """Return the sum of a number over the processes."""
        if self.accelerator is None:
            return value
        import torch

        total = torch.tensor(value, dtype=torch.float64)
        torch.distributed.all_reduce(total)
        return float(total)

    def agreed(self, value: T) -> T:
        """Return what the first process has, so that all do the same."""
        if self.accelerator is None:
            return value
        from accelerate.utils import broadcast_object_list

        held = [value]
        broadcast_object_list(held)
        return held[0]

    def gathered(self, value: T) -> list[T]:
        """Return what each process has, in their order."""
        if self.accelerator is None:
            return [value]
        from accelerate.utils import gather_object

        return list(gather_object([value]))

    def share_buffers(self, model: Any) -> None:
        """Give every process the buffers (BatchNorm's statistics) of the first."""
        if self.accelerator is None:
            return
        import torch

        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


ALONE = Processes()
"""One process."""


def processes() -> Processes:
    """Return the processes that a launcher (`accelerate launch`, `torchrun`) started together with this one.

    Raises:
        Refused: there are several, and Accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ALONE
    need("distributed", "training on several processes")
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    return Processes(accelerator.process_index, accelerator.num_processes, accelerator)
