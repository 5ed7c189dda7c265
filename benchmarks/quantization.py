"""Quantized CIFAR ResNets: rounding to nearest, rounding learned by blocks, training, and NNCF beside them.

    PENJING_DATA=/path/to/data python benchmarks/quantization.py [--depth 20] [--bits 8/8 4/8 4/4 3/3 2/4]
        [--rows nearest reconstruct] [--epochs 2] [--view published]

Two views. `adapted`: the network adapted to the JPEG copies (`examples/cifar10.py`), judged on the 9,500 test
copies. `published`: original weights, judged on 500 lossless test images, which tell differences of 2.5
points only. Bits are of weights / inputs; the first and the last layer keep 8, as is usual. Weights have a
scale for each output channel, inputs one for the tensor. No row but `train` uses labels. Rows with fewer than
8 bits are simulated: there is no kernel for them here, so they have no latency.

`synthetic` and `noise` are `nearest` without data: inputs made from BatchNorm statistics, and plain noise.
`nncf` is the post-training quantization of NNCF (`pip install nncf`), 8 bits, on the same images. Prints
accuracy, points lost with a paired 95% interval (Tango), and the seconds taken.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import torch

import penjing as pj
from penjing.arrays.observers.observer import ObserverKind
from penjing.core.context import Context

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import cifar10
from one_shot_sparsity import BACKEND, adapted, published
from resnet_rows import Rows, parser_of

Table = dict[str, Callable[["Job"], torch.nn.Module]]


class Job:
    """What a row starts from."""

    def __init__(self, model: torch.nn.Module, task: pj.Task, options: argparse.Namespace) -> None:
        self.model, self.task, self.options = model, task.prepare(), options
        self.weights = self.inputs = 8

    def apply(self, *plan: pj.Method) -> torch.nn.Module:
        """Return the model after a plan."""
        context = Context(task=self.task, backend=BACKEND, original=self.model)
        return pj.apply(self.model, plan, self.task, context=context).model

    @property
    def formats(self) -> dict[str, str]:
        """Return the formats of the row."""
        return {"weights": f"int{self.weights} channel", "inputs": f"uint{self.inputs}"}


def nearest(job: Job) -> torch.nn.Module:
    """Round to nearest."""
    return job.apply(pj.QuantizeNearest(**job.formats, observer=job.options.observer))


def synthetic(job: Job) -> torch.nn.Module:
    """Round to nearest, ranges from inputs that are made from BatchNorm statistics."""
    return job.apply(pj.QuantizeNearest(**job.formats, observer=job.options.observer, data="synthetic"))


def noise(job: Job) -> torch.nn.Module:
    """Round to nearest, ranges from 64 inputs of noise of unit variance."""
    x = np.random.default_rng(0).standard_normal((64, *job.task.train.example()[0].shape[1:]))
    split = pj.Split((x.astype(np.float32),), np.zeros(64, np.int64), "train")
    made = Job(job.model, replace(job.task, train=split), job.options)
    made.weights, made.inputs = job.weights, job.inputs
    return nearest(made)


def reconstruct(job: Job) -> torch.nn.Module:
    """Learn rounding block by block."""
    return job.apply(pj.QuantizeReconstruct(**job.formats, steps=job.options.steps))


def train(job: Job) -> torch.nn.Module:
    """Learn rounding, then train weights and scales towards the original."""
    recipe = pj.TrainQuantized(epochs=job.options.epochs, lr=job.options.lr, schedule="one_cycle")
    return job.apply(pj.QuantizeReconstruct(**job.formats, steps=job.options.steps), recipe)


def nncf(job: Job) -> torch.nn.Module:
    """Quantize with NNCF, 8 bits."""
    import nncf as library

    if (job.weights, job.inputs) != (8, 8):
        raise pj.Refused("NNCF quantizes to 8 bits", value=f"{job.weights}/{job.inputs}")
    (x,), _ = job.task.train.arrays()
    data = library.Dataset([torch.from_numpy(x[i : i + 1]) for i in range(256)])
    return library.quantize(job.model, data, subset_size=256)


ROWS: Table = {
    "nearest": nearest,
    "synthetic": synthetic,
    "noise": noise,
    "reconstruct": reconstruct,
    "train": train,
    "nncf": nncf,
}


def show(options: argparse.Namespace) -> None:
    """Print the table."""
    cifar10.DEPTH = options.depth
    model, task = {"adapted": adapted, "published": published}[options.view]()
    rows = Rows(f"ResNet-{options.depth}, {options.view}", model, task, options)
    rows.begin()
    for bits in options.bits:
        for name in options.rows:
            job = Job(model, task, options)
            job.weights, job.inputs = (int(part) for part in bits.split("/"))
            rows.row(bits, name, partial(ROWS[name], job))


def main() -> None:
    """Parse arguments and print the table."""
    parser = parser_of(__doc__, images=10_000)
    parser.add_argument("--depth", type=int, choices=(20, 56), default=20)
    parser.add_argument("--view", choices=("adapted", "published"), default="adapted")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=["nearest", "reconstruct", "nncf"])
    parser.add_argument("--bits", nargs="+", default=["8/8", "4/8", "4/4", "3/3", "2/4"])
    parser.add_argument("--observer", choices=get_args(ObserverKind), default="mse", help="of row nearest")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--lr", type=float, default=0.01)
    show(parser.parse_args())


if __name__ == "__main__":
    main()
