"""Bits for each layer: ResNet-20 on CIFAR-10 with weights in 3, 4 or 5 bits on average, alike and mixed.

    PENJING_DATA=/path/to/data python benchmarks/mixed_precision.py [--bits 3 4 5] [--images 2000]
        [--rows uniform trace diagonal ours reconstruct] [--inputs uint8]

The network adapted to the JPEG copies (`examples/cifar10.py`), tested on test copies. `uniform`: one format
for all layers, the first and the last at 8 bits. The others choose one of 2, 3, 4, 5, 6 and 8 bits for each
layer by the same exact knapsack, within the bits that `uniform` stores (scales included); they differ in what
they take for the loss that rounding a layer causes:

    trace      mean trace of the layer's curvature times the squared change of the weights (HAWQ-V2)
    diagonal   half the mean of the sum of (dL/dy dy)^2 over elements of outputs (FIT, ModelOpt AutoQuantize)
    ours       half the mean of the square of the sum: `MixedBits`
    measured   the divergence of the model's outputs with that layer alone rounded, a run for each

The first three are taken on 512 training images without labels, `measured` on 256. Rounding is to nearest;
`reconstruct` learns it by blocks (`QuantizeReconstruct`), with one format and with what `ours` chose. First
comes Spearman's rank correlation of each of the first three with `measured`, over all layers and options
below 8 bits.

Prints accuracy, points lost with a paired 95% interval (Tango), and seconds. Simulated: no speed is claimed.
"""

import argparse
import copy
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

import penjing as pj
from penjing.arrays.formats.clipping import clipped_parameters
from penjing.arrays.knapsack import choose_options
from penjing.backends.torch.curvature import rounding_loss
from penjing.backends.torch.curvature.kronecker import kronecker_factors
from penjing.backends.torch.quant.folding import fold_batchnorm
from penjing.backends.torch.quantizers import Quantizer, set_quantizers
from penjing.core.backend import Sample
from penjing.core.context import Context

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from one_shot_sparsity import BACKEND, adapted
from resnet_rows import Rows, parser_of

OPTIONS = tuple(pj.number_format(f"int{bits} channel") for bits in (2, 3, 4, 5, 6, 8))
Losses = Mapping[str, NDArray[np.float64]]


class Layers:
    """The layers of the network with BatchNorm folded, and their weights rounded to each option."""

    def __init__(self, model: torch.nn.Module, task: pj.Task) -> None:
        self.model, self.sample = copy.deepcopy(model), Sample(task.train, "cross_entropy", 16, 32, 0)
        fold_batchnorm(self.model, task.train.example(), lambda name: True)
        kinds = ("conv", "linear")
        self.names = [layer.name for layer in BACKEND.layers(self.model) if layer.kind in kinds]
        self.weights = {n: BACKEND.read(self.model, n)["weight"] for n in self.names}
        self.pairs = {n: [(self._quantizer(n, f), None) for f in OPTIONS] for n in self.names}

    def _quantizer(self, name: str, format: pj.NumberFormat) -> Quantizer:
        scales = clipped_parameters(self.weights[name], format).scales
        return Quantizer(format, torch.from_numpy(np.array(scales)))

    def trace(self) -> Losses:
        """Return mean trace times squared change."""
        factors = kronecker_factors(self.model, self.names, self.sample)
        found = {}
        for name, weight in self.weights.items():
            inputs, slopes = factors[name].inputs[:-1, :-1], factors[name].slopes
            change = [q(torch.from_numpy(weight)).detach().numpy() - weight for q, _ in self.pairs[name]]
            mean = np.trace(inputs) * np.trace(slopes) / weight.size
            found[name] = np.array([mean * np.square(d, dtype=np.float64).sum() / 2 for d in change])
        return found

    def diagonal(self) -> Losses:
        """Return the expected loss with curvature taken as diagonal in the elements of outputs."""
        whole, rounding_loss._squared = rounding_loss._squared, _elements
        try:
            return self.ours()
        finally:
            rounding_loss._squared = whole

    def ours(self) -> Losses:
        """Return what `MixedBits` takes."""
        return rounding_loss.rounding_losses(self.model, self.pairs, self.sample)

    def measured(self) -> Losses:
        """Return the mean divergence of the outputs with one layer rounded."""
        (x,), _ = next(self.sample.split.batches(256, 0))
        before = self._outputs(self.model, x)
        found = {}
        for name in self.names:
            other, values = copy.deepcopy(self.model), []
            for pair in self.pairs[name]:
                set_quantizers(other.get_submodule(name), *pair)
                values.append(float((before.exp() * (before - self._outputs(other, x))).sum(1).mean()))
            found[name] = np.array(values)
        return found

    @staticmethod
    def _outputs(model: torch.nn.Module, x: NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(BACKEND.run(model, (x,))).double().log_softmax(1)

    def chosen(self, losses: Losses, uniform: int) -> dict[str, str]:
        """Return the formats that fit into the bits of a uniform format with ends at 8."""
        sizes = {n: [f.bits_per_value(w.shape) * w.size for f in OPTIONS] for n, w in self.weights.items()}
        ends, at = (self.names[0], self.names[-1]), [f.bits for f in OPTIONS].index(uniform)
        budget = sum(round(sizes[n][-1 if n in ends else at]) for n in self.names)
        bits = [np.rint(sizes[n]).astype(np.int64) for n in self.names]
        options = choose_options([losses[n] for n in self.names], bits, budget)
        return {n: str(OPTIONS[i]) for n, i in zip(self.names, options, strict=True)}


def _elements(layer: torch.nn.Module, calls: list, examples: int) -> float:
    with torch.no_grad():
        return float(sum(((layer(x) - y) * slope).double().square().sum() for x, y, slope in calls))


SCORES = ("trace", "diagonal", "ours", "measured")


def show(options: argparse.Namespace) -> None:
    """Print the tables."""
    model, task = adapted()
    task = task.prepare()
    context = Context(task=task, backend=BACKEND, original=model)
    rows = Rows(f"ResNet-20, inputs {options.inputs or 'float'}", model, task, options)
    layers, losses = Layers(model, task), {}
    scores = [name for name in SCORES if name in options.rows or name == "ours"]
    for name in scores:
        start = time.perf_counter()
        losses[name] = getattr(layers, name)()
        print(f"{name:<12} {time.perf_counter() - start:6.1f} s", flush=True)
    below = {score: np.concatenate([found[n][:-1] for n in layers.names]) for score, found in losses.items()}
    for name in scores[:-1] if "measured" in scores else ():
        print(f"{name:<12} rank correlation {spearmanr(below[name], below['measured'])[0]:.3f}")

    def row(bits: int, name: str, method: pj.Method) -> None:
        rows.row(str(bits), name, lambda: pj.apply(model, method, task, context=context).model)

    rows.begin()
    for bits in options.bits:
        alike = {"weights": f"int{bits} channel", "inputs": options.inputs}
        by_layer = {name: layers.chosen(found, bits) for name, found in losses.items()}
        if "uniform" in options.rows:
            row(bits, "uniform", pj.QuantizeNearest(**alike))
        for name in scores:
            row(bits, name, pj.QuantizeNearest(inputs=options.inputs, by_layer=by_layer[name]))
        print("      ours:", *(name.split()[0][3:] for name in by_layer["ours"].values()))
        if "reconstruct" in options.rows:
            learn = {"steps": options.steps}
            row(bits, "uniform, reconstructed", pj.QuantizeReconstruct(**alike, **learn))
            mixed = {"inputs": options.inputs, "by_layer": by_layer["ours"]}
            row(bits, "ours, reconstructed", pj.QuantizeReconstruct(**mixed, **learn))


def main() -> None:
    """Parse arguments and print the tables."""
    parser = parser_of(__doc__, images=2000)
    rows = ["uniform", *SCORES]
    parser.add_argument("--rows", nargs="+", choices=[*rows, "reconstruct"], default=rows)
    parser.add_argument("--bits", nargs="+", type=int, choices=(3, 4, 5, 6), default=[3, 4, 5])
    parser.add_argument("--inputs", help="format of layers' inputs; float without")
    show(parser.parse_args())


if __name__ == "__main__":
    main()
