"""BatchNorm layers that normalize by the batch at hand, so that a changed network is judged repaired."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn


def batchnorms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the BatchNorm layers of a module that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    }


@contextlib.contextmanager
def normalizing_by_batch(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let these layers normalize by each batch's own statistics, all else in evaluation mode.

    What a network computes so is what it computes after its statistics are re-estimated on that batch (Wu &
    Johnson 2021, "Rethinking 'Batch' in BatchNorm"). Modes and running statistics are put back.
    """
    layers = tuple(layers)
    modes = [(module, module.training) for module in model.modules()]
    saved = [{key: b.clone() for key, b in m.named_buffers(recurse=False)} for m in layers]
    try:
        model.eval()
        for module in layers:
            module.train()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for module, buffers in zip(layers, saved, strict=True):
                for key, buffer in module.named_buffers(recurse=False):
                    buffer.copy_(buffers[key])
