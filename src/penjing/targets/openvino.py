"""OpenVINO on the CPU: our own ONNX graphs as its intermediate representation, in float32 or bfloat16.

The graph is read by OpenVINO's reader and saved as it is: weights keep their type, and its compressor is
never called. Precision, threads and streams are stated; left alone, OpenVINO computes in bfloat16 where the
processor can. Reference: https://docs.openvino.ai, "Precision Control" and "CPU Device".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from penjing.core.backend import Arrays
from penjing.core.errors import Exit, Refused
from penjing.core.extras import bring
from penjing.core.memory_limit import is_trusted, require_bounds
from penjing.core.method import Change, Changes
from penjing.core.scratch import scratch
from penjing.core.target import Target, need_to_deliver
from penjing.core.value import Model
from penjing.targets.openvino_safety import check_sizes, check_text
from penjing.targets.signature import Guard, TensorSpec, find_fixed_batch

if TYPE_CHECKING:
    from openvino import CompiledModel, ConstOutput, Tensor

ov = bring("openvino")

FILE, WEIGHTS = "model.xml", "model.bin"
RUN_FIX = "give a batch whose shapes and indices the model takes; free memory if it ran out"
CONVERT_FIX = "write the layer with other operators, or deliver the model to onnxruntime"
LOAD_FIX = "deliver the model again with the installed version of openvino"
TYPE_FIX = "export the model with inputs of float32 or int64"

_DEVICES = {"cpu": "CPU"}
_PRODUCTS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul"})
_INTEGERS = frozenset({"i8", "u8"})
_ERRORS = (RuntimeError, ValueError, TypeError)


class OpenVinoRunner:
    """A compiled model that takes NumPy arrays in the order of its inputs and returns its first output.

    One call at a time: a second thread needs a runner of its own. `fixed_batch` is the batch that the graph
    insists on, or None.
    """

    def __init__(self, compiled: CompiledModel, specs: tuple[TensorSpec, ...]) -> None:
        self._request = compiled.create_infer_request()
        self._guard = Guard(specs)
        self.fixed_batch = find_fixed_batch(specs)

    def __call__(self, *inputs: NDArray[Any]) -> NDArray[Any]:
        """Return the first output for one batch.

        Raises:
            Refused: an input does not fit (it is named), or the runtime fails on the batch.
        """
        self._guard(inputs)
        try:
            # Arrays become tensors without a copy, and without OpenVINO's dispatch by type, which takes
            # as long as a small model. The output is copied: the next call writes where it lies.
            tensors = [_shared(array) for array in inputs]  # they own their copies until the call ends
            for index, tensor in enumerate(tensors):
                self._request.set_input_tensor(index, tensor)
            self._request.infer({}, share_outputs=True)
            return np.array(self._request.get_output_tensor(0).data)
        except _ERRORS as error:
            raise _refused("must run on the batch in OpenVINO", error, FILE, RUN_FIX) from error


class OpenVino:
    """The runtime `openvino`: delivers models of any backend that exports ONNX."""

    name = "openvino"

    def backends(self) -> tuple[str, ...]:
        """Name the backends whose models can be delivered."""
        return ("numpy", "onnx", "torch")

    def deliver(self, model: Model, example: Arrays, folder: Path) -> dict[str, Any]:
        """Write `model.xml` and `model.bin` into the folder, compile them and return facts for the manifest.

        The facts are those of ONNX Runtime, with `integer_layers` (that run on integers) and
        `float_layers` (stated in integers, but run in float: by name, the precision). `changes` says the
        same for the report.

        Raises:
            Refused: the extra onnx is missing, the exported file is no valid ONNX, or OpenVINO has no
                conversion for an operator (it is named) or cannot compile the graph.
        """
        need_to_deliver(Target("openvino"))
        from penjing.backends.onnx.integers.stated import find_integer_layers
        from penjing.targets.onnx_file import describe_file, write_onnx

        with scratch() as temporary:
            path = temporary / "model.onnx"
            proto = write_onnx(model, example, path)
            try:
                ov.save_model(ov.Core().read_model(path), folder / FILE, compress_to_fp16=False)
            except _ERRORS as error:
                raise _refused("must convert to OpenVINO", error, "model", CONVERT_FIX) from error
        claims = find_integer_layers(proto)
        runs = read_precisions(_compiled(folder, Target("openvino")), claims.values()) if claims else {}
        found = {layer: runs[node] for layer, node in claims.items()}
        return {
            "format": "openvino",
            **describe_file(proto),
            "integer_layers": [layer for layer, precision in found.items() if precision in _INTEGERS],
            "float_layers": {layer: p for layer, p in found.items() if p not in _INTEGERS},
            "changes": _changes(found),
        }

    def open(self, folder: Path, target: Target, model: Callable[[], Model] | None = None) -> OpenVinoRunner:
        """Compile the files for the target's precision and threads; `model` is not used.

        One stream with `target.threads` threads, for latency.

        Raises:
            Refused: a file is missing or damaged, the processor has no bfloat16, or OpenVINO would run in
                another precision or on another device than the target's.
        """
        compiled = _compiled(folder, target)
        return OpenVinoRunner(compiled, tuple(_spec(entry) for entry in compiled.inputs))


def list_float_precisions(device: str = "cpu") -> tuple[str, ...]:
    """Return the modes that this machine can run: `f32`, and `bf16` where the processor has it."""
    capabilities = ov.Core().get_property(_DEVICES[device], "OPTIMIZATION_CAPABILITIES")
    return ("f32", "bf16") if "BF16" in capabilities else ("f32",)


def read_precisions(compiled: CompiledModel, nodes: Iterable[str]) -> dict[str, str]:
    """Return the precision in which a compiled model runs products, by the names of the graph's nodes.

    Read from the runtime's own graph, whose layers name the nodes that were fused into them: `u8` and `i8`
    are integer kernels, `f32` and `bf16` float ones; `unknown` where no product has the name.
    """
    found: dict[str, str] = {}
    for operation in compiled.get_runtime_model().get_ordered_ops():
        info = operation.get_rt_info()
        if info["layerType"].astype(str) in _PRODUCTS:
            found[f",{info['originalLayersNames'].astype(str)},"] = info["runtimePrecision"].astype(str)
    return {
        node: next(
            (p for names, p in found.items() if f",{node}," in names or f",{node}/" in names), "unknown"
        )
        for node in nodes
    }


def _changes(found: Mapping[str, str]) -> list[Change]:
    """Say how many layers run on integers, and name each that does not."""
    changes = Changes("openvino")
    floats = {layer: precision for layer, precision in found.items() if precision not in _INTEGERS}
    counts = {"integer_layers": len(found) - len(floats), "of": len(found)}
    if found and len(floats) == len(found):
        changes.skip("*", "no layer runs on integers", **counts)
    elif found:
        changes.done("*", "", **counts)
    for layer, precision in floats.items():
        changes.skip(layer, f"stated in integers, but OpenVINO runs it in {precision}")
    return changes


def _compiled(folder: Path, target: Target) -> CompiledModel:
    device = _DEVICES[target.device]
    modes = list_float_precisions(target.device)
    if target.mode not in modes:
        raise Refused(
            f"the processor must compute in {target.mode}",
            value=", ".join(modes),
            place="target.mode",
            fix="use the mode f32",
            code=Exit.ENVIRONMENT,
        )
    core = ov.Core()
    _check_files(folder)
    check_text(folder / FILE, folder / WEIGHTS)
    try:
        model = core.read_model(folder / FILE, folder / WEIGHTS)
        if not is_trusted():
            place = str(folder / FILE)
            require_bounds(check_sizes(model, (folder / WEIGHTS).stat().st_size, place), place)
        compiled = core.compile_model(model, device, make_settings(target))
    except _ERRORS as error:
        raise _refused("must load in OpenVINO", error, str(folder / FILE), LOAD_FIX) from error
    _check_settings(compiled, target, device)
    return compiled


def make_settings(target: Target) -> dict[str, Any]:
    """Return the properties of every measurement: precision, latency hint, one stream, threads.

    The processes of measurements are pinned by themselves; OpenVINO does not pin threads.
    """
    return {
        "INFERENCE_PRECISION_HINT": target.mode,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": target.threads,
        "ENABLE_CPU_PINNING": False,
    }


def _check_files(folder: Path) -> None:
    """Refuse what is no whole description of a network: OpenVINO would try its other readers on it."""
    for name in (FILE, WEIGHTS):
        if not (folder / name).is_file():
            raise Refused(
                f"must hold {name}", value="no such file", place=str(folder), fix="deliver the model again"
            )
    with open(folder / FILE, "rb") as file:
        head = file.read(64)
        file.seek(max(0, (folder / FILE).stat().st_size - 64))
        tail = file.read().rstrip()
    if not head.startswith(b"<?xml") or not tail.endswith(b"</net>"):
        raise Refused(
            "must be a whole OpenVINO model",
            value="no <net> from start to end",
            place=str(folder / FILE),
            fix="deliver the model again",
        )


def _check_settings(compiled: CompiledModel, target: Target, device: str) -> None:
    wanted = {"INFERENCE_PRECISION_HINT": getattr(ov.Type, target.mode), "EXECUTION_DEVICES": [device]}
    for name, value in wanted.items():
        found = compiled.get_property(name)
        if found != value:
            raise Refused(
                f"OpenVINO must run with {name} {value}",
                value=found,
                place=f"target {target.label}",
                code=Exit.ENVIRONMENT,
                fix="unset the environment variables and files that configure OpenVINO",
            )


def _shared(array: NDArray[Any]) -> Tensor:
    """Return a tensor on the memory of an array; on a copy where it is not contiguous or only to be read."""
    plain = array.flags.c_contiguous and array.flags.writeable
    return ov.Tensor(array if plain else np.array(array, order="C"), shared_memory=True)


def _spec(entry: ConstOutput) -> TensorSpec:
    shape = tuple(d.get_length() if d.is_static else None for d in entry.partial_shape)
    try:
        dtype = np.dtype(entry.element_type.to_dtype()).name
    except _ERRORS as error:
        raise _refused("must have a type that NumPy knows", error, entry.get_any_name(), TYPE_FIX) from error
    return TensorSpec(entry.get_any_name(), dtype, shape)


def _refused(rule: str, error: BaseException, place: str, fix: str) -> Refused:
    noise = ("Exception from", "Check '", "FrontEnd API failed", "Summary:")
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith(noise)] or lines or [type(error).__name__]
    return Refused(rule, value="; ".join(said)[:300], place=place, fix=fix)


RUNTIME = OpenVino()
