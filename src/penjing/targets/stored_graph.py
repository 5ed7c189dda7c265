"""The self-contained form of a torch artefact: the graph as data beside the weights; no class is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from penjing.backends.torch.cut.exported import ExportedNet
from penjing.backends.torch.cut.verify import TOLERANCE, difference, probes, run_quietly
from penjing.backends.torch.graph.capture import capture
from penjing.backends.torch.stored.graph_reader import build_net
from penjing.backends.torch.stored.graph_writer import describe_graph
from penjing.core.backend import Arrays
from penjing.core.errors import Refused
from penjing.targets import torch_weights

GRAPH = "graph.json"
CONSTANTS = "graph.safetensors"
"""Tensors that the graph uses and the state dict does not hold, where there are any."""


def write(module: torch.nn.Module, example: Arrays, folder: Path, weights: Path) -> str:
    """Write a module's graph into a folder and try it: read back, it must give the module's outputs.

    Args:
        weights: the module's tensors, written already.

    Returns:
        An empty string, or why the module has no self-contained form; then nothing is written.
    """
    try:
        captured = capture(module, example)
        data, constants = describe_graph(module, captured)
        (folder / GRAPH).write_text(json.dumps(data, separators=(",", ":"), allow_nan=False), "utf-8")
        if constants:
            save_file(constants, folder / CONSTANTS)
        _compare(
            _outputs(read(folder, weights), tuple(x.cpu() for x in probes(captured))),
            _outputs(module, probes(captured)),
        )
    except Refused as refusal:
        for name in (GRAPH, CONSTANTS):
            (folder / name).unlink(missing_ok=True)
        return str(refusal)
    return ""


def read(folder: Path, weights: Path) -> ExportedNet:
    """Make the module that a folder's graph describes, with its weights; it trains and exports.

    Only operators of aten are looked up by name; nothing in the file is run as code.

    Raises:
        Refused: damaged files, or a graph that holds anything else.
    """
    try:
        data = json.loads((folder / GRAPH).read_text("utf-8"))
        constants = load_file(folder / CONSTANTS) if (folder / CONSTANTS).is_file() else {}
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise Refused(
            "the stored graph must be readable", value=error, place=str(folder), fix="deliver the model again"
        ) from error
    net: ExportedNet = build_net(data, constants).eval()
    try:
        torch_weights.load(net, weights)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise Refused(
            "must hold the tensors of the stored graph",
            value=error,
            place=str(weights),
            fix="deliver the model again",
        ) from error
    return net


def _outputs(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    try:
        return [leaf.cpu() for leaf in _leaves(run_quietly(module, inputs))]
    except Exception as error:
        # Code of the user, or a graph that was made for another device, runs here.
        raise Refused(
            "the stored graph must run on an example",
            value=f"{type(error).__name__}: {error}"[:200],
            place="model",
            fix="open the artefact with your class, model=",
        ) from error


def _compare(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    if len(found) != len(wanted):
        raise Refused(
            f"the stored graph must return {len(wanted)} tensors, as the model does",
            value=len(found),
            place="model",
            fix="open the artefact with your class, model=",
        )
    for a, b in zip(found, wanted, strict=True):
        gap = difference(a, b)
        if gap > TOLERANCE.get(b.dtype, 0.0):
            raise Refused(
                "the stored graph must compute what the model computes",
                value=f"a relative difference of {gap:.1e}",
                place="model",
                fix="open the artefact with your class, model=",
            )


def _leaves(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [leaf for item in output for leaf in _leaves(item)] if isinstance(output, list | tuple) else []
