"""What a run of many trials costs those who look at it: size of the ledger, seconds and memory of the verbs.

A small run on a network without a framework is made once. Its rows are then copied under other keys, each
with numbers of its own and with the changes of a network of many layers, as a run of thousands of trials has
them.

    python benchmarks/large_runs.py --trials 5000
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from penjing.run.ledger import Ledger

TASK = """
import numpy as np
import penjing as pj
from penjing.backends.numpy import Node, NumpyNet


def data():
    rng = np.random.default_rng(0)
    labels = np.arange(900) % 5
    inputs = rng.standard_normal((5, 16))[labels] + 0.3 * rng.standard_normal((900, 16))
    return inputs.astype(np.float32), labels


def task():
    x, y = data()
    train, valid, test = ((x[i : i + 300], y[i : i + 300]) for i in (0, 300, 600))
    return pj.Task(train=train, valid=valid, test=test)


def model():
    x, y = data()
    weight = np.random.default_rng(1).standard_normal((32, 16)).astype(np.float32) / 4
    hidden = np.maximum(x @ weight.T, 0)
    fitted = np.linalg.lstsq(hidden, np.eye(5)[y], rcond=None)[0].T.astype(np.float32)
    nodes = (Node("fc", "linear", ("x",)), Node("act", "relu", ("fc",)), Node("head", "linear", ("act",)))
    return NumpyNet(("x",), nodes, {"fc": {"weight": weight}, "head": {"weight": fitted}})
"""


def penjing(*arguments: object) -> tuple[float, float, str]:
    """Run a verb; return its CPU seconds, its peak memory in MB and what it printed."""
    command = [sys.executable, "-P", "-m", "penjing", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 3):
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}\n{said}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, said


def many(rows: dict[str, dict[str, Any]], count: int, layers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of so many trials, each a build and a measurement, like those that were done."""
    rng = np.random.default_rng(0)
    build = next(row for key, row in rows.items() if key.startswith("build-") and row["finished"]["value"])
    trial = next(row for key, row in rows.items() if key.startswith("trial-") and row["trial"]["measurement"])
    for number in range(count):
        key = f"{number:024x}"
        made = copy.deepcopy(build)
        change = made["finished"]["value"]["changes"][0]
        made["finished"]["value"]["changes"] = [
            change | {"layer": f"layer{i}.conv", "detail": {"error": rng.random(), "scale": rng.random()}}
            for i in range(layers)
        ]
        tried = copy.deepcopy(trial)
        tried["trial"] |= {"key": f"trial-{key}", "drop": rng.random(), "name": f"trial {number}"}
        tried["trial"]["measurement"]["latency"]["quantiles_ms"] = sorted(rng.random(101))
        yield f"build-{key}", made
        yield f"trial-{key}", tried


def main() -> None:
    """Make the run, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=5000)
    parser.add_argument("--layers", type=int, default=60, help="layers whose changes each build lists")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="penjing-") as folder:
        task, run = Path(folder) / "task.py", Path(folder) / "run"
        task.write_text(TASK)
        penjing("optimize", task, "--size", "40%", "--trials", 2, "--out", run)
        small = measured(run, task)
        with Ledger(run / "ledger.sqlite") as ledger:
            for key, row in many(dict(ledger.all()), options.trials, options.layers):
                ledger.put(key, row)
        large = measured(run, task)
    print(f"{'':<24}{'2 trials':>12}{f'{options.trials + 2:,} trials':>16}")
    for name in small:
        print(f"{name:<24}{small[name]:>12.2f}{large[name]:>16.2f}")


def measured(run: Path, task: Path) -> dict[str, float]:
    """Return the figures of a run, which is resumed as if its record had not been written."""
    found = {"ledger, MB": (run / "ledger.sqlite").stat().st_size / 1e6}
    for verb, more in (("status", []), ("resume", ["--task", task])):
        if verb == "resume":
            (run / "record.json").unlink()
        seconds, megabytes, _ = penjing(verb, run, *more)
        found |= {f"{verb}, CPU s": seconds, f"{verb}, peak MB": megabytes}
    return found


if __name__ == "__main__":
    main()
