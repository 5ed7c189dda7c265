"""Masks: which weights of a module stay zero, whatever trains, copies, cuts or saves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from penjing.core.errors import Refused, nearest

MASKS = "_penjing_masks"
"""Attribute of a submodule: its own tensors' masks by local name. No buffer, so that state_dict stays the
user's; copies, pickles and wrappers carry it along."""

Masks = dict[str, NDArray[np.bool_]]
"""By tensor name: an array of the tensor's shape, True where the weight is kept."""


def masks_of(model: nn.Module) -> Masks:
    """Return copies of a module's masks by tensor name, tied tensors under each name; empty without any."""
    return {f"{name}.{local}".lstrip("."): mask.cpu().numpy().copy() for name, local, mask in _walk(model)}


def set_masks(model: nn.Module, masks: Mapping[str, NDArray[np.bool_]]) -> None:
    """Mask tensors in place and zero what their masks remove; masks of tensors not named stay.

    A mask replaces the one that its tensor had before; one that keeps everything takes it away. Tied tensors
    share their mask.

    Raises:
        Refused: no parameter of this name, another shape or type, or a mask that keeps nothing.

    >>> net = nn.Linear(2, 2)
    >>> set_masks(net, {"weight": np.eye(2, dtype=bool)})
    >>> net.weight[0, 1].item(), net.weight[1, 0].item()
    (0.0, 0.0)
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        _check(parameters, name, mask)
    wanted = {id(parameters[name]): mask for name, mask in masks.items()}
    for module in model.modules():
        own = dict(getattr(module, MASKS, {}))
        for local, parameter in module.named_parameters(recurse=False):
            chosen = wanted.get(id(parameter))
            if chosen is None:
                continue
            own.pop(local, None)
            if not chosen.all():
                own[local] = torch.from_numpy(np.array(chosen)).to(parameter.device)
        if own or hasattr(module, MASKS):
            setattr(module, MASKS, own)
    enforce_masks(model)


How = TypeVar("How")


def enforce_masks(model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Zero every weight that a mask removes, its gradient, and what an optimizer remembers of it."""
    with torch.no_grad():
        for parameter, mask in masked_parameters(model):
            gone = mask.logical_not()
            remembered = () if optimizer is None else optimizer.state.get(parameter, {}).values()
            for tensor in (parameter, parameter.grad, *remembered):
                if isinstance(tensor, torch.Tensor) and tensor.shape == mask.shape:
                    tensor.masked_fill_(gone, 0)


def masked_parameters(model: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield each masked parameter once, with its mask (bool, True where kept) on the same device."""
    seen = set()
    for name, local, mask in _walk(model):
        parameter = model.get_submodule(name)._parameters[local]
        if parameter is not None and id(parameter) not in seen:
            seen.add(id(parameter))
            yield parameter, mask.to(parameter.device)


def slice_masks(model: nn.Module, cuts: Mapping[int, How], cut: Callable[[Tensor, How], Tensor]) -> None:
    """Let masks follow tensors that are about to be cut.

    Args:
        model: its tensors are the whole ones still.
        cuts: by `id` of a tensor, how it will be cut.
        cut: cuts a tensor so.
    """
    for module in model.modules():
        own = getattr(module, MASKS, {})
        for local, mask in list(own.items()):
            how = cuts.get(id(module._parameters[local]))
            if how is not None:
                own[local] = cut(mask, how)


def count_zeros(model: nn.Module) -> tuple[int, int]:
    """Return how many weights the masks remove, and how many weights the masked tensors have."""
    counts = [(int(mask.numel() - mask.sum()), mask.numel()) for _, mask in masked_parameters(model)]
    return sum(zeros for zeros, _ in counts), sum(weights for _, weights in counts)


def _walk(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    for name, module in model.named_modules(remove_duplicate=False):
        for local, mask in getattr(module, MASKS, {}).items():
            yield name, local, mask


def _check(parameters: Mapping[str, nn.Parameter], name: str, mask: Any) -> None:
    if name not in parameters:
        raise Refused(
            "a mask must be of a parameter of the model",
            value=repr(name),
            place="set_masks",
            fix=nearest(name, parameters),
        )
    shape = tuple(parameters[name].shape)
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != shape:
        found = f"{mask.dtype} {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise Refused(
            f"needs a boolean mask of shape {shape}",
            place=name,
            value=found,
            fix="make it with np.ones(shape, bool) and set False where weights go",
        )
    if not mask.any():
        raise Refused(
            "a mask must keep at least one weight",
            value=f"0 of {mask.size}",
            place=name,
            fix="lower the sparsity, or remove the layer",
        )
