"""An ONNX model as a value, and how one is read from a file that nobody vouches for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from penjing.backends.onnx.graph.index import list_inputs
from penjing.backends.onnx.graph.layers import restore_weight_names
from penjing.backends.onnx.safety.checks import check_proto
from penjing.backends.onnx.safety.files import LARGEST_FILE, read_proto
from penjing.core.errors import Refused
from penjing.core.memory_limit import is_trusted

if TYPE_CHECKING:
    from onnx import ModelProto

_ORT_ERRORS = tuple(
    getattr(ort.capi.onnxruntime_pybind11_state, name)
    for name in (
        "Fail",
        "InvalidArgument",
        "InvalidGraph",
        "InvalidProtobuf",
        "NotImplemented",
        "RuntimeException",
        "NoSuchFile",
        "NoModel",
    )
)


@dataclass(frozen=True, eq=False)
class OnnxModel:
    """A model in memory.

    Attributes:
        proto: the graph with all its weights inside.
        reference: the float graph that `proto` was made from, with the same node names, or None.
    """

    proto: ModelProto
    reference: ModelProto | None = None

    @cached_property
    def session(self) -> ort.InferenceSession:
        """The ONNX Runtime session of this model on CPU, made when first used."""
        return open_session(self.proto)

    def __getstate__(self) -> dict[str, Any]:
        return {"proto": self.proto, "reference": self.reference}

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs that a caller gives (initializers listed as inputs are none)."""
        return list_inputs(self.proto)

    def run(self, inputs: Sequence[NDArray[Any]] | Mapping[str, NDArray[Any]]) -> tuple[NDArray[Any], ...]:
        """Return all outputs for one batch.

        Args:
            inputs: arrays in the order of the model's inputs, or by name; floats and integers of another
                width are converted to the model's.

        Raises:
            Refused: wrong number, name, type or shape of inputs, or ONNX Runtime cannot run the model.
        """
        feed = make_feed(self.session, inputs)
        return tuple(run_session(self.session, None, feed))


def open_session(proto: ModelProto, level: Literal["all", "basic"] = "all") -> ort.InferenceSession:
    """Return a CPU session whose threads do not spin between calls.

    Args:
        proto: the model.
        level: graph optimizations, `all` or `basic`.

    Raises:
        Refused: ONNX Runtime rejects the model.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = _cores()
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if level == "all" else levels.ORT_ENABLE_BASIC
    if proto.ByteSize() > LARGEST_FILE:
        raise Refused(
            "must be at most 2 GB",
            value=f"{proto.ByteSize()} bytes",
            place="model",
            fix="prune it or store its weights in fewer bits in its own framework first",
        )
    try:
        return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except _ORT_ERRORS as error:
        raise Refused(
            "must load in ONNX Runtime",
            value=_first_line(error),
            place="model",
            fix="export it with standard operators of opset 18 or newer",
        ) from error


def _cores() -> int:
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed is not None else os.cpu_count() or 1


def run_session(
    session: ort.InferenceSession, outputs: list[str] | None, feed: Mapping[str, NDArray[Any]]
) -> list[NDArray[Any]]:
    """Run a session.

    Raises:
        Refused: the runtime fails on these inputs.
    """
    try:
        result: list[NDArray[Any]] = session.run(outputs, dict(feed))
    except _ORT_ERRORS as error:
        shapes = {name: tuple(array.shape) for name, array in feed.items()}
        raise Refused(
            f"must run on inputs of shapes {shapes}",
            value=_first_line(error),
            place="model",
            fix="give inputs of the shapes that the model declares",
        ) from error
    return result


def make_feed(
    session: ort.InferenceSession, inputs: Sequence[NDArray[Any]] | Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Return inputs by name, in the model's types.

    Raises:
        Refused: a name is missing or unknown, the number differs, or a type cannot be converted safely.
    """
    declared = {value.name: value.type for value in session.get_inputs()}
    if not isinstance(inputs, Mapping):
        if len(inputs) != len(declared):
            raise Refused(
                f"must be {len(declared)}, as many as the model has",
                value=len(inputs),
                place="inputs",
                fix=f"give {', '.join(declared)}, in this order",
            )
        inputs = dict(zip(declared, inputs, strict=True))
    if set(inputs) != set(declared):
        raise Refused(
            "must have the names that the model declares",
            value=", ".join(sorted(inputs)) or "none",
            place="inputs",
            fix=f"give {', '.join(declared)}",
        )
    return {name: _as_type(np.asarray(inputs[name]), kind, name) for name, kind in declared.items()}


_TYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


def _as_type(array: NDArray[Any], kind: str, name: str) -> NDArray[Any]:
    wanted = _TYPES.get(kind)
    kinds = {"u": "i"}
    given = kinds.get(array.dtype.kind, array.dtype.kind)
    if wanted is None or given != kinds.get(np.dtype(wanted).kind, np.dtype(wanted).kind):
        raise Refused(
            f"must be {_say(kind)}",
            value=array.dtype,
            place=f"input {name!r}",
            fix="convert the data with .astype(...), or export the model for the type of the data",
        )
    if given == "i" and array.size:
        limits = np.iinfo(wanted)
        if array.min() < limits.min or array.max() > limits.max:
            raise Refused(
                f"must lie from {limits.min} to {limits.max}, the range of {_say(kind)}",
                value=f"{array.min()} to {array.max()}",
                place=f"input {name!r}",
                fix="bring the integers into this range",
            )
    return np.ascontiguousarray(array, dtype=wanted)


def _say(kind: str) -> str:
    """Return `float32` for ONNX Runtime's `tensor(float)`."""
    wanted = _TYPES.get(kind)
    return kind if wanted is None else np.dtype(wanted).name


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300]


def load_onnx(path: str | Path, trusted: bool = False) -> OnnxModel:
    """Read and check an ONNX file; nothing in it is executed.

    External data is read only from regular files beside the model. The model is checked in full before
    a runtime sees it: structure, types, operators, functions, and how much memory and work a call can take.
    A model in which that depends on the values of the inputs (a `Loop` until a condition holds, a length that
    is computed from them) is read only in a process with a limit on its memory, or where it is trusted.

    Args:
        path: of the file.
        trusted: you know who made the file: memory and work of a call are not judged.

    Raises:
        Refused: the file is missing, empty, truncated, no ONNX, made for a newer version, has operators
            that are not known, refers to data outside its folder, or could take memory without a bound.

    >>> model = load_onnx("resnet18.onnx")  # doctest: +SKIP
    >>> model.run((images,))[0].shape  # doctest: +SKIP
    (8, 1000)
    """
    path = Path(path)
    proto = read_proto(path)
    check_proto(proto, str(path), trusted or is_trusted())
    restore_weight_names(proto)
    return OnnxModel(proto)
