"""Where the result must run, as data, and the protocol of a runtime."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, ValidationError, model_validator

from penjing.core.backend import Arrays
from penjing.core.config import refusal
from penjing.core.errors import Exit, Refused
from penjing.core.extras import need
from penjing.core.value import Model, Value

RuntimeName = Literal["auto", "onnxruntime", "openvino", "torch"]

MODES: dict[str, tuple[str, ...]] = {
    "auto": ("default", "torch"),
    "onnxruntime": ("default",),
    "openvino": ("f32", "bf16"),
    "torch": ("eager", "compiled"),
}
"""The modes of each runtime; the first is taken where none is named."""

_EXTRAS = {"onnxruntime": ("onnx",), "openvino": ("openvino", "onnx"), "torch": ("torch",)}
"""Extras that delivering needs; the first alone is enough to open what was delivered."""


class Target(Value):
    """Runtime, device, threads, batch and input shapes in which a model is judged.

    Attributes:
        runtime: `onnxruntime` (the default), `openvino`, `torch`, or `auto`: the one that measurement finds
            fastest for the float model, which only `optimize` can do.
        mode: for `torch`: `eager` or `compiled`; for `openvino`: the precision of what is float, `f32` or
            `bf16`; for `auto`: `torch` lets PyTorch compete too; `default` elsewhere.
        threads: threads of one call, at least 1; processes are pinned to as many cores.
        batch: examples in one timed call.
        input_shapes: shape of one example for each input, without the batch; None: as in the data.

    Raises:
        Refused: a field is unknown or out of its range, or the runtime has no such mode.
    """

    runtime: RuntimeName = "onnxruntime"
    mode: Literal["default", "eager", "compiled", "f32", "bf16", "torch"] = "default"
    device: Literal["cpu"] = "cpu"
    threads: int = Field(default=1, ge=1, le=1024)
    batch: int = Field(default=1, ge=1, le=65536)
    input_shapes: tuple[tuple[int, ...], ...] | None = None

    def __init__(self, runtime: RuntimeName = "onnxruntime", **fields: Any) -> None:
        if fields.get("mode", "default") == "default" and runtime in MODES:
            fields["mode"] = MODES[runtime][0]
        try:
            super().__init__(**{"runtime": runtime, **fields})
        except ValidationError as error:
            raise refusal(error, "target", type(self)) from None

    @model_validator(mode="after")
    def _fields_agree(self) -> Target:
        if self.mode not in MODES[self.runtime]:
            raise ValueError(
                f"the mode {self.mode} must be one of {self.runtime}; give {' or '.join(MODES[self.runtime])}"
            )
        return self

    @property
    def label(self) -> str:
        """Return the name used in tables: `onnxruntime`, `openvino f32`, `torch eager`."""
        return self.runtime if self.mode == "default" else f"{self.runtime} {self.mode}"

    @property
    def reference(self) -> Target:
        """Return where the float model runs that quality and costs are compared with: in float32.

        A lower float precision changes outputs as quantization does, and is judged in the same way. What
        `auto` chooses is compared with the default runtime.
        """
        if self.runtime == "auto":
            return self.model_copy(update={"runtime": "onnxruntime", "mode": "default"})
        return self.model_copy(update={"mode": "f32"}) if self.mode == "bf16" else self


class Runner(Protocol):
    """A delivered model, loaded from its files into its runtime."""

    def __call__(self, *inputs: Any) -> Any:
        """Return the output for one batch of NumPy arrays."""


class Runtime(Protocol):
    """What a runtime module offers under the name RUNTIME."""

    name: str

    def deliver(self, model: Model, example: Arrays, folder: Path) -> dict[str, Any]:
        """Write the model's files into the folder; return facts for the manifest (input names, format).

        A fact `changes` holds what the runtime made of layers; it joins the artefact's changes.
        """

    def open(self, folder: Path, target: Target, model: Callable[[], Model] | None = None) -> Runner:
        """Load the files of a verified artefact; `model` makes the user's own class where one is needed."""

    def backends(self) -> tuple[str, ...]:
        """Name the backends whose models this runtime can take, so that a plan can be checked early."""


def runtime_for(target: Target) -> Runtime:
    """Import the module that carries a target out.

    Raises:
        Refused: the runtime's packages are not installed (the message has the line to type), or it is `auto`.
    """
    if target.runtime == "auto":
        raise Refused(
            "must name a runtime",
            value="auto",
            place="target.runtime",
            fix="let `optimize` choose, or name one",
            code=Exit.USAGE,
        )
    need(_EXTRAS[target.runtime][0], f"the target {target.label}")
    runtime: Runtime = importlib.import_module(f"penjing.targets.{target.runtime}").RUNTIME
    return runtime


def need_to_deliver(target: Target) -> None:
    """Refuse, with the line to type, unless everything is installed that delivering to a target takes.

    Raises:
        Refused: an extra is missing.
    """
    for extra in _EXTRAS[target.runtime]:
        need(extra, f"the target {target.label}")
