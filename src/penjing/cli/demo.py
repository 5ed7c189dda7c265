"""`penjing demo`: the main job on real data that the packages carry, in under a minute."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from penjing.cli import options as o

BUDGET = {"max_drop": "5%", "latency": "80%", "size": "60%", "time": "90s"}
"""What so small a test split can certify, and what two cores do in a minute."""


def demo(out: o.Out = None, seed: o.Seed = 0, json: o.Json = False, dry_run: o.DryRun = False) -> int:
    """Train a small network on handwritten digits, optimize it under a budget and certify the result."""
    from penjing.cli.optimize import run_task_file
    from penjing.core.budget import Budget
    from penjing.core.extras import need
    from penjing.core.target import Target

    for extra in ("torch", "onnx", "metrics"):
        need(extra, "the demo")
    folder = Path("runs/demo") if out is None else out.expanduser()
    path = _task_file(folder.absolute())
    run = next(folder.absolute() / f"run-{n}" for n in count(1) if not (folder / f"run-{n}").exists())
    return run_task_file(path, Budget(**BUDGET), Target(), run, seed, json=json, dry_run=dry_run)


def _task_file(folder: Path) -> Path:
    """Copy the demo's task file into the folder, so that the user can read, change and run it."""
    from importlib.resources import files

    from penjing.core.files import write_text

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "task.py"
    write_text(path, files("penjing.examples").joinpath("digits.py").read_text(encoding="utf-8"))
    return path
