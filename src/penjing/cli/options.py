"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from penjing.core.budget import Budget
    from penjing.core.target import Target

TaskPath = Annotated[
    Path, typer.Argument(help="Your Python file with model() and task().", metavar="TASK.py")
]
RunPath = Annotated[Path, typer.Argument(help="A run directory.", metavar="RUN")]
RunTask = Annotated[
    Path | None, typer.Option("--task", help="The task file; by default the one the run was started from.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Seed = Annotated[int, typer.Option("--seed", help="Every random choice derives from it.", min=0)]
Out = Annotated[Path | None, typer.Option("--out", help="The run directory; runs/NAME-N by default.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done, stop.")]
MaxDrop = Annotated[str | None, typer.Option("--max-drop", help="Largest loss of the metric, as 1% or 0.01.")]
Latency = Annotated[str | None, typer.Option("--latency", help="As 5ms, 60% or '2x faster'.")]
Size = Annotated[str | None, typer.Option("--size", help="Of the model's files, as 10MB or 25%.")]
Memory = Annotated[str | None, typer.Option("--memory", help="Peak of the process, as 200MB or 50%.")]
Operations = Annotated[str | None, typer.Option("--operations", help="Multiply-adds, as 40M or 50%.")]
Time = Annotated[str | None, typer.Option("--time", help="What the whole run may take, as 5min.")]
Trials = Annotated[int | None, typer.Option("--trials", help="Largest number of plans tried.", min=1)]
Confidence = Annotated[str, typer.Option("--confidence", help="Of the verdict, one-sided.")]
Runtime = Annotated[
    str,
    typer.Option(
        "--target", help="onnxruntime, openvino, openvino-bf16, torch, torch-compiled; auto: fastest."
    ),
]
Threads = Annotated[int, typer.Option("--threads", help="Threads of one call.", min=1)]
Batch = Annotated[int, typer.Option("--batch", help="Examples in one timed call.", min=1)]


def make_budget(confidence: str, **parts: Any) -> Budget:
    """Build a budget from the options that were given."""
    from penjing.core.budget import Budget, parse_drop

    given = {name: value for name, value in parts.items() if value is not None}
    return Budget(confidence=parse_drop(confidence, "confidence"), **given)


def make_target(runtime: str, threads: int, batch: int) -> Target:
    """Build a target from the options.

    Raises:
        Refused: an unknown runtime.
    """
    from penjing.core.errors import Exit, Refused, nearest
    from penjing.core.target import Target

    known: dict[str, Any] = {
        "auto": ("auto", {}),
        "auto-torch": ("auto", {"mode": "torch"}),
        "onnxruntime": ("onnxruntime", {}),
        "openvino": ("openvino", {"mode": "f32"}),
        "openvino-bf16": ("openvino", {"mode": "bf16"}),
        "torch": ("torch", {"mode": "eager"}),
        "torch-compiled": ("torch", {"mode": "compiled"}),
    }
    if runtime not in known:
        raise Refused(
            "must be a known target",
            value=runtime,
            place="--target",
            fix=nearest(runtime, known),
            code=Exit.USAGE,
        )
    name, fields = known[runtime]
    return Target(name, threads=threads, batch=batch, **fields)
