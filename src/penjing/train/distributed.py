"""Training on several processes: each computes its part of every batch, and gradients are averaged."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from penjing.core.errors import Refused
from penjing.core.extras import need

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")

RANK_SEED = 100_003
"""Distance between the seeds of the processes, whose examples must not be dropped out alike."""


@dataclass(frozen=True)
class Processes:
    """The processes that train one model together.

    Attributes:
        rank: number of this one, in [0, world_size).
        world_size: number of all.
        accelerator: Hugging Face Accelerate's, which wraps the model; None where there is one process only.
        sharded: whether the model is in shards, which average their gradients themselves.

    >>> Processes(rank=1, world_size=2).is_main
    False
    """

    rank: int = 0
    world_size: int = 1
    accelerator: Any = None
    sharded: bool = False

    @property
    def is_main(self) -> bool:
        """Tell whether this is the process that logs and writes."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model to call in training: gradients are averaged over the processes behind it."""
        plain = self.accelerator is None or self.sharded
        return model if plain else self.accelerator.prepare_model(model)

    def local_batch(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return this process's part of a batch of tensors `[n, ...]`.

        Raises:
            Refused: fewer examples than processes.
        """
        if self.world_size == 1:
            return tensors
        if len(tensors[0]) < self.world_size:
            raise Refused(
                "every process needs an example of each batch",
                place="training",
                value=f"{len(tensors[0])} examples, {self.world_size} processes",
                fix="take larger batches, or fewer processes",
            )
        return tuple(tensor.tensor_split(self.world_size)[self.rank] for tensor in tensors)

    def all_reduce(self, value: float) -> float:
        """Return the sum of a number over the processes."""
        if self.accelerator is None:
            return value
        import torch

        total = torch.tensor(value, dtype=torch.float64)
        torch.distributed.all_reduce(total)
        return float(total)

    def broadcast(self, value: T) -> T:
        """Return what the main process has, so that all do the same."""
        if self.accelerator is None:
            return value
        from accelerate.utils import broadcast_object_list

        held = [value]
        broadcast_object_list(held)
        return held[0]

    def gather(self, value: T) -> list[T]:
        """Return what each process has, by rank."""
        if self.accelerator is None:
            return [value]
        from accelerate.utils import gather_object

        return list(gather_object([value]))

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every process the buffers (BatchNorm's statistics) of the main one."""
        if self.accelerator is None:
            return
        import torch

        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


ONE_PROCESS = Processes()


def find_processes() -> Processes:
    """Return the processes that a launcher (`accelerate launch`, `torchrun`) started together with this one.

    Raises:
        Refused: there are several, and Accelerate is not installed.

    >>> find_processes().world_size
    1
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ONE_PROCESS
    need("distributed", "training on several processes")
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    return Processes(accelerator.process_index, accelerator.num_processes, accelerator)
