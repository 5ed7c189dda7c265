"""The main job on CIFAR-10: `examples/cifar10.py` under a budget, and what it came to.

    PENJING_DATA=/path/to/data python benchmarks/main_job.py [--depth 20] [--time 20min]

Prints the verdict, latencies from one interleaved run on the unseen split (float in PyTorch eager, float in
the target, result, runners-up) and the share of the wall time that the tool itself took.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PENJING = str(Path(sys.executable).with_name("penjing"))
EXAMPLE = Path(__file__).parents[1] / "examples" / "cifar10.py"


def run(depth: int, time: str, max_drop: str, out: Path) -> dict:
    """Run the command and return the record."""
    command = [PENJING, "optimize", str(EXAMPLE), "--max-drop", max_drop, "--time", time, "--out", str(out)]
    environment = {**os.environ, "CIFAR_RESNET": str(depth)}
    done = subprocess.run(
        [*command, "--json"], env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode not in (0, 3):
        sys.exit(f"exit {done.returncode}: {done.stdout}")
    return json.loads(done.stdout)


def line(name: str, m: dict) -> str:
    """Return one row of the table."""
    latency, quality = m["latency"], m["quality"]
    p50 = latency["p50_ms"]
    ratio = latency["ratio"]
    speed = "reference"
    if ratio is not None:
        speed = f"{1 / ratio['value']:.2f} [{1 / ratio['high']:.2f}, {1 / ratio['low']:.2f}]"
    low, high = quality["low"] * 100, quality["high"] * 100
    return (
        f"{name:<22} {quality['value'] * 100:6.2f} [{low:.2f}, {high:.2f}]  "
        f"{p50['value']:7.4f} [{p50['low']:.4f}, {p50['high']:.4f}]  {speed:<22} "
        f"{m['size_bytes'] / 1e3:8.1f}  {m['operations']['multiply_adds'] / 1e6:6.2f}"
    )


def show(record: dict) -> None:
    """Print the table and the cost of the tool."""
    print(
        f"{'':<22} accuracy % [95%]        p50 ms [95%]             times faster [95%]     kB     M mult-adds"
    )
    for name in ("eager", "target"):
        if record["baselines"][name]:
            print(line(f"float, {record['baselines'][name]['target']}", record["baselines"][name]))
    print(line("result", record["result"]))
    for number, other in enumerate(record["runners_up"], 1):
        print(line(f"runner-up {number}", other))
    for name, limit in record["verdict"]["limits"].items():
        numbers = f"measured {limit['measured']:.5g} {limit['unit']}, limit {limit['limit']:.5g}"
        print(f"{name}: {limit['status']}, {numbers}")
    spent = record["spent"]
    shares = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in spent["by"].items())
    print(f"trials {spent['trials']}; wall {spent['seconds']:.0f} s: {shares}")
    other, compression = (spent["by"][name] / spent["seconds"] * 100 for name in ("other", "compression"))
    own = f"{other:.1f}% of the wall time; with the work of the methods {other + compression:.1f}%"
    print(f"the tool itself: {own}")
    print("plan:", json.dumps(record["plan"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=20, choices=(20, 56))
    parser.add_argument("--time", default="20min")
    parser.add_argument("--max-drop", default="1%")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    folder = arguments.out or Path(tempfile.mkdtemp()) / "run"
    show(run(arguments.depth, arguments.time, arguments.max_drop, folder))
