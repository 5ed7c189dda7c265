"""The weights of a module in one safetensors file; masked tensors take the room of what is kept.

A tensor `NAME` with a mask is written as two: `NAME.mask`, one bit for each weight (see
`penjing.arrays.sparse_storage`), and `NAME.values`, those that are kept. Everything else is as safetensors
writes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, load_model, save_file, save_model

from penjing.arrays.sparse_storage import pack, unpack, unpack_mask
from penjing.backends.torch.masks import masks_of, set_masks
from penjing.backends.torch.tensors import tensors_of
from penjing.core.errors import Refused

MASK, VALUES = ".mask", ".values"


def save(module: torch.nn.Module, path: Path) -> None:
    """Write parameters and buffers, tied ones once.

    Raises:
        Refused: a weight that a mask removes is not zero.
    """
    save_model(module, str(path))
    masks = masks_of(module)
    if not masks:
        return
    tensors = load_file(path)
    for name in masks.keys() & tensors.keys():
        # Adding zero makes 0 of -0, whose bits are not all zero.
        dense = tensors.pop(name) + 0
        try:
            bits, values = pack(_array(dense), masks[name])
        except ValueError as error:
            raise Refused(
                "a weight that a mask removes must be zero",
                value=error,
                place=name,
                fix="write the weights first and set their mask then",
            ) from error
        tensors[name + MASK] = torch.from_numpy(bits)
        tensors[name + VALUES] = torch.from_numpy(values).view(dense.dtype)
    save_file(tensors, path, {"format": "pt"})


def load(module: torch.nn.Module, path: Path) -> None:
    """Read weights and masks into a module that has exactly these tensors.

    Raises:
        RuntimeError: names or shapes differ; the lines after the first say which.
        safetensors.SafetensorError: the file is damaged.
    """
    tensors = load_file(path)
    named = tensors_of(module)
    packed = [n for n in named if n not in tensors and n + MASK in tensors and n + VALUES in tensors]
    if not packed:
        load_model(module, str(path), strict=True)
        return
    masks = {}
    for name in packed:
        bits, values = tensors.pop(name + MASK).numpy(), tensors.pop(name + VALUES)
        tensors[name], masks[name] = _unpacked(name, bits, values, tuple(named[name].shape))
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    there = {id(named[name]) for name in tensors if name in named}
    lost = [name for name in missing if id(named.get(name)) not in there]
    if lost or unexpected:
        raise RuntimeError(f"The tensors differ:\nmissing: {lost}\nunexpected: {unexpected}")
    set_masks(module, {name: mask for name, mask in masks.items() if mask.any()})


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    """Return the tensor's numbers as bits of the same width: NumPy lacks some of torch's types."""
    widths = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    array: NDArray[Any] = tensor.contiguous().view(widths[tensor.element_size()]).numpy()
    return array


def _unpacked(
    name: str, bits: NDArray[np.uint8], values: torch.Tensor, shape: tuple[int, ...]
) -> tuple[torch.Tensor, NDArray[np.bool_]]:
    try:
        dense, mask = unpack(bits, _array(values), shape), unpack_mask(bits, shape)
    except ValueError as error:
        raise RuntimeError(f"The tensors differ:\n{name}: {error}") from error
    return torch.from_numpy(dense).view(values.dtype), mask
