"""Integers inside PyTorch: torchao's kernels on MiniLM-L6, beside PyTorch in float32 and Penjing's integers.

    pip install torchao
    PENJING_DATA=/path/to/data python benchmarks/torchao_linear.py [--rounds 15]

Everything runs in one process on one thread, one sentence at a time, in rounds that take turns: PyTorch eager
and compiled in float32, torchao's int8 (inputs rounded when the model runs, and weights alone) and int4
weights, compiled, and Penjing's `SmoothActivations` and `Int8Static` in ONNX Runtime. Prints the median of
the rounds' medians in milliseconds with its 95% interval, the largest difference of logits relative to the
largest, and what could not run, with its reason.
"""

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import penjing as pj
from penjing.arrays.statistics import median_interval

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import minilm

CALLS = 10


def converted(net: torch.nn.Module, name: str) -> torch.nn.Module:
    """Return a compiled copy with torchao's integers."""
    from torchao import quantization as ao

    made = copy.deepcopy(net)
    ao.quantize_(made, getattr(ao, name)())
    return torch.compile(made)


def candidates(net: torch.nn.Module) -> dict[str, Callable[[], torch.nn.Module]]:
    """Return by label what makes each network."""
    return {
        "torch eager float32": lambda: net,
        "torch compiled float32": lambda: torch.compile(copy.deepcopy(net)),
        "torchao int8 inputs and weights": lambda: converted(net, "Int8DynamicActivationInt8WeightConfig"),
        "torchao int8 weights": lambda: converted(net, "Int8WeightOnlyConfig"),
        "torchao int4 weights": lambda: converted(net, "Int4WeightOnlyConfig"),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="clinc150", choices=sorted(minilm.CLASSES))
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    task, net = minilm.task(options.data).prepare(), minilm.model(options.data)
    arrays = tuple(x[:1] for x in task.valid.arrays()[0])
    inputs = tuple(torch.from_numpy(x) for x in arrays)
    calls: dict[str, Callable[[], np.ndarray]] = {}
    for label, make in candidates(net).items():
        try:
            model = make()
            with torch.no_grad():
                model(*inputs)
        except Exception as error:  # noqa: BLE001 - whatever another library raises is the result here
            print(f"{label}: not run: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
            continue
        calls[label] = lambda model=model: model(*inputs).numpy()
    plan = pj.chain(pj.SmoothActivations(), pj.Int8Static())
    integers = pj.apply(net, plan, task).model
    calls["Penjing int8 in ONNX Runtime"] = lambda: integers.run(arrays)[0]
    times: dict[str, list[float]] = {label: [] for label in calls}
    with torch.no_grad():
        outputs = {label: call() for label, call in calls.items()}
        for _ in range(options.rounds):
            for label, call in calls.items():
                call()
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                times[label].append((time.perf_counter() - start) / CALLS * 1e3)
    wanted = outputs["torch eager float32"]
    for label, seen in times.items():
        found = median_interval(np.array(seen))
        apart = np.abs(outputs[label] - wanted).max() / np.abs(wanted).max()
        print(f"{label:<34} {found.value:6.2f} ms ({found.low:.2f} to {found.high:.2f})  {apart:.1e}")


if __name__ == "__main__":
    main()
