"""The graph of a module, from torch.export, with its parameters under the module's own names."""

from __future__ import annotations

import contextlib
import inspect
import io
import linecache
import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from penjing.backends.torch.graph.nested import inline_nested
from penjing.backends.torch.tensors import evaluating, input_names, to_inputs
from penjing.core.backend import Arrays
from penjing.core.errors import Refused

BATCH = 3
"""Examples in the captured batch; export would take a batch of 1 for a constant."""


@dataclass(frozen=True)
class Capture:
    """A module's graph in evaluation mode.

    Attributes:
        program: what torch.export returned.
        graph: its fx graph, with harmless nested graphs written out; never changed.
        outputs: nodes whose values the model returns, in order.
        tensors: parameters and buffers, placeholder name to name in the module.
        constants: placeholder name to (name in the module, tensor) for tensors that are neither.
        inputs: placeholder names of the model's inputs, in order.
        names: the arguments' names in the model's forward.
        examples: the inputs as tensors, `BATCH` examples.
        dynamic: whether the graph takes any batch size.
    """

    program: ExportedProgram
    graph: fx.Graph
    outputs: tuple[fx.Node, ...]
    tensors: dict[str, str]
    constants: dict[str, tuple[str, Tensor]]
    inputs: tuple[str, ...]
    names: tuple[str, ...]
    examples: tuple[Tensor, ...]
    dynamic: bool

    @property
    def structure(self) -> str:
        """The containers that the model returns, as torch's JSON; empty for one tensor.

        Raises:
            Refused: a container that torch cannot write down.
        """
        spec = self.program.call_spec.out_spec
        if spec.is_leaf():
            return ""
        try:
            return str(pytree.treespec_dumps(spec))
        except (NotImplementedError, TypeError, ValueError) as error:
            raise Refused(
                "the outputs' containers must be plain tuples, lists and dictionaries",
                value=error,
                place="model",
                fix="name the output that counts in task.output",
            ) from error


def capture(model: nn.Module, example: Arrays) -> Capture:
    """Capture a module's graph for any batch size.

    Args:
        model: in any mode; captured in evaluation mode and left as it was.
        example: inputs, at least one example each.

    Raises:
        Refused: torch.export cannot capture the code; the message names the source line.

    >>> found = capture(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), (np.zeros((1, 4), np.float32),))
    >>> found.dynamic, sorted(found.tensors.values())
    (True, ['0.bias', '0.weight'])
    """
    arrays = tuple(np.repeat(x[:1], BATCH, axis=0) for x in example)
    examples = to_inputs(model, arrays)
    with evaluating(model), silenced(), _plain_attention(), torch.random.fork_rng(devices=[]):
        try:
            program = torch.export.export(model, examples, dynamic_shapes=_shapes(model, examples))
        except Exception as error:
            # Whatever the user's code or torch.export raises, the model cannot be captured.
            raise _uncapturable(error) from error
    return _read_signature(model, program, examples)


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Let nn.MultiheadAttention compute by plain operators, not by one of its own without a rule."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _shapes(model: nn.Module, examples: tuple[Tensor, ...]) -> Any:
    specs = tuple({0: torch.export.Dim.AUTO} if x.ndim else None for x in examples)
    parameters = list(inspect.signature(model.forward).parameters.values())
    named = [p for p in parameters if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    takes_rest = len(named) < len(parameters) and len(examples) > len(named)
    return (*specs[: len(named)], specs[len(named) :]) if takes_rest else specs


def _read_signature(model: nn.Module, program: ExportedProgram, examples: tuple[Tensor, ...]) -> Capture:
    tensors, constants, inputs = {}, {}, []
    for spec in program.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            tensors[name] = spec.target
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            constants[name] = (spec.target, program.constants[spec.target])
        else:
            inputs.append(name)
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    parameters = {placeholder for placeholder, name in tensors.items() if name in trained}
    graph = inline_nested(program.graph_module, parameters)
    returned = next(n for n in reversed(graph.nodes) if n.op == "output").args[0]
    outputs = tuple(n for n in returned if isinstance(n, fx.Node) and isinstance(n.meta["val"], torch.Tensor))
    values = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in inputs]
    dynamic = all(is_dynamic(v.shape[0]) for v in values if v.ndim)
    names = tuple(input_names(model, len(inputs)))
    return Capture(program, graph, outputs, tensors, constants, tuple(inputs), names, examples, dynamic)


def require_dynamic(captured: Capture) -> None:
    """Refuse a graph that takes one batch size only."""
    if not captured.dynamic:
        raise Refused(
            "the model must take any batch size",
            value="a batch size written into its code",
            place="model",
            fix="use x.shape[0] or -1 for the batch in view and reshape",
        )


def is_dynamic(size: int | torch.SymInt) -> bool:
    """Tell whether a captured dimension follows the batch; code may have made a constant of it."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def read_shape(value: Tensor) -> tuple[int, ...]:
    """Return the shape of a captured value, symbolic dimensions as in the captured batch.

    A dimension that depends on the data (`nonzero`) counts 1: nothing can be said of it.
    """
    return tuple(int(d.node.hint or 1) if isinstance(d, torch.SymInt) else int(d) for d in value.shape)


def bind_placeholders(captured: Capture, model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return what the graph's placeholders take, in order: the module's tensors, constants, inputs."""
    given = dict(zip(captured.inputs, inputs, strict=True))
    own = dict(model.named_parameters(remove_duplicate=False))
    own |= dict(model.named_buffers(remove_duplicate=False))
    values = []
    for node in captured.graph.nodes:
        if node.op == "placeholder":
            if node.name in given:
                values.append(given[node.name])
            elif node.name in captured.tensors:
                values.append(own[captured.tensors[node.name]])
            else:
                values.append(captured.constants[node.name][1])
    return values


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Silence the warnings, the log and the prints of torch's exporters; errors still raise."""
    sink = io.StringIO()
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def describe_node(node: fx.Node) -> str:
    """Return `operator at file:line` of a node, for people."""
    operator = getattr(node.target, "__name__", str(node.target))
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{operator} at {Path(lines[-1][0]).name}:{lines[-1][1]}" if lines else operator


def _uncapturable(error: Exception) -> Refused:
    place, source = _raised_at(error)
    line = next((part.strip() for part in str(error).splitlines() if part.strip()), "")
    if source:
        line = f"`{source}`: {line}"
    return Refused(
        "the model must be one that torch.export can capture",
        value=f"{type(error).__name__}: {line[:200]}",
        place=place,
        fix="take control flow that depends on tensor values out of forward; masks (PruneMagnitude and its "
        "kin), training and repair need no graph and work on the model as it is",
    )


def _raised_at(error: Exception) -> tuple[str, str]:
    """Return where the user's code raised an error, and the line; code sent by value has lost its file."""
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [(code, line) for code, line in frames if not _is_library(code.co_filename)]
    if not own:
        caused = re.search(r"Caused by: \((.+?):(\d+) in", str(error))
        return (f"{Path(caused[1]).name}:{caused[2]}" if caused else "model"), ""
    code, number = own[-1]
    file = code.co_filename
    if file.startswith("<"):
        return f"{code.co_qualname}, line {number}", ""
    return f"{Path(file).name}:{number}", linecache.getline(file, number).strip()


def _is_library(file: str) -> bool:
    library = str(Path(torch.__file__).parent)
    return file.startswith((library, "<string>", "<eval", "<frozen")) or file == __file__
