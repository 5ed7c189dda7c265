"""Delivered models: folders with model files, the plan, the changes and a manifest that is checked."""

from __future__ import annotations

import os
import pickletools
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

from penjing.core.apply import Applied
from penjing.core.backend import Arrays
from penjing.core.errors import Exit, Refused
from penjing.core.files import (
    MANIFEST,
    read_json,
    refusing,
    sha256_file,
    verify_manifest,
    write_folder,
    write_json,
)
from penjing.core.memory_limit import trusting
from penjing.core.plan import plan_to_json
from penjing.core.provenance import provenance_of
from penjing.core.target import Runner, Target, runtime_for
from penjing.core.value import Model, Value

PICKLES = frozenset(
    (
        ".bin",
        ".ckpt",
        ".dill",
        ".joblib",
        ".nemo",
        ".npz",
        ".pickle",
        ".pk",
        ".pkl",
        ".pt",
        ".pt2",
        ".pth",
        ".tar",
    )
)
"""File names' endings that may carry a pickle, and with it code; such files are neither written nor read."""

DEPTH_IN_RUN = 3
"""So many folders above a delivered one a run directory may lie."""

ZLIB_LEVEL = 6
BLOCK = 1 << 20

_OWN_FILES = frozenset({"plan.json", "changes.json", "record.json"})

_RAW = {"model.bin": "model.xml"}
"""Files of bare numbers, each with the file that describes them and says what they are."""


class ArtefactFile(Value):
    """One file of an artefact: its name in the folder, SHA-256 and bytes."""

    name: str
    sha256: str
    bytes: int


class Artefact(Value):
    """A delivered folder whose files were checked.

    Attributes:
        path: the folder, absolute.
        sha256: of the file `manifest.json`, which holds those of all others.
        files: every file but the manifest.
        size_bytes: of the model files alone, without plan and record.
        compressed_bytes: what zlib at level 6 (as in zip and gzip) makes of them; None in artefacts that
            were written before it was noted.
        target: where the model is meant to run.
        plan: as plain data (`penjing.core.plan.plan_from_json` makes methods of it).
        facts: what the runtime said of the files: format, names and shapes of inputs.
    """

    path: Path
    sha256: str
    files: tuple[ArtefactFile, ...]
    size_bytes: int
    compressed_bytes: int | None = None
    target: Target
    plan: tuple[dict[str, Any], ...]
    facts: dict[str, Any]

    def evaluation_batch(self, usual: int) -> int:
        """Return the batch in which outputs are taken: the target's where they depend on it."""
        return self.target.batch if self.facts.get("batch_dependent") else usual


def deliver(
    model: Model | Applied,
    target: Target,
    folder: Path | str,
    *,
    example: Arrays,
    record: Mapping[str, Any] | None = None,
) -> Artefact:
    """Write a model as a new folder for its target; the folder appears complete or not at all.

    The plan and the changes in the folder are those that `apply` carried out on this very model, in this
    and in earlier calls; none for a model that it did not make.

    Args:
        model: what `apply` returned, the model in it, or any other model.
        target: where it is meant to run.
        folder: that does not exist yet.
        example: one batch of inputs, as the model takes them.
        record: plain data kept beside the model as `record.json`.

    Raises:
        Refused: the folder exists, the runtime cannot take the model, or the disk's reasons.
    """
    done = model.provenance if isinstance(model, Applied) else provenance_of(model)
    model = model.model if isinstance(model, Applied) else model
    steps = plan_to_json(done.plan)
    folder = Path(folder).expanduser().absolute()
    if os.path.lexists(folder):
        raise Refused(
            "the artefact's folder must not exist yet",
            value=str(folder),
            place="deliver",
            fix="choose another folder; nothing is ever overwritten",
            code=Exit.USAGE,
        )
    with refusing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    runtime = runtime_for(target)

    def build(temporary: Path) -> dict[str, Any]:
        facts = dict(runtime.deliver(model, example, temporary))
        noticed = [*done.changes, *facts.pop("changes", ())]
        model_files = sorted(p.relative_to(temporary).as_posix() for p in temporary.rglob("*") if p.is_file())
        if not model_files or _OWN_FILES & set(model_files):
            raise Refused(
                "a runtime must write model files under names of its own",
                value=model_files,
                place=f"deliver ({target.label})",
                code=Exit.INTERNAL,
                fix="report this: the fault is in the runtime's module",
            )
        _refuse_pickles(temporary, model_files)
        write_json(temporary / "plan.json", steps)
        write_json(temporary / "changes.json", [change.model_dump(mode="json") for change in noticed])
        if record is not None:
            write_json(temporary / "record.json", dict(record))
        return {
            "target": target.model_dump(mode="json"),
            "plan": steps,
            "model_files": model_files,
            "compressed_bytes": sum(compressed_bytes(temporary / name) for name in model_files),
            "runtime": facts,
        }

    return _artefact(folder, write_folder(folder, build))


def open_artefact(folder: Path | str) -> Artefact:
    """Check every file of a delivered folder and describe it; no model is loaded.

    Raises:
        Refused: no such folder, a file that may carry a pickle, a damaged, missing or foreign file, a
            manifest written by a newer version, or a folder in the place of the one that a run delivered.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.is_file():
        raise Refused(
            "an artefact must be a folder that Penjing delivered",
            value=folder.name,
            place=str(folder.parent),
            fix="a pickled model can run any code and is never read; load it in your own program"
            if folder.suffix.lower() in PICKLES
            else "give the folder, not one of its files",
        )
    content = verify_manifest(folder)
    _refuse_pickles(folder, [entry["name"] for entry in content["files"]])
    artefact = _artefact(folder, content)
    _refuse_swapped(artefact)
    return artefact


def load(folder: Path | str, model: Callable[[], Model] | None = None, *, trusted: bool = False) -> Runner:
    """Load a delivered folder into its runtime, after all checks of `open_artefact`.

    Args:
        model: makes an untrained model of the user's own class; needed for the `torch` runtime only.
        trusted: you know who made the folder: the memory and work of a call are not judged.

    Returns:
        A function from one batch of NumPy arrays to the output.
    """
    artefact = open_artefact(folder)
    with trusting(trusted):
        return runtime_for(artefact.target).open(artefact.path, artefact.target, model)


def _artefact(folder: Path, content: Mapping[str, Any]) -> Artefact:
    facts = content["facts"]
    try:
        model_files = set(facts["model_files"])
        return Artefact(
            path=folder,
            sha256=sha256_file(folder / MANIFEST),
            files=tuple(ArtefactFile(**entry) for entry in content["files"]),
            size_bytes=sum(e["bytes"] for e in content["files"] if e["name"] in model_files),
            compressed_bytes=facts.get("compressed_bytes"),
            target=Target(**facts["target"]),
            plan=tuple(facts["plan"]),
            facts=facts["runtime"],
        )
    except (KeyError, TypeError, ValidationError, Refused) as error:
        raise Refused(
            "the manifest must describe a delivered model",
            value=error,
            place=str(folder),
            fix="choose a folder that `deliver` wrote",
        ) from error


def _refuse_swapped(artefact: Artefact) -> None:
    """Refuse another folder in the place of the one that a finished run delivered and judged."""
    for run in artefact.path.parents[:DEPTH_IN_RUN]:
        if not (run / "record.json").is_file():
            continue
        record = read_json(run / "record.json")
        told = record.get("artefact") if isinstance(record, dict) else None
        if not isinstance(told, dict) or told.get("path") != artefact.path.relative_to(run).as_posix():
            return
        if told.get("sha256") != artefact.sha256:
            raise Refused(
                "must be the artefact that the run's record was written for",
                value=f"{artefact.sha256[:12]}, where the record says {str(told.get('sha256'))[:12]}",
                place=str(artefact.path),
                fix="put back the folder that the run delivered, or copy this one out of the run directory",
            )
        return


def compressed_bytes(path: Path) -> int:
    """Return how many bytes zlib at level 6 makes of a file."""
    compressor, length = zlib.compressobj(ZLIB_LEVEL), 0
    with refusing(path, "read"), open(path, "rb") as file:
        while block := file.read(BLOCK):
            length += len(compressor.compress(block))
    return length + len(compressor.flush())


def _refuse_pickles(folder: Path, names: Iterable[str]) -> None:
    names = list(names)
    for name in names:
        raw = _RAW.get(name) in names
        with refusing(folder / name, "read"), open(folder / name, "rb") as file:
            head = file.read(9)
            file.seek(0)
            pickled = _looks_pickled(name, head) and not (raw and not _is_pickle(file))
        if pickled or (Path(name).suffix.lower() in PICKLES and not raw):
            raise Refused(
                "a file of an artefact cannot carry a pickle",
                value=name,
                place=str(folder),
                fix="a pickle can run any code: save the model as ONNX or safetensors",
            )


def _looks_pickled(name: str, head: bytes) -> bool:
    """Recognize a pickle or a zip archive behind another name.

    A safetensors file starts with a length that can look like a pickle's two first bytes; its ninth byte is
    the brace of its header.
    """
    if head.startswith(b"PK\x03\x04"):
        return not name.lower().endswith(".keras")
    return len(head) > 1 and head[0] == 0x80 and head[1] in (2, 3, 4, 5) and head[8:9] != b"{"


def _is_pickle(file: BinaryIO) -> bool:
    """Tell whether a file that starts like a pickle or a zip archive is one to its end; nothing is loaded.

    Numbers without a header may start with any bytes.
    """
    if file.read(4) == b"PK\x03\x04":
        return True
    file.seek(0)
    try:
        return any(code.name == "STOP" for code, _, _ in pickletools.genops(file))
    except (ValueError, OverflowError, MemoryError):
        return False
