"""What is checked of an OpenVINO model that nobody vouches for: its text first, then its sizes.

Reading a model makes OpenVINO compute the shapes that it states, and compiling one makes it compute
constants: both can ask for any amount of memory. So a model whose sizes are computed from tensors that are
blown up (found in the text) is first read in a process of its own, and the sizes of every model are looked
at before it is compiled.
"""

from __future__ import annotations

import math
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.parsers import expat

from penjing.core.errors import Refused
from penjing.core.memory_limit import (
    EXAMPLES,
    LARGEST_PEAK,
    LARGEST_UNFOLDED,
    MOST_STEPS,
    TRUST,
    UNFOLDED_SHARE,
    has_memory_limit,
    is_trusted,
)

if TYPE_CHECKING:
    from openvino import Model, Node

LONGEST_TEXT = 2**28
MOST_LAYERS = 200_000
LONGEST_SHAPE = 8
SECONDS = 8
"""Of processor time, in which a model that is suspected must be read."""
SMALL = 2**16
"""Values of a tensor that is no burden, whatever is computed from it."""

_GROWS = frozenset(
    {"Broadcast", "Tile", "Range", "RandomUniform", "Pad", "Interpolate", "OneHot", "Eye", "ReverseSequence"}
)
"""Operators that make a large tensor from a small one."""
_BREAKS = frozenset({"ShapeOf", "Parameter", "Const", "ReadValue"})
"""Where the search for what a size is computed from ends: their values are small or known."""
_SIZES: dict[str, tuple[int, ...]] = {
    "Broadcast": (1,),
    "Reshape": (1,),
    "Tile": (1,),
    "Range": (0, 1, 2),
    "RandomUniform": (0,),
    "Interpolate": (1, 2, 3),
    "Pad": (1, 2),
    "OneHot": (1,),
    "Eye": (0, 1, 3),
    "StridedSlice": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "VariadicSplit": (1, 2),
    "TopK": (1,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    "Loop": (0, 1),
    "ConvolutionBackpropData": (2,),
    "GroupConvolutionBackpropData": (2,),
    "NonMaxSuppression": (2,),
    "SpaceToBatch": (1, 2, 3),
    "BatchToSpace": (1, 2, 3),
    "PriorBox": (0, 1),
    "PriorBoxClustered": (0, 1),
    "Col2Im": (1, 2),
}
"""Inputs by which an operator's shape is computed while a model is read."""


@dataclass
class _Scope:
    """Layers and edges of one network, or of one body in it."""

    weights: Path
    kinds: dict[str, str] = field(default_factory=dict)
    stored: dict[str, dict[str, str]] = field(default_factory=dict)
    ports: dict[str, list[str]] = field(default_factory=dict)
    sources: dict[tuple[str, str], str] = field(default_factory=dict)


class _Reader:
    """Collects types of layers, their input ports in order, and edges; nothing is resolved or expanded."""

    def __init__(self, place: str, weights: Path) -> None:
        self.place, self.weights = place, weights
        self.scopes: list[_Scope] = []
        self.layers = 0
        self._open: list[_Scope] = []
        self._path: list[str] = []
        self._layer: list[str] = []

    def read(self, text: bytes) -> None:
        parser = expat.ParserCreate()
        parser.StartElementHandler, parser.EndElementHandler = self._start, self._end
        parser.StartDoctypeDeclHandler = self._refuse_doctype
        try:
            parser.Parse(text, True)
        except expat.ExpatError as error:
            raise Refused(
                "must be a whole OpenVINO model",
                value=str(error),
                place=self.place,
                fix="deliver the model again",
            ) from None

    def _refuse_doctype(self, *declared: object) -> None:
        raise Refused(
            "must declare no document type: its entities can unfold to any size",
            value="a DOCTYPE",
            place=self.place,
            fix="deliver the model again",
        )

    def _start(self, name: str, given: dict[str, str]) -> None:
        if name == "layers":
            self._open.append(_Scope(self.weights))
            self.scopes.append(self._open[-1])
        elif name == "layer" and self._open:
            self.layers += 1
            self._layer.append(given.get("id", ""))
            self._open[-1].kinds[self._layer[-1]] = given.get("type", "")
            self._open[-1].ports[self._layer[-1]] = []
        elif name == "data" and self._layer and self._open:
            self._open[-1].stored[self._layer[-1]] = given
        elif name == "port" and self._path[-1:] == ["input"] and self._layer:
            self._open[-1].ports[self._layer[-1]].append(given.get("id", ""))
        elif name == "edge" and "from-port" in given and self._open:
            end = given.get("to-layer", ""), given.get("to-port", "")
            self._open[-1].sources[end] = given.get("from-layer", "")
        self._path.append(name)

    def _end(self, name: str) -> None:
        self._path.pop()
        if name == "layer" and self._layer:
            self._layer.pop()
        elif name == "edges" and self._open:
            self._open.pop()


def check_text(path: Path, weights: Path) -> None:
    """Refuse a text that is no plain network, or whose shapes take too much memory to compute.

    Where a size is computed from a tensor that is blown up, the model is read once in another process, with
    a limit on memory and time, unless this one has a limit itself.

    Args:
        path: of the text.
        weights: the file with the constants.

    Raises:
        Refused: too long, too many layers, a document type, not well-formed, or not read within the limit.
    """
    if path.stat().st_size > LONGEST_TEXT:
        raise Refused(
            f"must be at most {LONGEST_TEXT} bytes",
            value=path.stat().st_size,
            place=str(path),
            fix="deliver the model again",
        )
    reader = _Reader(str(path), weights)
    reader.read(path.read_bytes())
    if reader.layers > MOST_LAYERS:
        raise Refused(
            f"must have at most {MOST_LAYERS} layers", value=reader.layers, place=str(path), fix=TRUST
        )
    grown = any(
        _grown_behind(scope, layer)
        for scope in reader.scopes
        for layer, kind in scope.kinds.items()
        if kind in _SIZES
    )
    if grown and not has_memory_limit() and not is_trusted():
        _read_apart(path, weights)


_PROBE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[3]), int(sys.argv[3])))
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[4]), int(sys.argv[4])))
from penjing.core.extras import bring
bring("openvino").Core().read_model(sys.argv[1], sys.argv[2])
"""


def _read_apart(path: Path, weights: Path) -> None:
    command = [sys.executable, "-P", "-c", _PROBE, str(path), str(weights), str(LARGEST_PEAK), str(SECONDS)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=10 * SECONDS, check=False)
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        ended = f"it ended with {done.returncode}: {''.join(said)[:200]}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        ended = "it did not end"
    if ended:
        raise Refused(
            f"must be read within {LARGEST_PEAK} bytes and {SECONDS} s",
            value=ended,
            place=str(path),
            fix=TRUST,
        )


def _grown_behind(scope: _Scope, layer: str) -> bool:
    """Tell whether a size of a layer is computed from what another blows up."""
    ports = scope.ports[layer]
    wanted = [ports[index] for index in _SIZES[scope.kinds[layer]] if index < len(ports)]
    stack = [scope.sources.get((layer, port), "") for port in wanted]
    seen: set[str] = set()
    while stack:
        name = stack.pop()
        kind = scope.kinds.get(name, "")
        if name in seen or kind in _BREAKS:
            continue
        if kind in _GROWS and not _stays_small(scope, name):
            return True
        seen.add(name)
        stack += [scope.sources.get((name, port), "") for port in scope.ports.get(name, ())]
    return False


def _stays_small(scope: _Scope, layer: str) -> bool:
    """Tell whether a layer takes what it grows to from small constants."""
    kind = scope.kinds[layer]
    ports = scope.ports[layer]
    if kind not in ("Broadcast", "Range") or len(ports) < 2:
        return False
    given = [scope.sources.get((layer, port), "") for port in (ports if kind == "Range" else ports[1:2])]
    if kind == "Broadcast" and scope.kinds.get(given[0]) == "ShapeOf":
        shown = [scope.sources.get((given[0], port), "") for port in scope.ports[given[0]]]
        return all(scope.kinds.get(name) == "Const" for name in shown)
    known = [_read_integers(scope, name) for name in given]
    return all(values is not None and math.prod(abs(v) + 1 for v in values) <= SMALL for values in known)


def _read_integers(scope: _Scope, layer: str) -> tuple[int, ...] | None:
    """Return the numbers of a short constant of integers; None for any other layer."""
    facts = scope.stored.get(layer, {})
    width = {"i32": 4, "i64": 8}.get(facts.get("element_type", ""))
    if scope.kinds.get(layer) != "Const" or width is None:
        return None
    start, size = facts.get("offset", ""), facts.get("size", "")
    if not (start.isdecimal() and size.isdecimal()) or not 0 < int(size) <= LONGEST_SHAPE * width:
        return None
    with open(scope.weights, "rb") as file:
        file.seek(int(start))
        part = file.read(int(size))
    return struct.unpack(
        f"<{len(part) // width}{'i' if width == 4 else 'q'}", part[: len(part) // width * width]
    )


def check_sizes(model: Model, weights: int, place: str) -> str:
    """Refuse a model, not compiled yet, whose tensors are larger than any use of it would need.

    Args:
        model: as OpenVINO read it; it is not changed.
        weights: bytes of its weights.
        place: the file, for the message.

    Returns:
        why the model has no bound, as a clause; empty where it has one.

    Raises:
        Refused: a tensor, the constants together or the iterations of a loop are beyond the limits.
    """
    fixed, failed = _fixed(model)
    if fixed is None:
        return f"its shapes cannot be inferred ({failed})"
    counter = _Counter(max(LARGEST_UNFOLDED, UNFOLDED_SHARE * weights), place)
    counter.count(fixed, 1)
    return counter.unbounded


def _fixed(model: Model) -> tuple[Model | None, str]:
    """Return the model with inputs of lengths that fit together, or None and why there are none."""
    if not any(value.partial_shape.is_dynamic for value in model.inputs):
        return model, ""
    failed = ""
    for first, other in EXAMPLES:
        trial = model.clone()
        try:
            trial.reshape({value: _closed(value.partial_shape, first, other) for value in trial.inputs})
        except RuntimeError as error:
            failed = str(error).strip().splitlines()[-1][:200]
            continue
        return trial, ""
    return None, failed


def _closed(shape: Any, first: int, other: int) -> list[int]:
    if shape.rank.is_dynamic:
        raise RuntimeError("an input states no rank")
    lengths = (first if axis == 0 else other for axis in range(len(shape)))
    return [
        dim.get_length() if dim.is_static else max(dim.get_min_length(), length)
        for dim, length in zip(shape, lengths, strict=True)
    ]


@dataclass
class _Counter:
    """Adds up what the operators of a model take."""

    most_constant: float
    place: str
    unbounded: str = ""
    unfolded: float = 0.0
    steps: float = 0.0

    def count(self, model: Model, times: float) -> None:
        constant: set[str] = set()
        for node in model.get_ordered_ops():
            kind, name = node.get_type_name(), node.get_name()
            size = self._size(node)
            sources = [value.get_source_output().get_node().get_name() for value in node.inputs()]
            if kind == "Constant":
                constant.add(name)
            elif sources and kind != "RandomUniform" and constant.issuperset(sources):
                constant.add(name)
                self.unfolded += size
                self._require(
                    self.unfolded, self.most_constant, "bytes of constants that it unfolds to", node
                )
            self.steps += times
            self._require(self.steps, MOST_STEPS, "operators run in one call", node)
            for body, iterations in self._bodies(node):
                self.count(body, times * max(1, iterations))

    def _size(self, node: Node) -> float:
        total = 0.0
        for value in node.outputs():
            shape = value.partial_shape
            if shape.is_dynamic:
                self._give_up(f"the size of what {node.get_type_name()} makes depends on values", node)
                continue
            total += math.prod(dim.get_length() for dim in shape) * max(1, value.element_type.size)
        self._require(total, LARGEST_PEAK, "bytes at once", node)
        return total

    def _bodies(self, node: Node) -> Iterator[tuple[Model, int]]:
        kind = node.get_type_name()
        if kind in ("Loop", "TensorIterator"):
            iterations = int(node.get_num_iterations())
            if iterations < 0:
                self._give_up(f"a {kind} has no bound on its iterations", node)
            yield node.get_function(), iterations
        elif kind == "If":
            for branch in (0, 1):
                yield node.get_function(branch), 1

    def _give_up(self, why: str, node: Node) -> None:
        self.unbounded = self.unbounded or f"{why} ({node.get_friendly_name()!r})"

    def _require(self, found: float, limit: float, unit: str, node: Node) -> None:
        if found > limit:
            raise Refused(
                "must need no more memory and work than a model would",
                value=f"{found:.3g} {unit} for {limit:.3g}, in {node.get_type_name()}",
                place=f"{self.place}: {node.get_friendly_name()!r}",
                fix=TRUST,
            )
