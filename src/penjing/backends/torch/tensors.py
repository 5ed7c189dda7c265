"""Tensors of a module as NumPy arrays and back, layers by name, devices, modes and outputs."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from penjing.backends.torch.quantizers import Quantizer
from penjing.core.backend import Arrays, Layer, Window
from penjing.core.errors import Refused, nearest

Selector = int | str | Callable[..., Any] | None

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode, and every submodule back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """Return a copy as an array; bfloat16, which NumPy lacks, as float32, which holds all its values.

    >>> to_numpy(torch.ones(2, dtype=torch.bfloat16))
    array([1., 1.], dtype=float32)
    """
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    array: NDArray[Any] = tensor.cpu().numpy().copy()
    return array


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a module's tensors, `cpu` for a module without any."""
    return next((t.device for t in tensors_of(model).values()), torch.device("cpu"))


def to_inputs(model: nn.Module, arrays: Arrays) -> tuple[Tensor, ...]:
    """Turn arrays into tensors on the model's device; floats take the model's float type."""
    device = device_of(model)
    float_type = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    tensors = []
    for array in arrays:
        tensor = torch.from_numpy(np.ascontiguousarray(array).copy()).to(device)
        if float_type is not None and tensor.is_floating_point():
            tensor = tensor.to(float_type)
        tensors.append(tensor)
    return tuple(tensors)


def input_names(model: nn.Module, count: int) -> list[str]:
    """Return the names of the first `count` arguments of the model's forward."""
    if isinstance(model, Selected):
        return input_names(model.model, count)
    given = getattr(model, "input_names", None)
    if isinstance(given, tuple) and len(given) == count:
        return list(given)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [n for n, p in inspect.signature(model.forward).parameters.items() if p.kind in kinds]
    return [named[i] if i < len(named) else f"input{i}" for i in range(count)]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by name, tied ones under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers that a module itself holds."""
    return dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))


def list_layers(model: nn.Module) -> tuple[Layer, ...]:
    """List the modules that hold tensors, each once, in the order of the model."""
    found = []
    for name, module in model.named_modules():
        tensors = own_tensors(module)
        if tensors and not isinstance(module, Quantizer):
            shapes = {n: tuple(t.shape) for n, t in tensors.items()}
            found.append(Layer(name, kind_of(module), shapes, window_of(module)))
    return tuple(found)


_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def window_of(module: nn.Module) -> Window | None:
    """Return how a convolution reads its input; None for every other module."""
    if not isinstance(module, CONVOLUTIONS):
        return None
    kernel, dilation, padding = module.kernel_size, module.dilation, module.padding
    if isinstance(padding, str):
        wide = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        sides = tuple((w // 2, w - w // 2) for w in wide)
    else:
        sides = tuple((p, p) for p in padding)
    return Window(kernel, module.stride, sides, dilation, module.groups, _MODES[module.padding_mode])


def kind_of(module: nn.Module) -> str:
    """Return the field's word for a module: conv, depthwise, linear, batchnorm, embedding or other.

    >>> kind_of(nn.Conv2d(8, 8, 3, groups=8))
    'depthwise'
    """
    if isinstance(module, CONVOLUTIONS):
        return "depthwise" if 1 < module.groups == module.in_channels else "conv"
    for kinds, word in (
        (nn.Linear, "linear"),
        (nn.modules.batchnorm._BatchNorm, "batchnorm"),
        (nn.Embedding, "embedding"),
    ):
        if isinstance(module, kinds):
            return word
    return "other"


def find_layer(model: nn.Module, layer: str) -> nn.Module:
    """Return the module of a layer.

    Raises:
        Refused: no module has this name.
    """
    try:
        return model.get_submodule(layer)
    except AttributeError as error:
        known = [name for name, _ in model.named_modules()]
        raise Refused("must be a layer of the model", place=repr(layer), fix=nearest(layer, known)) from error


def read(model: nn.Module, layer: str) -> dict[str, NDArray[Any]]:
    """Return copies of a layer's tensors."""
    return {name: to_numpy(tensor) for name, tensor in own_tensors(find_layer(model, layer)).items()}


def write(model: nn.Module, layer: str, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Replace values of a layer's tensors in place, so that tied weights stay tied.

    Raises:
        Refused: an unknown tensor, another shape, or a value that is not finite.
    """
    own = own_tensors(find_layer(model, layer))
    for name, array in tensors.items():
        place = f"{layer}.{name}"
        if name not in own:
            raise Refused("must be a tensor of the layer", place=place, fix=nearest(name, own))
        if tuple(own[name].shape) != array.shape:
            raise Refused(
                "must keep its shape",
                place=place,
                value=f"{array.shape} for {tuple(own[name].shape)}",
                fix="cut channels with `keep`, which fits everything that is joined to them",
            )
        if not np.isfinite(array).all():
            raise Refused(
                "must be written with finite values",
                place=place,
                fix="look for overflow or a division by zero in what was computed",
            )
    with torch.no_grad():
        for name, array in tensors.items():
            own[name].copy_(torch.from_numpy(np.ascontiguousarray(array)))


def select_output(output: Any, selector: Selector = None) -> Tensor:
    """Return the one tensor that counts of what a model returned.

    Args:
        output: a tensor, or a tuple, list, mapping or object with attributes.
        selector: position, key or attribute name, or a function; None where the output is a tensor.

    Raises:
        Refused: no tensor there; the message lists what the model returned.

    >>> select_output({"logits": torch.zeros(2, 5), "state": None}, "logits").shape
    torch.Size([2, 5])
    """
    chosen = output
    if callable(selector):
        chosen = selector(output)
    elif selector is not None:
        try:
            chosen = _item(output, selector)
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            raise _no_tensor(output, repr(selector)) from error
    if not isinstance(chosen, torch.Tensor):
        raise _no_tensor(output, repr(selector))
    return chosen


def _item(output: Any, selector: int | str) -> Any:
    if isinstance(selector, str):
        return output[selector] if isinstance(output, Mapping) else getattr(output, selector)
    return list(output.values())[selector] if isinstance(output, Mapping) else output[selector]


def _no_tensor(output: Any, selector: str) -> Refused:
    kind = type(output).__name__
    if isinstance(output, Mapping):
        holds = f"{kind} with keys {', '.join(map(repr, output))}"
    elif isinstance(output, tuple | list):
        holds = f"{kind} of {len(output)}: {', '.join(type(o).__name__ for o in output)}"
    elif output is None or isinstance(output, torch.Tensor):
        holds = kind
    else:
        holds = (
            f"{kind} with attributes {', '.join(vars(output)) if hasattr(output, '__dict__') else 'unknown'}"
        )
    return Refused(
        "must select a tensor among the outputs of the model",
        place="task.output",
        value=f"{holds}; selector {selector}",
        fix="name the output that counts: task.output='logits' or =0",
    )


class Selected(nn.Module):  # type: ignore[misc]
    """A model of which one output counts; layers keep their names under `model.`."""

    def __init__(self, model: nn.Module, selector: Selector) -> None:
        super().__init__()
        self.model = model
        self.selector = selector
        self.training = model.training

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run the model and return the selected tensor."""
        return select_output(self.model(*inputs), self.selector)
