"""Load and run hostile files, each in a process of its own that is watched: nothing may run, hang or swell.

    python benchmarks/hostile_files.py [FILTER]

A file passes if it is refused, or loads and runs, within 10 s and 2 GiB above the bare interpreter, and
nothing that it carries is executed. Each is tried twice: as a user opens it, and in a process with limits on
memory and time as measurements have, where a model without a bound may be tried and fail.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hostile.folders import made_folders
from hostile.onnx_files import made_onnx

SECONDS = 10.0
"""Of processor time, and ten times that on the clock: the machine may be busy."""
BYTES = 2**31


@dataclass(frozen=True)
class End:
    """How the attempt on a file ended."""

    outcome: str
    seconds: float
    peak: int

    @property
    def passed(self) -> bool:
        """Whether it ended in time and within the memory."""
        return not self.outcome.startswith(("HANGS", "SWELLS", "CRASHES"))


def open_and_run(path: Path) -> str:
    """Load a file or folder, run it once on ones, and say how it ended."""
    import penjing as pj

    try:
        if path.suffix == ".onnx":
            loaded = pj.load_onnx(path)
            loaded.run((np.ones((3, 4), np.float32),))
            return "loads and runs"
        pj.load(path)(np.ones((1, 4), np.float32))
    except pj.Refused as refused:
        return f"refused: {str(refused).replace(str(path), '').strip(': /')}"
    except MemoryError:
        return "fails: out of memory, within the limit"
    return "loads and runs"


def try_file(path: Path, limited: bool) -> End:
    """Try a file in a process of its own, and end that where it takes too long or too much."""
    command = [sys.executable, __file__, "--one", str(path), "limited" if limited else "free"]
    started = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak, ended = 0, ""
    while child.poll() is None and not ended:
        resident, busy = _usage(child.pid)
        peak = max(peak, resident)
        if resident > BYTES + 2**28:
            ended = "SWELLS"
        elif busy > SECONDS or time.monotonic() - started > 10 * SECONDS:
            ended = "HANGS"
        time.sleep(0.02)
    if ended:
        child.kill()
    said = (child.communicate()[0] or "").strip().splitlines()
    seconds = time.monotonic() - started
    if ended:
        return End(ended, seconds, peak)
    if child.returncode:
        died = "fails: killed within the limit" if limited else "CRASHES"
        return End(f"{died} ({child.returncode}): {said[-1] if said else ''}", seconds, peak)
    return End(said[-1], seconds, peak)


def _usage(process: int) -> tuple[int, float]:
    """Return resident bytes and seconds of processor time of a process."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0, 0.0
    return int(fields[21]) * resource.getpagesize(), sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def main(wanted: str = "") -> int:
    """Try every file whose kind or name contains a text; return the number of those that fail."""
    failed = count = 0
    with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
        marker = Path(scratch) / "executed"
        for kind, name, path in write_files(Path(scratch), marker):
            if wanted.lower() not in f"{kind} {name}".lower():
                continue
            ends = [try_file(path, limited) for limited in (False, True)]
            executed = marker.exists()
            bad = executed or not all(end.passed for end in ends)
            failed, count = failed + bad, count + 1
            print(f"{'FAILS' if bad else 'holds'}  {kind}: {name}")
            for label, end in zip(("as opened", "in a limit"), ends, strict=True):
                print(f"    {label}: {end.seconds:.1f} s, {end.peak / 2**20:.0f} MiB: {end.outcome[:150]}")
            if executed:
                print("    EXECUTED what it carries")
                marker.unlink()
    print(f"{count} files: {failed} fail")
    return failed


def write_files(scratch: Path, marker: Path) -> list[tuple[str, str, Path]]:
    """Write the whole corpus below a folder, and return kind, name and path of each."""
    found: list[tuple[str, str, Path]] = []
    for name, make in made_onnx():
        folder = scratch / f"onnx{len(found)}"
        folder.mkdir()
        (folder / "model.onnx").write_bytes(make(folder).SerializeToString())
        found.append(("ONNX", name, folder / "model.onnx"))
    for kind, name, write in made_folders(scratch, marker):
        found.append((kind, name, write(scratch / f"folder{len(found)}")))
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        if sys.argv[3] == "limited":
            resource.setrlimit(resource.RLIMIT_AS, (BYTES + 2**31, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CPU, (int(SECONDS) - 1, resource.RLIM_INFINITY))
        print(open_and_run(Path(sys.argv[2])))
        sys.exit(0)
    sys.exit(1 if main(*sys.argv[1:]) else 0)
