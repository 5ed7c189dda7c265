"""What the tool itself costs: `import penjing`, `penjing --help`, and a run whose budget is met already.

    python benchmarks/tool_cost.py [--runs 11]

Prints medians with the smallest and largest value, in seconds. The two sides of each comparison take turns.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

PENJING = str(Path(sys.executable).with_name("penjing"))
QUICK = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "python -c 'import penjing'": [sys.executable, "-c", "import penjing"],
    "penjing --help": [PENJING, "--help"],
}


def wall(command: list[str]) -> float:
    """Return the wall seconds of a command that must succeed."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def show(name: str, values: list[float]) -> None:
    """Print a median with its range."""
    span = f"[{min(values):.3f}, {max(values):.3f}]"
    print(f"{name:<48} {statistics.median(values):7.3f}  {span}  n={len(values)}")


def quick(runs: int) -> None:
    """Time the short commands, interleaved."""
    samples: dict[str, list[float]] = {name: [] for name in QUICK}
    for _ in range(runs):
        for name, command in QUICK.items():
            samples[name].append(wall(command))
    for name, values in samples.items():
        show(name, values)
    own = [
        a - b for a, b in zip(samples["python -c 'import penjing'"], samples["python -c pass"], strict=True)
    ]
    show("import penjing, beyond starting Python", own)


def no_op(runs: int) -> None:
    """Time runs whose limit the original keeps already, beside the evaluation that they contain."""
    totals, own = [], []
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task.py"
        shutil.copy(str(files("penjing.examples").joinpath("digits.py")), task)
        train = f"import runpy; runpy.run_path({str(task)!r})['model']()"
        subprocess.run([sys.executable, "-c", train], check=True)
        for number in range(runs):
            command = [
                PENJING,
                "optimize",
                str(task),
                "--max-drop",
                "5%",
                "--latency",
                "300%",
                "--json",
                "--out",
                f"{folder}/run{number}",
            ]
            start = time.perf_counter()
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            totals.append(time.perf_counter() - start)
            own.append(totals[-1] - json.loads(done.stdout)["spent"]["by"]["measurement"])
    show("run with a budget met already, in all", totals)
    show("the same without its measurements", own)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=11)
    arguments = parser.parse_args()
    quick(arguments.runs)
    no_op(max(1, arguments.runs // 4))
