"""MiniLM-L6 at half the multiply-adds without training: what is lost, and what it gains on the clock.

    PENJING_DATA=/path/to/data python benchmarks/encoder.py [--data sst2 clinc150] [--ratio 0.5]

Every plan is applied to the same fine-tuned classifier (`examples/minilm.py`). Accuracy is of the test part;
the drop is paired with the dense model, example by example, with exact bounds, 97.5% on either side.
Latency is ONNX Runtime's, one sentence of the data's median length at a time, all models interleaved.
Seconds are of the processor, on one thread.
"""

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import penjing as pj
from penjing.backends.torch import BACKEND
from penjing.core.artefact import deliver
from penjing.core.measurement import Latency
from penjing.measurement.compare import compare
from penjing.measurement.latency import interleave, summarise
from penjing.measurement.process import RuntimeProcess, save_arrays

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import minilm

SECONDS_OF_TIMING = 60.0
EXAMPLES, REPAIRED = 2048, 4096
"""Of the training data: for judging units, without labels, and for repair."""


def plans(ratio: float) -> dict[str, pj.Method | tuple[pj.Method, ...]]:
    """Return the plans by name, all to the same share of multiply-adds."""
    norm, taylor = (
        pj.PruneChannels(ratio, of="multiply_adds", score=score, selection=selection, round_to=16)
        for score, selection in (("l2", "local"), ("taylor", "global"))
    )
    masks = pj.PruneTransformer(ratio, examples=EXAMPLES, labels=False)
    refit = pj.PruneTransformer(ratio, criterion="refit", examples=EXAMPLES)
    repair = pj.LeastSquares(examples=REPAIRED)
    return {
        "l2 norm, each layer alike": norm,
        "l2 norm + LeastSquares": (norm, repair),
        "Taylor, global": taylor,
        "Taylor + LeastSquares": (taylor, repair),
        "PruneTransformer, masks": masks,
        "masks + LeastSquares": (masks, repair),
        "PruneTransformer, refit": refit,
        "refit + LeastSquares": (refit, repair),
    }


@dataclass
class Row:
    """A model with its logits on the test part and the processor seconds that making it took."""

    model: torch.nn.Module
    logits: NDArray[np.float32]
    seconds: float


def logits(net: torch.nn.Module, split: pj.Split) -> NDArray[np.float32]:
    """Return outputs in the order of the split; batches are of similar length, cut to the longest."""
    ids, mask = split.inputs
    lengths = mask.sum(1)
    order, parts = np.argsort(lengths, kind="stable"), []
    with torch.no_grad():
        for start in range(0, len(order), 64):
            batch = order[start : start + 64]
            longest = int(lengths[batch].max())
            parts.append(net(*(torch.from_numpy(x[batch, :longest]) for x in (ids, mask))).numpy())
    return np.concatenate(parts)[np.argsort(order)]


def made(net: torch.nn.Module, task: pj.Task, ratio: float) -> dict[str, Row]:
    """Apply every plan; refusals are printed."""
    rows = {"dense": Row(net, logits(net, task.test), 0.0)}
    for name, plan in plans(ratio).items():
        start = time.process_time()
        try:
            model = pj.apply(net, plan, task).model
        except pj.Refused as refusal:
            print(f"{name}: refused: {refusal}")
            continue
        seconds = time.process_time() - start
        rows[name] = Row(model, logits(model, task.test), seconds)
        correct = (rows[name].logits.argmax(1) == task.test.targets).mean()
        print(f"{name}: {correct:.2%} after {seconds:.0f} s", flush=True)
    return rows


def latencies(rows: dict[str, Row], task: pj.Task, seconds: float) -> tuple[int, dict[str, Latency]]:
    """Return the median length in tokens, and the latency of every model on one sentence of it."""
    lengths = task.test.inputs[1].sum(1)
    length = int(np.median(lengths))
    chosen = int(np.argmin(np.abs(lengths - length)))
    example = tuple(x[chosen : chosen + 1, :length] for x in task.test.inputs)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files, target, processes = save_arrays(folder, example, "batch"), pj.Target(), {}
        for number, (name, row) in enumerate(rows.items()):
            path = deliver(row.model, target, folder / f"model{number}", example=example).path
            processes[name] = stack.enter_context(RuntimeProcess(path, target))
            processes[name].set_batch(files)
        samples = interleave(processes, rounds=31, seconds=seconds)
    dense = samples["dense"]
    return length, {name: summarise(mine, dense, 1, 1, "dense") for name, mine in samples.items()}


def show(rows: dict[str, Row], task: pj.Task, times: dict[str, Latency], length: int) -> None:
    """Print the table."""
    example = tuple(x[:1, :length] for x in task.test.inputs)
    print("\n| plan | accuracy | drop in points (95%) | multiply-adds | p50 | times faster (95%) | seconds |")
    print("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        correct = (row.logits.argmax(1) == task.test.targets).mean()
        drop = compare(task, rows["dense"].logits, row.logits, task.test.targets).bounds(0.975)
        count = BACKEND.operations(row.model, example).multiply_adds
        p50, ratio = times[name].p50_ms, times[name].ratio
        assert ratio is not None
        points = "" if name == "dense" else f"{drop.value:+.2%} ({drop.low:+.2%} to {drop.high:+.2%})"
        faster = (
            "" if name == "dense" else f"{1 / ratio.value:.2f} ({1 / ratio.high:.2f} to {1 / ratio.low:.2f})"
        )
        print(
            f"| {name} | {correct:.2%} | {points} | {count / 1e6:.1f} M | {p50.value:.3f} ms | {faster} "
            f"| {row.seconds:.0f} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", default=["sst2", "clinc150"], choices=sorted(minilm.CLASSES))
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=SECONDS_OF_TIMING)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for data in arguments.data:
        the_task = minilm.task(data).prepare()
        made_rows = made(minilm.model(data), the_task, arguments.ratio)
        tokens, found = latencies(made_rows, the_task, arguments.seconds)
        print(f"\n{data}: {arguments.ratio:.0%} of the multiply-adds removed, sentences of {tokens} tokens")
        show(made_rows, the_task, found, tokens)
