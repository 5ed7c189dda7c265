"""Cut channels out of a module: slice its tensors, fix its attributes, verify against a masked run."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from penjing.backends.torch.cut.rewrite import build_exported_net
from penjing.backends.torch.cut.verify import Proof
from penjing.backends.torch.graph.flow import TorchGroups
from penjing.backends.torch.masks import slice_masks as slice_masks
from penjing.backends.torch.structure.history import record_lineage, record_step
from penjing.backends.torch.tensors import CONVOLUTIONS, device_of, tensors_of
from penjing.core.backend import Group, Groups
from penjing.core.errors import Refused, nearest

Kept = Mapping[str, NDArray[np.int64]]


def keep(model: nn.Module, groups: Groups, kept: Kept) -> nn.Module:
    """Return a copy of the module with only some units of its groups.

    The user's own class is kept where its code works with other widths. Where it has a width written into
    it, the captured graph with its constants rewritten stands in (`ExportedNet`, the same parameter names).
    Either way the result's output equals that of the model with the units masked, on examples.

    Args:
        model: unchanged.
        groups: what `groups` returned for this model.
        kept: for some groups, by name, the units that stay: sorted, unique, at least one.

    Raises:
        Refused: wrong units or foreign groups, or neither way gives the masked model's output.

    >>> from penjing.backends.torch import BACKEND
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> groups = BACKEND.groups(net, (np.ones((1, 4), np.float32),))
    >>> keep(net, groups, {"0": np.array([0, 2, 5])})[2].weight.shape
    torch.Size([2, 3])
    """
    if not isinstance(groups, TorchGroups) or groups.flow is None:
        raise Refused(
            "groups must come from the torch backend",
            value=type(groups).__name__,
            place="keep",
            fix="pass what `groups(model, example)` returned for this model",
        )
    if device_of(model).type == "meta":
        raise Refused(
            "a model that is cut must have its weights",
            value="tensors on the meta device",
            place="keep",
            fix="load the weights first",
        )
    by_name = {group.name: group for group in groups.groups}
    units = {name: _check_units(by_name, name, chosen) for name, chosen in kept.items()}
    proof = Proof(model, groups.flow, units)
    sliced = _slice(copy.deepcopy(model), [by_name[name] for name in units], units)
    failure = proof.failure(sliced)
    result: nn.Module = sliced
    if failure:
        result = build_exported_net(model, sliced, groups.flow, units)
        second = proof.failure(result)
        if second:
            raise Refused(
                "the shrunk model's output must equal the masked model's",
                place="keep",
                value=f"{failure}; {second}",
                fix="prune fewer layers with only(...), and report the model",
            )
    cut = {name: [int(unit) for unit in chosen] for name, chosen in units.items()}
    view = {} if groups.flow.heads == "whole" else {"heads": groups.flow.heads}
    record_step(result, model, {"keep": cut, **view})
    return result


def _check_units(by_name: Mapping[str, Group], name: str, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    if name not in by_name:
        raise Refused(
            "the group must be one of the model's",
            value=repr(name),
            place="keep",
            fix=nearest(name, by_name),
        )
    group, units = by_name[name], np.asarray(chosen)
    if units.ndim != 1 or not units.size or units.dtype.kind not in "iu":
        raise Refused(
            "at least one unit of a group must stay",
            value=f"{units.tolist()} of {name}",
            place="keep",
            fix="keep one or more whole numbers of each group that is named",
        )
    if (np.diff(units) <= 0).any() or units[0] < 0 or units[-1] >= group.size:
        raise Refused(
            "kept units must be in the group, sorted, each once",
            value=f"{units.tolist()} of {name}",
            place="keep",
            fix=f"choose sorted units from 0 to {group.size - 1}",
        )
    counts = np.bincount(group.blocks[units], minlength=int(group.blocks.max()) + 1)
    if len(set(counts.tolist())) > 1:
        raise Refused(
            "every block must keep equally many units",
            value=f"{counts.tolist()} of {name}",
            place="keep",
            fix="choose as many units from each value of the group's `blocks`",
        )
    return units.astype(np.int64)


def _slice(model: nn.Module, groups: list[Group], units: Kept) -> nn.Module:
    """Slice every tensor that the groups see, under all its names, and fix module attributes."""
    masks: dict[tuple[str, str], dict[tuple[int, int], NDArray[np.bool_]]] = defaultdict(dict)
    for group in groups:
        stays = np.zeros(group.size + 1, bool)
        stays[units[group.name]] = True
        # Units of other groups have the number -1, which is the last entry.
        stays[-1] = True
        for slot in group.slots:
            axes, key = masks[slot.layer, slot.tensor], (slot.axis, len(slot.units))
            axes[key] = axes.get(key, np.ones(len(slot.units), bool)) & stays[slot.units]
    named = tensors_of(model)
    new = {
        id(named[f"{layer}.{tensor}".lstrip(".")]): _sliced(named[f"{layer}.{tensor}".lstrip(".")], axes)
        for (layer, tensor), axes in masks.items()
    }
    cuts = {id(named[f"{layer}.{tensor}".lstrip(".")]): axes for (layer, tensor), axes in masks.items()}
    slice_masks(model, cuts, _sliced)
    for module in model.modules():
        changed = False
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and id(tensor) in new:
                    store[name], changed = new[id(tensor)], True
        if changed:
            _fix_attributes(module)
    record_lineage(
        model, {f"{layer}.{tensor}".lstrip("."): _remaining(axes) for (layer, tensor), axes in masks.items()}
    )
    return model


def _remaining(axes: Mapping[tuple[int, int], NDArray[np.bool_]]) -> dict[int, NDArray[np.int64]]:
    return {axis: np.flatnonzero(mask).astype(np.int64) for (axis, _), mask in axes.items()}


def _sliced(tensor: Tensor, axes: Mapping[tuple[int, int], NDArray[np.bool_]]) -> Tensor:
    data = tensor.detach()
    ordinary = {axis: mask for (axis, length), mask in axes.items() if length == data.shape[axis]}
    grouped = next((mask for (axis, length), mask in axes.items() if length != data.shape[axis]), None)
    if grouped is not None:
        data = _sliced_blocks(data, ordinary.pop(0, np.ones(data.shape[0], bool)), grouped)
    for axis, mask in ordinary.items():
        data = data.index_select(axis, _index(mask, data))
    data = data.clone(memory_format=torch.contiguous_format)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(data, requires_grad=tensor.requires_grad)
    return data


def _sliced_blocks(data: Tensor, rows: NDArray[np.bool_], columns: NDArray[np.bool_]) -> Tensor:
    """Slice the weight of a grouped convolution: each block has its own rows and columns."""
    blocks = len(columns) // data.shape[1]
    parts = [
        block.index_select(0, _index(row, data)).index_select(1, _index(column, data))
        for block, row, column in zip(
            data.chunk(blocks), np.split(rows, blocks), np.split(columns, blocks), strict=True
        )
    ]
    return torch.cat(parts)


def _index(mask: NDArray[np.bool_], like: Tensor) -> Tensor:
    return torch.from_numpy(np.flatnonzero(mask)).to(like.device)


def _fix_attributes(module: nn.Module) -> None:
    """Make a module's own numbers agree with its tensors."""
    if isinstance(module, CONVOLUTIONS):
        rows, columns = module.weight.shape[:2]
        if 1 < module.groups == module.in_channels:
            module.groups = rows // (module.out_channels // module.in_channels)
        module.in_channels, module.out_channels = columns * module.groups, rows
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        rows, columns = module.weight.shape[:2]
        if 1 < module.groups == module.in_channels:
            module.groups = rows
        module.in_channels, module.out_channels = rows, columns * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        tensors = [t for t in (module.weight, module.bias, module.running_mean) if t is not None]
        module.num_features = len(tensors[0])
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(module.weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
