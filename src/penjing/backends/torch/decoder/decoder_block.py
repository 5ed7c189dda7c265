"""One block of a decoder of the transformers library as a module of its own."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import nn

from penjing.backends.torch.quantizers import quantized_layers

Call = dict[str, Any]
"""What the model gives a block beside the hidden states, by the names of its arguments."""


class Block(nn.Module):  # type: ignore[misc]
    """One block of a decoder as a module of hidden states `[n, length, width]`.

    It takes two of them: what the blocks before it give as they are now, and what they gave in float. It
    computes on the first once a layer in it rounds, on the second before.
    """

    def __init__(self, name: str, module: nn.Module, call: Call) -> None:
        super().__init__()
        self.name, self.call = name, call
        self._given = dict(call)
        parent: nn.Module = self
        *path, leaf = name.split(".")
        for part in path:
            parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(leaf, module)
        module.register_forward_pre_hook(partial(_beside, self._given), with_kwargs=True)

    @property
    def module(self) -> nn.Module:
        """The transformers module; it is called with hidden states alone, a hook adds the rest."""
        return self.get_submodule(self.name)

    def forward(self, now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Return the hidden states behind the block."""
        rounds = next(quantized_layers(self), None) is not None
        return self.through(now if rounds else before, self.call)

    def through(self, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """Return the hidden states behind the block for those before it, with its further arguments."""
        self._given.clear()
        self._given.update(call)
        output = self.module(hidden)
        return output[0] if isinstance(output, tuple) else output


def _beside(
    call: Call, module: nn.Module, given: tuple[Any, ...], named: Call
) -> tuple[tuple[Any, ...], Call]:
    """Add what a block takes beside the hidden states, before it is called."""
    return given, call | named


def named_arguments(block: type[nn.Module], given: tuple[Any, ...]) -> Call:
    """Return the arguments of a block behind the first by their names."""
    names = [name for name in inspect.signature(block.forward).parameters if name != "self"][1:]
    return dict(zip(names, given, strict=False))


def transposed_linear_class() -> type[nn.Module]:
    """Return the library's linear layer with a weight `[in, out]`, as GPT-2 has."""
    from transformers.pytorch_utils import Conv1D

    kind: type[nn.Module] = Conv1D
    return kind


def replace_transposed_linear(module: nn.Module) -> None:
    """Put `nn.Linear` in the place of linear layers whose weight is `[in, out]`, in place."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, transposed_linear_class()):
            inputs, outputs = layer.weight.shape
            new = nn.Linear(inputs, outputs, device="meta")
            new.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=False)
            new.bias = layer.bias
            place = module.get_submodule(name.rpartition(".")[0])
            setattr(place, name.rpartition(".")[2], new.train(layer.training))


def parent_of(model: nn.Module, name: str) -> nn.Module:
    """Return the module that holds a tensor."""
    return model.get_submodule(name.rpartition(".")[0])


def tensor_at(model: nn.Module, name: str) -> torch.Tensor:
    """Return a tensor by its name in the model's state."""
    return getattr(parent_of(model, name), name.rpartition(".")[2])


def set_tensor(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor where a parameter or a buffer of the model is."""
    parent, leaf = parent_of(model, name), name.rpartition(".")[2]
    if leaf in parent._buffers or isinstance(tensor, nn.Parameter):
        setattr(parent, leaf, tensor)
    else:
        setattr(parent, leaf, nn.Parameter(tensor, requires_grad=False))
