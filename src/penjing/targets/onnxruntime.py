"""ONNX Runtime on the CPU: a checked `model.onnx`, and a session with pinned settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from penjing.core.backend import Arrays
from penjing.core.errors import Exit, Refused
from penjing.core.target import Target
from penjing.core.value import Model
from penjing.targets.onnx_file import describe_file, read_input_specs, write_onnx
from penjing.targets.signature import Guard, TensorSpec, find_fixed_batch

FILE = "model.onnx"
LOAD_FIX = "deliver the model again with the installed version of onnxruntime"
RUN_FIX = "give a batch whose shapes and indices the model takes; free memory if it ran out"

_PROVIDERS = {"cpu": "CPUExecutionProvider"}
_ERRORS = (
    ort_errors.EPFail,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    RuntimeError,
)


class OnnxRunner:
    """A session that takes NumPy arrays in the order of the graph's inputs and returns its first output.

    `fixed_batch` is the batch that the graph insists on, or None.
    """

    def __init__(self, session: ort.InferenceSession, specs: tuple[TensorSpec, ...]) -> None:
        self._run = session.run
        self._names = [spec.name for spec in specs]
        self._wanted = [session.get_outputs()[0].name]
        self._guard = Guard(specs)
        self.fixed_batch = find_fixed_batch(specs)

    def __call__(self, *inputs: NDArray[Any]) -> NDArray[Any]:
        """Return the first output for one batch.

        Raises:
            Refused: an input does not fit (it is named), or the runtime fails on the batch.
        """
        self._guard(inputs)
        try:
            output: NDArray[Any] = self._run(self._wanted, dict(zip(self._names, inputs, strict=True)))[0]
        except _ERRORS as error:
            raise _refused("must run on the batch in ONNX Runtime", error, FILE, RUN_FIX) from error
        return output


class OnnxRuntime:
    """The runtime `onnxruntime`: delivers models of any backend that exports ONNX."""

    name = "onnxruntime"

    def backends(self) -> tuple[str, ...]:
        """Name the backends whose models can be delivered."""
        return ("numpy", "onnx", "torch")

    def deliver(self, model: Model, example: Arrays, folder: Path) -> dict[str, Any]:
        """Write `model.onnx` into the folder, check it and return facts for the manifest.

        The facts: `format`, `opset`, and `inputs` and `outputs` with names, dtypes and shapes (None for a
        dimension that may vary); `batch_dependent` tells that an example's output depends on the others in
        its batch (dynamic integers take their scale from all of them).

        Raises:
            Refused: the exported file does not pass `onnx.checker`.
        """
        return {"format": "onnx"} | describe_file(write_onnx(model, example, folder / FILE))

    def open(self, folder: Path, target: Target, model: Callable[[], Model] | None = None) -> OnnxRunner:
        """Check the file (size, graph, external data) and open a session on it; `model` is not used.

        The session has `target.threads` threads that do not spin between calls (a spinning pool slows
        whichever runtime runs next), runs operators one after the other, and applies every graph
        optimization.

        Raises:
            Refused: the file is missing, damaged or unsafe, an operator is unknown, or the session runs on
                another provider than the target's device.
        """
        from penjing.backends.onnx.model import load_onnx

        path = folder / FILE
        specs = read_input_specs(load_onnx(path).proto)
        provider = _PROVIDERS[target.device]
        _require_provider(provider, ort.get_available_providers())
        try:
            session = ort.InferenceSession(
                str(path), make_session_options(target.threads), providers=[provider]
            )
        except _ERRORS as error:
            raise _refused("must load in ONNX Runtime", error, str(path), LOAD_FIX) from error
        _require_provider(provider, session.get_providers()[:1])
        return OnnxRunner(session, specs)


def make_session_options(threads: int) -> ort.SessionOptions:
    """Return the session options of every measurement: `threads` >= 1, sequential, no spinning."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


def _require_provider(provider: str, present: list[str]) -> None:
    if provider not in present:
        raise Refused(
            f"the session must run on {provider}",
            value=", ".join(present) or "no provider",
            place="target.device",
            code=Exit.ENVIRONMENT,
            fix="install a build of onnxruntime that has this provider",
        )


def _refused(rule: str, error: BaseException, place: str, fix: str) -> Refused:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return Refused(rule, value=line[:300], place=place, fix=fix)


RUNTIME = OnnxRuntime()
