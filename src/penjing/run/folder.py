"""The folder of one run.

Layout:

    config.resolved.yaml   everything that the run was asked, resolved; its presence marks a run directory
    env.json               versions, processor, memory, system, threads
    ledger.sqlite          finished results, exactly once
    artefacts/             delivered models of candidates
    logs/                  what each candidate's process printed
    best.json              the best feasible artefact so far
    record.json            the whole run as JSON; its presence marks a finished run
    report.html            the same for people
    elapsed                seconds that the run has taken, noted while it runs
    driver.lock            PID and host of the process that drives the run
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from penjing.core.errors import Exit, Refused
from penjing.core.files import free_bytes, is_temporary, refusing, write_bytes, write_json, write_text
from penjing.core.strict_yaml import dump_yaml, read_yaml

SCHEMA = 1
"""Version of the run directory's form; a folder of a newer one is refused."""

_LEAST_FREE = 64 * 2**20
_PACKAGES = (
    "penjing",
    "numpy",
    "scipy",
    "torch",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "scikit-learn",
)
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY", "LD_PRELOAD")


@dataclass(frozen=True)
class RunFolder:
    """Where the parts of one run lie.

    >>> RunFolder(Path("runs/mine")).record.as_posix()
    'runs/mine/record.json'
    """

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.resolved.yaml"

    @property
    def environment(self) -> Path:
        """Versions and machine."""
        return self.path / "env.json"

    @property
    def ledger(self) -> Path:
        """Finished results."""
        return self.path / "ledger.sqlite"

    @property
    def artefacts(self) -> Path:
        """Delivered models."""
        return self.path / "artefacts"

    @property
    def logs(self) -> Path:
        """Output of the candidates' processes."""
        return self.path / "logs"

    @property
    def best(self) -> Path:
        """The best feasible artefact so far."""
        return self.path / "best.json"

    @property
    def record(self) -> Path:
        """The run as JSON."""
        return self.path / "record.json"

    @property
    def report(self) -> Path:
        """The run as HTML."""
        return self.path / "report.html"

    @property
    def elapsed(self) -> Path:
        """Seconds that the run has taken."""
        return self.path / "elapsed"

    @property
    def lock(self) -> Path:
        """The driver's lock."""
        return self.path / "driver.lock"

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.record.is_file()


def create_run(out: Path | str | None, name: str, *, needed_bytes: int = 0) -> RunFolder:
    """Make the folder of a new run, and check that it can take the run, before any work.

    Args:
        out: the folder, new or empty; None takes the next free `runs/NAME-N`.
        name: of the run, for that default.
        needed_bytes: estimate of what the run will write.

    Raises:
        Refused: the path is a file, holds a run or anything else, cannot be written, or has too little
            room. Nothing is overwritten, and nothing stays behind.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = create_run(f"{folder}/mine", "net")
    ...     sorted(path.name for path in run.path.iterdir())
    ['artefacts', 'logs']
    """
    if out is None:
        path = _numbered(Path("runs"), re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run")
    else:
        path = Path(out).expanduser().absolute()
        _refuse_used(path)
        with refusing(path):
            path.mkdir(parents=True, exist_ok=True)
    run = RunFolder(path)
    try:
        _check_room(path, needed_bytes)
        write_bytes(path / ".penjing-probe.tmp", b"x" * 4096)
        (path / ".penjing-probe.tmp").unlink()
        for folder in (run.artefacts, run.logs):
            with refusing(folder):
                folder.mkdir(exist_ok=True)
    except BaseException:
        _remove_empty(run)
        raise
    return run


def open_run(path: Path | str) -> RunFolder:
    """Open the folder of a run that was started before.

    Raises:
        Refused: no such folder, not a run, damaged, of a newer version, or a link or a device lies in it:
            what is written there would come to another place.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_config(create_run(folder, "net"), {"seed": 0})
    ...     read_config(open_run(folder))
    {'seed': 0}
    """
    run = RunFolder(Path(path).expanduser().absolute())
    if not run.path.is_dir():
        raise Refused(
            "must exist",
            value=str(run.path),
            place="the run directory",
            fix="give the folder that `penjing optimize` named",
            code=Exit.USAGE,
        )
    refuse_links(run)
    if not run.config.is_file():
        raise Refused(
            "must hold a run",
            value=f"a folder without {run.config.name}",
            place=str(run.path),
            fix="give the folder that `penjing optimize` named",
            code=Exit.USAGE,
        )
    read_config(run)
    return run


def refuse_links(run: RunFolder) -> None:
    """Refuse a run directory whose own files are something else.

    Raises:
        Refused: a link, a pipe or a device lies in it.
    """
    with refusing(run.path, "read"), os.scandir(run.path) as entries:
        for entry in entries:
            if not entry.is_file(follow_symlinks=False) and not entry.is_dir(follow_symlinks=False):
                raise Refused(
                    "must hold files and folders only, no links or devices",
                    value=entry.name,
                    place=str(run.path),
                    fix="put the file or folder itself in its place",
                )


def write_config(run: RunFolder, config: Mapping[str, Any]) -> None:
    """Save the resolved configuration and the environment of a run; from here on the folder is a run."""
    from penjing import __version__

    write_json(run.environment, describe_environment())
    write_text(run.config, dump_yaml({"schema": SCHEMA, "penjing": __version__, **config}))


def read_config(run: RunFolder) -> dict[str, Any]:
    """Return the resolved configuration of a run, without its own `schema` and `penjing`.

    Raises:
        Refused: damaged, or written by a newer version.
    """
    from penjing import __version__

    config = read_yaml(run.config)
    schema = config.get("schema") if isinstance(config, dict) else None
    if not isinstance(schema, int) or schema < 1:
        raise Refused(
            "must be a configuration that Penjing wrote",
            value=f"schema {schema!r}",
            place=str(run.config),
            fix="restore the file from a copy, or start a new run",
        )
    if schema > SCHEMA:
        raise Refused(
            f"must have at most schema {SCHEMA}, that of penjing {__version__}",
            place=str(run.config),
            value=f"{schema}, written by penjing {config.get('penjing')}",
            fix="upgrade: pip install -U penjing",
            code=Exit.ENVIRONMENT,
        )
    return {key: value for key, value in config.items() if key not in ("schema", "penjing")}


def describe_environment() -> dict[str, Any]:
    """Return versions, processor, cores, memory (bytes), system and thread settings, as plain data.

    >>> describe_environment()["memory_bytes"] > 1e6
    True
    """
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    return {
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "system": platform.platform(),
        "processor": _processor(),
        "cores": {
            "physical": psutil.cpu_count(logical=False),
            "logical": psutil.cpu_count(),
            "usable": None if affinity is None else len(affinity),
        },
        "memory_bytes": psutil.virtual_memory().total,
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _numbered(parent: Path, name: str) -> Path:
    parent = parent.absolute()
    with refusing(parent):
        parent.mkdir(parents=True, exist_ok=True)
        taken = [p.name.removeprefix(f"{name}-") for p in parent.glob("*") if p.name.startswith(f"{name}-")]
        number = max((int(t) for t in taken if t.isascii() and t.isdigit()), default=0) + 1
        while True:
            path = parent / f"{name}-{number}"
            try:
                path.mkdir()
                return path
            except FileExistsError:  # another run took it in this moment
                number += 1


def _refuse_used(path: Path) -> None:
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise Refused(
            "must be a folder",
            value="a file",
            place=str(path),
            fix="choose another --out",
            code=Exit.ENVIRONMENT,
        )
    run = RunFolder(path)
    if run.config.is_file():
        state = "a finished run" if run.finished else "an unfinished run"
        verb = "report" if run.finished else "resume"
        raise Refused(
            "a run needs a folder of its own",
            value=state,
            place=str(path),
            fix=f"type penjing {verb} {path}, or choose another --out",
            code=Exit.USAGE,
        )
    with refusing(path, "read"):
        # What `create_run` leaves when it is killed before the configuration is written is no obstacle.
        unborn = {run.environment.name, run.lock.name}
        unborn |= {f.name for f in (run.artefacts, run.logs) if f.is_dir() and not os.listdir(f)}
        foreign = sorted(name for name in set(os.listdir(path)) - unborn if not is_temporary(name))
    if foreign:
        names = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise Refused(
            "a run needs a folder of its own",
            value=names,
            place=str(path),
            fix="choose another --out, or an empty folder",
            code=Exit.USAGE,
        )


def _check_room(path: Path, needed_bytes: int) -> None:
    free, needed = free_bytes(path), needed_bytes + _LEAST_FREE
    if free is not None and free < needed:
        raise Refused(
            f"the disk must have about {needed:,} bytes of room for the run",
            value=f"{free:,} bytes free",
            place=str(path),
            fix="free some space, or choose another --out",
            code=Exit.ENVIRONMENT,
        )


def _remove_empty(run: RunFolder) -> None:
    for folder in (run.artefacts, run.logs, run.path):
        with contextlib.suppress(OSError):  # not made yet, or not empty: then it is not ours to remove
            folder.rmdir()
