"""Which calls of a stored graph are torch's own layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class LayerCall:
    """A call that a module of torch does exactly.

    Attributes:
        name: of the module, which its tensors share.
        kind: the module's class.
        settings: of its constructor, as `(name, value)` pairs.
        holds: the local names of its tensors.
        input: the place of the layer's input among the arguments.
    """

    name: str
    kind: type[nn.Module]
    settings: tuple[tuple[str, Any], ...]
    holds: frozenset[str]
    input: int = 0

    def make(self) -> nn.Module:
        """Return a new module."""
        return self.kind(**dict(self.settings), device="meta")


def match_layer(entry: Mapping[str, Any], tensors: Mapping[str, Any]) -> LayerCall | None:
    """Return the layer that a stored call is; None where its tensors are not those of one module."""
    find = _LAYERS.get(entry["op"])
    try:
        return None if find is None else find(entry, tensors)
    except (KeyError, TypeError, ValueError, IndexError):
        # Whatever does not read as the layer stays a call of the operator.
        return None


def _tensors(entry: Mapping[str, Any], places: Mapping[str, int]) -> tuple[str, frozenset[str]] | None:
    """Return the module whose tensors stand at these places, and which of them there are."""
    given, args = {}, entry["args"]
    for local, place in places.items():
        if place < len(args) and args[place] is not None:
            given[local] = args[place]["tensor"]
    owner = given["weight"].rpartition(".")[0]
    if not owner or any(name != f"{owner}.{local}" for local, name in given.items()):
        return None
    return owner, frozenset(given)


def _argument(entry: Mapping[str, Any], place: int, default: Any) -> Any:
    args = entry["args"]
    value = args[place] if place < len(args) else default
    if any(isinstance(item, dict) for item in (value if isinstance(value, list) else [value])):
        raise ValueError("a setting is a number")
    return value


def _convolution(kind: type[nn.Module], rank: int) -> Callable[..., LayerCall | None]:
    def find(entry: Mapping[str, Any], tensors: Mapping[str, Any]) -> LayerCall | None:
        found = _tensors(entry, {"weight": 1, "bias": 2})
        if found is None:
            return None
        rows, columns, *kernel = tensors[f"{found[0]}.weight"]["shape"]
        groups = _argument(entry, 6, 1)
        padding = _argument(entry, 4, 0)
        settings = {
            "in_channels": columns * groups,
            "out_channels": rows,
            "kernel_size": tuple(kernel),
            "stride": _each(_argument(entry, 3, 1), rank),
            "padding": padding if isinstance(padding, str) else _each(padding, rank),
            "dilation": _each(_argument(entry, 5, 1), rank),
            "groups": groups,
            "bias": "bias" in found[1],
        }
        return LayerCall(found[0], kind, tuple(settings.items()), found[1])

    return find


def _each(value: Any, rank: int) -> tuple[int, ...]:
    numbers = value if isinstance(value, list) else [value]
    return tuple(numbers * rank if len(numbers) == 1 else numbers)


def _linear(entry: Mapping[str, Any], tensors: Mapping[str, Any]) -> LayerCall | None:
    found = _tensors(entry, {"weight": 1, "bias": 2})
    if found is None:
        return None
    rows, columns = tensors[f"{found[0]}.weight"]["shape"]
    settings = {"in_features": columns, "out_features": rows, "bias": "bias" in found[1]}
    return LayerCall(found[0], nn.Linear, tuple(settings.items()), found[1])


def _batchnorm(entry: Mapping[str, Any], tensors: Mapping[str, Any]) -> LayerCall | None:
    places = {"weight": 1, "bias": 2, "running_mean": 3, "running_var": 4}
    found = _tensors(entry, places)
    follows_the_mode = entry["args"][5] == {"training": True}
    if found is None or found[1] != set(places) or not follows_the_mode:
        return None
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[entry["rank"]]
    settings = {
        "num_features": tensors[f"{found[0]}.weight"]["shape"][0],
        "momentum": float(_argument(entry, 6, 0.1)),
        "eps": float(_argument(entry, 7, 1e-5)),
    }
    counted = f"{found[0]}.num_batches_tracked" in tensors
    holds = found[1] | {"num_batches_tracked"} if counted else found[1]
    return LayerCall(found[0], kind, tuple(settings.items()), holds)


def _layernorm(entry: Mapping[str, Any], tensors: Mapping[str, Any]) -> LayerCall | None:
    found = _tensors(entry, {"weight": 2, "bias": 3})
    if found is None:
        return None
    shape = tuple(_argument(entry, 1, None))
    settings = {
        "normalized_shape": shape,
        "eps": float(_argument(entry, 4, 1e-5)),
        "bias": "bias" in found[1],
    }
    return LayerCall(found[0], nn.LayerNorm, tuple(settings.items()), found[1])


def _embedding(entry: Mapping[str, Any], tensors: Mapping[str, Any]) -> LayerCall | None:
    found = _tensors(entry, {"weight": 0})
    if found is None or any(_argument(entry, place, False) for place in (3, 4)):
        return None
    padding = _argument(entry, 2, -1)
    count, width = tensors[f"{found[0]}.weight"]["shape"]
    settings = {
        "num_embeddings": count,
        "embedding_dim": width,
        "padding_idx": None if padding < 0 else padding,
    }
    return LayerCall(found[0], nn.Embedding, tuple(settings.items()), found[1], input=1)


_LAYERS: dict[str, Callable[..., LayerCall | None]] = {
    "aten.conv1d.default": _convolution(nn.Conv1d, 1),
    "aten.conv2d.default": _convolution(nn.Conv2d, 2),
    "aten.conv3d.default": _convolution(nn.Conv3d, 3),
    "aten.conv1d.padding": _convolution(nn.Conv1d, 1),
    "aten.conv2d.padding": _convolution(nn.Conv2d, 2),
    "aten.conv3d.padding": _convolution(nn.Conv3d, 3),
    "aten.linear.default": _linear,
    "aten.batch_norm.default": _batchnorm,
    "aten.layer_norm.default": _layernorm,
    "aten.embedding.default": _embedding,
}
