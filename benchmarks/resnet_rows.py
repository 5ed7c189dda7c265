"""The frame of the benchmarks on quantized CIFAR ResNets: options that they share, and rows of a table."""

import argparse
import time
from collections.abc import Callable

import torch

import penjing as pj
from one_shot_sparsity import line, right


def parser_of(doc: str, images: int) -> argparse.ArgumentParser:
    """Return a parser with the common options.

    Args:
        doc: of the script.
        images: test images at most, by default.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="of reconstruction for each block")
    parser.add_argument("--images", type=int, default=images, help="test images at most")
    parser.add_argument("--threads", type=int, default=1)
    return parser


class Rows:
    """Accuracy, points lost with a paired 95% interval, and seconds of each way to make a model smaller."""

    def __init__(
        self, title: str, model: torch.nn.Module, task: pj.Task, options: argparse.Namespace
    ) -> None:
        torch.set_num_threads(options.threads)
        self.task, self.images = task, options.images
        self.dense = right(model, task, options.images)
        print(f"{title}: {len(self.dense)} test images, {options.threads} thread(s)")

    def begin(self) -> None:
        """Print the head and the line of the float model."""
        print(f"{'bits':<6} {'':<26} accuracy  points lost [95%]  seconds")
        print(f"{'32':<6} {line('float', self.dense, self.dense)}", flush=True)

    def row(self, bits: str, name: str, make: Callable[[], torch.nn.Module]) -> None:
        """Make a model and print its line, or why there is none."""
        start = time.perf_counter()
        try:
            small = make()
        except (pj.Refused, ImportError) as refused:
            print(f"{bits:<6} {name:<26} not run: {refused}", flush=True)
            return
        seconds = time.perf_counter() - start
        found = line(name, self.dense, right(small, self.task, self.images))
        print(f"{bits:<6} {found}  {seconds:7.1f}", flush=True)
