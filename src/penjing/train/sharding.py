"""Training with weights, gradients and the optimizer's state spread over several processes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from penjing.core.errors import Refused
from penjing.train.hooks import is_watched
from penjing.train.optimizers import OptimizerName
from penjing.train.strategy import Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn

SHARDABLE: tuple[OptimizerName, ...] = (
    "sgd",
    "adam",
    "adamw",
    "nadam",
    "radam",
    "adamax",
    "rmsprop",
    "adagrad",
    "adadelta",
    "lion",
    "muon",
    "schedule_free",
)
"""Optimizers whose steps on sharded tensors are those on full ones; the others fail there."""


class Sharded:
    """A copy of a model that trains in shards (Zhao et al. 2023, "PyTorch FSDP"; torch's `fully_shard`).

    Each process holds a shard of every tensor of the copy, of its gradient and of the optimizer's state; the
    blocks that a model is made of are gathered one after the other. The model itself stays whole.

    Attributes:
        module: the copy, to train.
    """

    def __init__(self, model: nn.Module, strategy: Strategy, world_size: int) -> None:
        """Spread a copy over the processes.

        Args:
            model: a torch module.
            strategy: how it trains.
            world_size: number of the processes.

        Raises:
            Refused: what the strategy or the model asks for does not go with shards.
        """
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        if reason := _find_obstacle(model, strategy):
            raise Refused(
                "cannot be combined with all that a strategy and a model ask for",
                value=reason,
                place="shard",
                fix="take shard=False",
            )
        self._model = model
        # Shards are cut from contiguous tensors, whatever the layout of the model's.
        self.module = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        mesh = init_device_mesh(next(model.parameters()).device.type, (world_size,))
        for block in _blocks(self.module):
            fully_shard(block, mesh=mesh)
        fully_shard(self.module, mesh=mesh)

    def copy_to_model(self) -> None:
        """Put the tensors of the copy, whole, into the model; all processes have to call it."""
        import torch

        own = dict(self._model.named_parameters()) | dict(self._model.named_buffers())
        with torch.no_grad():
            for name, tensor in (*self.module.named_parameters(), *self.module.named_buffers()):
                own[name].copy_(gather_tensor(tensor))

    @contextmanager
    def evaluated_weights(self, weights: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        """Let the model have the weights that the copy is evaluated by."""
        with weights():
            self.copy_to_model()
            yield


def gather_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of one whose shards other processes hold; others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_tensor(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a full tensor sharded as another of its shape is; as it is where that one is full."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def shard_tensors(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Return full tensors sharded as those of another list are; none where there are none."""
    return [shard_tensor(tensor, own) for tensor, own in zip(tensors, like, strict=bool(tensors))]


def _find_obstacle(model: nn.Module, strategy: Strategy) -> str:
    from penjing.backends.torch.masks import masks_of

    if strategy.optimizer not in SHARDABLE:
        return f"{strategy.optimizer} does not take sharded tensors"
    for name in ("sam", "ghost_batch", "recompute"):
        if getattr(strategy, name):
            return name
    if masks_of(model):
        return "weights that a mask holds at zero"
    if is_watched(model):
        return "layers that are watched"
    return ""


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the outermost members of lists of modules that hold parameters."""
    from torch import nn

    found: list[nn.Module] = []
    inside: set[int] = set()
    for parent in model.modules():
        if not isinstance(parent, nn.ModuleList | nn.Sequential) or parent is model or id(parent) in inside:
            continue
        for child in parent.children():
            inside.update(id(module) for module in child.modules())
            if next(child.parameters(), None) is not None:
                found.append(child)
    return found
