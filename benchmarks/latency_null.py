"""How often identical files are told apart: a file is timed against itself, as two candidates, many times.

    python benchmarks/latency_null.py                           # 100 comparisons of about 4 s
    python benchmarks/latency_null.py --comparisons 400 --seconds 10 --out null.jsonl

Every comparison is what a run does: `measure_all` of the folder under two names, in processes of its own. One
whose interval excludes 1 takes a difference of the machine for one of the files; at most 5 of 100 should. The
models take from 10 µs to 2 ms a call and alternate. Finished comparisons are kept, one a line, so that the
program can be stopped and started again.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from scipy.stats import binomtest

import penjing as pj
from penjing.backends.onnx.model import OnnxModel
from penjing.measurement.measure import measure_all
from penjing.measurement.sittings import Effort

MODELS = {"4 products of 64": (64, 4), "6 products of 512": (512, 6), "12 products of 1024": (1024, 12)}
CLASSES = 4


def main() -> None:
    """Make what comparisons are missing, and print the share that excludes 1."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--comparisons", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing in one comparison")
    parser.add_argument("--out", type=Path, default=Path("latency_null.jsonl"))
    options = parser.parse_args()
    done = read(options.out)
    with tempfile.TemporaryDirectory() as folder:
        artefacts = {name: deliver(*shape, Path(folder) / str(shape[0])) for name, shape in MODELS.items()}
        while len(done) < options.comparisons:
            name = list(MODELS)[len(done) % len(MODELS)]
            row = {"model": name} | compare(*artefacts[name], options.seconds)
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            done.append(row)
    show(done)


def read(path: Path) -> list[dict[str, float]]:
    """Return the comparisons that were made before."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def deliver(width: int, depth: int, folder: Path) -> tuple[Path, pj.Task]:
    """Write a network of square products with random weights, and give data of its width."""
    rng = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for i in range(depth):
        matrix = rng.standard_normal((width, width if i < depth - 1 else CLASSES)) / np.sqrt(width)
        weights.append(numpy_helper.from_array(matrix.astype(np.float32), f"w{i}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"h{i}"]))
        nodes.append(helper.make_node("Relu", [f"h{i}"], [f"r{i}"]))
        last = f"r{i}"
    ends = [("x", width), (last, CLASSES)]
    inputs, outputs = ([helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", w])] for n, w in ends)
    graph = helper.make_graph(nodes, "net", inputs, outputs, weights)
    opset = [helper.make_opsetid("", 18)]
    model = OnnxModel(helper.make_model(graph, opset_imports=opset, ir_version=9))
    x = rng.standard_normal((96, width)).astype(np.float32)
    y = rng.integers(0, CLASSES, 96)
    task = pj.Task(train=(x[:32], y[:32]), valid=(x[32:64], y[32:64]), test=(x[64:], y[64:])).prepare()
    return pj.deliver(model, pj.Target(), folder, example=(x[:1],)).path, task


def compare(folder: Path, task: pj.Task, seconds: float) -> dict[str, float]:
    """Time a file against itself once."""
    start = time.perf_counter()
    entry = (folder, pj.Target(), None)
    found = measure_all({"one": entry, "other": entry}, task, "valid", "one", effort=Effort(seconds))
    ratio = found["other"].measurement.latency.ratio
    return {"ratio": ratio.value, "low": ratio.low, "high": ratio.high, "s": time.perf_counter() - start}


def show(rows: list[dict[str, float]]) -> None:
    """Print the share that excludes 1 for each model and for all, with its interval at 95%."""
    print("| model | comparisons | exclude 1 | share | median half width | median s |")
    print("|---" * 6 + "|")
    for name in [*MODELS, "all"]:
        some = [row for row in rows if name in (row["model"], "all")]
        if not some:
            continue
        wrong = sum(not row["low"] <= 1 <= row["high"] for row in some)
        share = binomtest(wrong, len(some)).proportion_ci()
        width = np.median([(row["high"] - row["low"]) / 2 / row["ratio"] for row in some])
        seconds = np.median([row["s"] for row in some])
        print(
            f"| {name} | {len(some)} | {wrong} | {wrong / len(some):.1%} "
            f"[{share.low:.1%}, {share.high:.1%}] | {width:.2%} | {seconds:.1f} |"
        )


if __name__ == "__main__":
    main()
