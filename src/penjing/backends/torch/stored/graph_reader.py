"""A module from a stored graph: real layers where the graph says so, and nothing run that the file names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from penjing.backends.torch.cut.exported import NAMES, Code, ExportedNet
from penjing.backends.torch.stored.bounds import check_integers
from penjing.backends.torch.stored.graph_json import (
    FORMAT,
    WRITE_AGAIN,
    check_keywords,
    check_name,
    decode,
    find_dtype,
    find_operator,
)
from penjing.backends.torch.stored.standard_layers import LayerCall, match_layer
from penjing.core.errors import Refused

MOST_NODES = 1_000_000


def build_net(data: Any, constants: Mapping[str, Tensor]) -> ExportedNet:
    """Make the module that a stored graph describes; parameters and persistent buffers are zeros.

    Convolutions, linear layers, BatchNorm, LayerNorm and embeddings are modules under their old names: the
    result trains, prunes and exports as the original did.

    Args:
        data: what `graph_writer.describe_graph` wrote, read from JSON; not trusted.
        constants: the tensors that it names as constants.

    Raises:
        Refused: anything that `describe_graph` does not write.
    """
    try:
        return _Reader(data, constants).net()
    except (
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        AttributeError,
        RuntimeError,
        OverflowError,
    ) as error:
        line = (str(error).strip().splitlines() or [""])[0][:200]
        raise Refused(
            "must describe a graph",
            value=f"{type(error).__name__}: {line}",
            place="graph.json",
            fix=WRITE_AGAIN,
        ) from error


class _Reader:
    def __init__(self, data: Any, constants: Mapping[str, Tensor]) -> None:
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise Refused(
                "must have a known format",
                place="graph.json",
                value=repr(data.get("format") if isinstance(data, dict) else data)[:40],
                fix="open the artefact with the version of Penjing that wrote it",
            )
        self._data = data
        self._root = nn.Module()
        self._graph = fx.Graph()
        self._tensors = self._make_tensors(data["tensors"], constants)
        self._names = tuple(check_name(name, "an input") for name in data["inputs"])
        self._inputs = [self._graph.placeholder(f"input_{i}") for i in range(len(self._names))]
        self._nodes: list[fx.Node] = []
        self._placed: dict[str, LayerCall] = {}

    def net(self) -> ExportedNet:
        if len(self._data["nodes"]) > MOST_NODES:
            raise Refused(
                "a stored graph must have at most a million nodes",
                value=len(self._data["nodes"]),
                place="graph.json",
                fix=WRITE_AGAIN,
            )
        check_integers(self._data["nodes"])
        for entry in self._data["nodes"]:
            self._nodes.append(self._call(entry))
        outputs = decode(list(self._data["outputs"]), self._resolve)
        self._graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
        code = self._graph.python_code("self")
        assert set(code.globals) <= {*NAMES, "fx_pytree", "pytree"}, (
            "only operators of torch are in the graph"
        )
        return ExportedNet(self._root, Code(code.src), self._names)

    def _make_tensors(self, described: Any, constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for name, entry in described.items():
            check_name(name, "a tensor")
            role, shape, dtype = entry["role"], [int(n) for n in entry["shape"]], find_dtype(entry["dtype"])
            if role == "tied":
                made[name] = made[entry["to"]]
            elif role == "constant":
                made[name] = constants[name]
            else:
                made[name] = torch.zeros(shape, dtype=dtype)
            if list(made[name].shape) != shape or made[name].dtype != dtype:
                raise Refused(
                    "a stored tensor must have the described shape and type",
                    place="graph.json",
                    value=f"{name}: {list(made[name].shape)}",
                    fix=WRITE_AGAIN,
                )
            if role == "parameter":
                made[name] = nn.Parameter(made[name], requires_grad=dtype.is_floating_point)
            self._register(name, made[name], persistent=role != "constant")
        return made

    def _register(self, name: str, tensor: Tensor, persistent: bool) -> None:
        owner, _, local = name.rpartition(".")
        place = self._owner(owner)
        if hasattr(place, local):
            raise Refused(
                "names of stored tensors must be free",
                value=name,
                place="graph.json",
                fix=WRITE_AGAIN,
            )
        if isinstance(tensor, nn.Parameter):
            place.register_parameter(local, tensor)
        else:
            place.register_buffer(local, tensor, persistent=persistent)

    def _owner(self, path: str) -> nn.Module:
        place = self._root
        for part in path.split(".") if path else ():
            if part not in place._modules:
                if hasattr(place, part):
                    raise Refused(
                        "names of stored modules must be free",
                        value=path,
                        place="graph.json",
                        fix=WRITE_AGAIN,
                    )
                place.add_module(part, nn.Module())
            place = place._modules[part]
        return place

    def _call(self, entry: Any) -> fx.Node:
        target = find_operator(entry["op"])
        keywords = entry.get("kwargs", {})
        check_keywords(target, keywords)
        layer = None if keywords else match_layer(entry, self._data["tensors"])
        if layer is not None and self._place(layer):
            return self._graph.call_module(layer.name, (decode(entry["args"][layer.input], self._resolve),))
        args = decode(list(entry["args"]), self._resolve)
        return self._graph.call_function(
            target, tuple(args), {k: decode(v, self._resolve) for k, v in keywords.items()}
        )

    def _place(self, layer: LayerCall) -> bool:
        """Put the layer's module where its tensors are; False where a module with other settings is there."""
        if layer.name in self._placed:
            return self._placed[layer.name] == layer
        here = self._owner(layer.name)
        held = here._parameters | here._buffers
        if type(here) is not nn.Module or here._modules or set(held) != layer.holds:
            return False
        module = layer.make()
        for local, tensor in held.items():
            store = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
            if local not in store or store[local].shape != tensor.shape:
                return False
            store[local] = tensor
        for local in set(module._buffers) - layer.holds:
            module._buffers[local] = None
        owner, _, local = layer.name.rpartition(".")
        self._owner(owner)._modules[local] = module
        self._placed[layer.name] = layer
        return True

    def _resolve(self, kind: str, value: Any) -> fx.Node:
        if kind == "node" and type(value) is int and 0 <= value < len(self._nodes):
            return self._nodes[value]
        if kind == "input" and type(value) is int and 0 <= value < len(self._inputs):
            return self._inputs[value]
        if kind == "tensor" and isinstance(value, str) and value in self._tensors:
            return self._graph.get_attr(value)
        if kind == "training" and value is True:
            return self._graph.get_attr("training")
        raise Refused(
            "a stored argument must be of a known kind",
            value=repr({kind: value})[:80],
            place="graph.json",
            fix=WRITE_AGAIN,
        )
