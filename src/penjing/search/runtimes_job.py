"""The work of the comparison of runtimes that runs in a process of its own: the float model as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from penjing.core.artefact import deliver
from penjing.core.errors import Refused
from penjing.core.progress import Line, Say
from penjing.core.target import Target
from penjing.search.build_job import Shared
from penjing.search.clock import Clock


def deliver_float(
    shared: Shared, say: Say, targets: dict[str, Target], folder: Path, seed: int
) -> dict[str, Any]:
    """Deliver the original, as it is, to other targets, each into the folder of its name.

    Returns:
        `refused`: by label, why a target cannot take the model; `seconds` by activity.
    """
    model, task = shared
    clock, refused = Clock(), {}
    example = task.valid.example()
    for name, target in targets.items():
        say(Line.phase(f"exporting the original for {target.label}"))
        with clock.count("export"):
            try:
                deliver(model, target, folder / name / "artefact", example=example)
            except Refused as refusal:
                refused[target.label] = str(refusal)
    return {"refused": refused, "seconds": clock.seconds}
