"""Where the result must run, as data, and the protocol of a runtime."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from penjing.core.backend import Arrays
from penjing.core.extras import need
from penjing.core.method import Model, Value
from penjing.core.plan import Plan

RuntimeName = Literal["onnxruntime", "torch"]


class Target(Value):
    """Runtime, device, threads, batch and input shapes in which a model is judged.

    Attributes:
        runtime: `onnxruntime` (the default) or `torch`.
        mode: for `torch`: `eager` or `compiled`; `default` elsewhere.
        threads: threads of one call, at least 1; processes are pinned to as many cores.
        batch: examples in one timed call.
        input_shapes: shape of one example for each input, without the batch; None: as in the data.
    """

    runtime: RuntimeName = "onnxruntime"
    mode: Literal["default", "eager", "compiled"] = "default"
    device: Literal["cpu"] = "cpu"
    threads: int = Field(default=1, ge=1, le=1024)
    batch: int = Field(default=1, ge=1, le=65536)
    input_shapes: tuple[tuple[int, ...], ...] | None = None

    def __init__(self, runtime: RuntimeName = "onnxruntime", **fields: Any) -> None:
        if runtime == "torch" and fields.get("mode", "default") == "default":
            fields["mode"] = "eager"
        super().__init__(**{"runtime": runtime, **fields})

    @property
    def label(self) -> str:
        """Return the name used in tables: `onnxruntime`, `torch eager`."""
        return self.runtime if self.mode == "default" else f"{self.runtime} {self.mode}"


class Runner(Protocol):
    """A delivered model, loaded from its files into its runtime."""

    def __call__(self, *inputs: Any) -> Any:
        """Return the output for one batch of NumPy arrays."""


class Runtime(Protocol):
    """What a runtime module offers under the name RUNTIME."""

    name: str

    def deliver(self, model: Model, plan: Plan, example: Arrays, folder: Path) -> dict[str, Any]:
        """Write the model's files into the folder; return facts for the manifest (input names, format)."""

    def open(self, folder: Path, target: Target, model: Callable[[], Model] | None = None) -> Runner:
        """Load the files of a verified artefact; `model` makes the user's own class where one is needed."""

    def backends(self) -> tuple[str, ...]:
        """Name the backends whose models this runtime can take, so that a plan can be checked early."""


def runtime_for(target: Target) -> Runtime:
    """Import the module that carries a target out.

    Raises:
        Refused: the runtime's packages are not installed; the message has the line to type.
    """
    need({"onnxruntime": "onnx", "torch": "torch"}[target.runtime], f"the target {target.label}")
    runtime: Runtime = importlib.import_module(f"penjing.targets.{target.runtime}").RUNTIME
    return runtime
