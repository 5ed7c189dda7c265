"""Train each block of a changed network to give what the original's block gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from penjing.core.context import Context
from penjing.core.method import Change, Method, Model, Outcome, Stage, handles

KINDS = ("conv", "depthwise", "linear")


class ReconstructBlocks(Method):
    """Train weights behind a cut or a mask, block by block, to the outputs that the original's blocks had.

    Blocks in the order of the model, each on what the repaired blocks before it give: all its weights, biases
    and normalization learn the least squared error to the original's output, on the channels that are left.
    Statistics of BatchNorm stay; masked weights stay zero. Labels are not used, and nothing is trained
    through the whole network. The reconstruction of Li et al. 2021, "BRECQ", with weights in place of
    rounding. Follows `LeastSquares`, which brings the layers near in closed form.

    Attributes:
        examples: of the training data, at least 32; a block's inputs and outputs on them are kept in memory.
        steps: of Adam for each block.
        size: examples in each.
        lr: first rate, falling to 0 along a cosine.
        block: most convolutions and linear layers in a block.
    """

    stage: ClassVar[Stage] = Stage.WEIGHTS
    examples: int = Field(default=1024, ge=32, le=1_000_000)
    steps: int = Field(default=500, ge=1, le=1_000_000)
    size: int = Field(default=32, ge=1)
    lr: float = Field(default=1e-3, gt=0, le=1)
    block: int = Field(default=4, ge=1)


@dataclass(frozen=True)
class _Block:
    """A block, what it is given now, and what the original's block gave on the channels that are left."""

    module: Any
    given: Any
    wanted: Any


@handles(ReconstructBlocks, "torch")
def reconstruct_blocks(model: Model, method: ReconstructBlocks, context: Context) -> Outcome:
    """Repair block after block; one change for every convolution and linear layer.

    Raises:
        Refused: fewer than 32 training examples.
    """
    from penjing.backends.torch.blockwise import partition, relative_error, seen
    from penjing.backends.torch.comparison import compare

    kinds = {layer.name: layer.kind for layer in context.backend.layers(model)}
    layers = [name for name, kind in kinds.items() if kind in KINDS and context.covers(name)]
    if not layers:
        return Outcome(model, [_skipped("", "no convolution or linear layer")])
    found = compare(model, layers, method.examples, context)
    blocks = partition(model, found.layers, tuple(x[:2] for x in found.inputs), method.block)
    known = {name for name, _ in found.original.named_modules()}
    changes = {name: found.reasons.get(name, "it is called several times, or on several tensors")
               for name in layers}  # fmt: skip
    done: list[Change] = []
    for number, name in enumerate(blocks, 1):
        context.say(f"ReconstructBlocks: {name} ({number} of {len(blocks)})")
        inside = [layer for layer in found.layers if layer == name or layer.startswith(f"{name}.")]
        wanted = seen(found.original, name, found.inputs)[1] if name in known else None
        given, made = seen(model, name, found.inputs)
        wanted = None if wanted is None else _left(made, wanted, inside, found.kept)
        if wanted is None:
            changes |= dict.fromkeys(inside, f"the outputs of {name} are not channels of the original's")
            continue
        block = _Block(model.get_submodule(name), given, wanted)
        before = relative_error(block.module, given, wanted)
        if before > 0:
            _learn(block, method, context.seed)
        after = relative_error(block.module, given, wanted)
        for layer in inside:
            detail: dict[str, float | int | str] = {
                "block": name,
                "error_before": before,
                "error_after": after,
            }
            if before > 0:
                del changes[layer]
                done.append(Change(method="ReconstructBlocks", layer=layer, status="done", detail=detail))
            else:
                changes[layer] = f"the outputs of {name} are those of the original"
    return Outcome(model, [*done, *(_skipped(name, reason) for name, reason in changes.items())])


def _left(made: Any, wanted: Any, layers: list[str], kept: Mapping[str, NDArray[np.int64]]) -> Any | None:
    """Return the original's output on the channels that the block still gives; None where not known."""
    if made.shape == wanted.shape:
        return wanted
    axis = 1 if made.ndim > 3 else made.ndim - 1
    if made.shape[:axis] + made.shape[axis + 1 :] != wanted.shape[:axis] + wanted.shape[axis + 1 :]:
        return None
    for layer in reversed(layers):
        channels = kept[layer]
        if len(channels) == made.shape[axis] and channels.max(initial=0) < wanted.shape[axis]:
            return wanted.index_select(axis, wanted.new_tensor(channels).long())
    return None


def _learn(block: _Block, method: ReconstructBlocks, seed: int) -> None:
    """Train a block in place, in evaluation mode; put the weights back where that does not help."""
    import torch

    from penjing.backends.torch.blockwise import relative_error
    from penjing.backends.torch.masks import enforce
    from penjing.backends.torch.tensors import evaluating

    module, given, wanted = block.module, block.given, block.wanted
    before = relative_error(module, given, wanted)
    old = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    learning = [p for p in module.parameters() if p.is_floating_point()]
    flags = [p.requires_grad for p in learning]
    scale = 1 / max(float(wanted.square().mean()), 1e-30)
    generator = torch.Generator().manual_seed(seed)
    try:
        for parameter in learning:
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(learning, method.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, method.steps)
        with evaluating(module), torch.enable_grad():
            for _ in range(method.steps):
                chosen = torch.randint(len(given), (method.size,), generator=generator)
                loss = scale * (module(given[chosen]) - wanted[chosen]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                enforce(module)
    finally:
        for parameter, flag in zip(learning, flags, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None
    if not relative_error(module, given, wanted) <= before:
        module.load_state_dict(old)


def _skipped(layer: str, reason: str) -> Change:
    return Change(method="ReconstructBlocks", layer=layer, status="skipped", reason=reason)
