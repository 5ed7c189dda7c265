"""One table: every method on every backend, and what holds for each of them.

A new method needs a row in `ROWS`, and nothing else here.
"""

import contextlib
import itertools
import json
import math
from dataclasses import dataclass, field
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
from pydantic import ValidationError

import penjing as pj
from penjing.backends.numpy import BACKEND as NUMPY
from penjing.backends.numpy import Node, NumpyNet
from penjing.core.apply import apply
from penjing.core.backend import backend_for
from penjing.core.context import Context
from penjing.core.extras import missing
from penjing.core.method import Stage, inner, stage_of
from penjing.core.registry import backends_of, load_methods, method_from_json, method_to_json
from penjing.core.task import Split, Task
from penjing.train.method import TrainingMethod
from penjing.train.strategy import Strategy

BACKENDS = ("numpy", "torch", "onnx")
TRAIN = {"epochs": 0.25, "batch_size": 32, "precision": "float32"}
FEW = {"examples": 48}
WEIGHTED = ("conv", "depthwise", "linear")
NO_HANDLER = "the method needs a handler for the model's backend"
NO_BATCHNORM = "needs a PyTorch model with BatchNorm"
IN_FRAMEWORK = "channels cannot be pruned in an ONNX graph"


@dataclass(frozen=True)
class Row:
    """One configuration of a method.

    Attributes:
        method: the configuration.
        works: backends with a handler for it; `adopted` ones hand their model to ONNX first, of these
            `exported` ones in a handler of their own.
        refused: for every other backend, the rule that is named.
        after: steps that have to come first.
        kinds: kinds of layers that must each be reported; none: one change for the whole model, `*`.
        reported: names that must each be reported, where they are no layers with weights.
        one: a pattern that matches some of its layers.
        simulated: whether the result computes with rounded values in float, so that it is not delivered.
        wrong: values that cannot be constructed, by field.
    """

    method: pj.Method
    works: tuple[str, ...]
    wrong: dict[str, list]
    adopted: tuple[str, ...] = ()
    exported: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    after: tuple[pj.Method, ...] = ()
    kinds: tuple[str, ...] = ()
    reported: tuple[str, ...] = ()
    one: str = "pointwise"
    simulated: bool = False

    @property
    def plan(self):
        return pj.chain(*self.after, self.method)


WRONG_RECIPE = {
    "epochs": [0, -1, math.nan, math.inf, "many", 20_000],
    "lr": [0, -0.1, math.nan],
    "optimizer": ["lbfgs", 3],
    "batch_size": [0, 2.5],
    "weight_decay": [-0.1, 1],
    "schedule": ["none"],
    "clip_norm": [0],
    "max_seconds": [0],
    "precision": ["float8"],
    "warmup": [-0.1, 1],
    "layer_decay": [0, 1.5],
    "averaging": ["mean"],
    "sam": [0, 2],
    "label_smoothing": [-0.1, 1],
    "mixup": [-1],
    "cutmix": [-1, math.inf],
    "flip": ["perhaps"],
    "shift": [-1, 0.5],
    "start_size": [0, 1.5],
    "stochastic_depth": [-0.1, 1],
    "recompute": ["perhaps"],
    "batchnorm": ["none"],
    "ghost_batch": [1, 2.5],
    "patience": [0, 1.5],
    "accumulation_steps": [0, 1.5],
    "layout": ["rows"],
    "compile": ["perhaps"],
    "shard": ["perhaps"],
    "strategy": [3, "fast"],
}
WRONG_FORMATS = {
    "weights": ["int1", "int8 token", "float", 3],
    "inputs": ["uint17", "uint8 channel", "int4 group 8", 3],
    "ends": ["perhaps"],
    "observer": ["median"],
    "examples": [0, -1, 2.5],
    "batch_size": [0, 1.5],
    "by_layer": ["fc", [["fc"]], {"fc": "int99"}, {"fc": ["int4", "uint4 channel"]}, {"fc": 4}],
    "mixed": [4, {}, {"bits": 0}, {"bits": 4, "options": ["int4"]}, {"bits": 4, "examples": 31}],
}
WRONG_SPARSITY = {
    "sparsity": [0, 1, -0.1, 1.5, math.nan, "half", None],
    "pattern": ["4:2", "2:2", "block:0x1", "rows", 3],
}
WRONG_LAYERWISE = WRONG_SPARSITY | {
    "examples": [0, -1, 2.5],
    "batch_size": [0, 1.5],
    "sequential": ["perhaps"],
}
WRONG_CORRECTED = WRONG_LAYERWISE | {"compensate": ["perhaps"], "allocation": ["best"]}
INTEGERS = ("onnx", "torch", "numpy")
EVERYWHERE = ("numpy", "torch", "onnx")

ROWS = {
    "remove-blocks": Row(
        pj.RemoveBlocks(count=1, examples=64, batch_size=64),
        ("torch",),
        {
            "count": [0, -1, 1.5, "one"],
            "ratio": [0, 1, -0.5, math.nan],
            "score": ["additive"],
            "examples": [1],
            "batch_size": [1],
            "evaluations": [0, 2.5],
        },
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
        reported=("body.0", "body.1", "body.2"),
        one="body.1*",
    ),
    "prune": Row(
        pj.PruneChannels(0.5),
        ("numpy", "torch"),
        {
            "ratio": [0, 1, -0.1, 1.5, math.nan, "half", None],
            "score": ["l3"],
            "round_to": [0, 2.5],
            "examples": [0],
            "batch_size": [0],
            "of": ["channels", 3],
            "selection": ["layer"],
            "floor": [-0.1, 1.5, [["conv1", 2]], "half"],
            "ceiling": [-0.1, 1.5, [["conv1", math.nan]]],
            "units": [[], ["neuron"], ["channel", "head width"], ["head", "head"]],
            "target": ["tpu", {"threads": 0}],
        },
        refused={"onnx": IN_FRAMEWORK},
        kinds=WEIGHTED,
    ),
    **{
        f"prune-{score}": Row(
            pj.PruneChannels(0.5, score=score, selection=selection, of=of),
            ("numpy", "torch"),
            {},
            refused={"onnx": IN_FRAMEWORK},
            kinds=WEIGHTED,
            one="pointwise" if of == "units" else "*",
        )
        for score, selection, of in (
            ("l1", "global", "units"),
            ("random", "local", "parameters"),
            ("batchnorm", "isomorphic", "multiply_adds"),
            ("lamp", "global", "multiply_adds"),
            ("fpgm", "local", "units"),
            ("activation", "local", "multiply_adds"),
        )
    },
    **{
        f"prune-{score}": Row(
            pj.PruneChannels(0.5, score=score, examples=64),
            ("torch",),
            {},
            refused={"numpy": "must be a score without gradients on a model of numpy", "onnx": IN_FRAMEWORK},
            kinds=WEIGHTED,
        )
        for score in ("taylor", "fisher", "output_fisher", "hessian", "refit")
    },
    "prune-transformer": Row(
        pj.PruneTransformer(0.2, examples=64, round_to=8),
        ("torch",),
        {
            "ratio": [0, 1, -0.1, 1.5, math.nan, "half", None],
            "criterion": ["fisher", None],
            "of": ["units", "size", 3],
            "labels": ["perhaps"],
            "examples": [0, 31, 2.5],
            "batch_size": [0],
            "round_to": [0, 2.5],
            "rearrange": ["perhaps"],
            "target": ["tpu", {"threads": 0}],
        },
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
        kinds=WEIGHTED,
        one="body.1.*",
    ),
    "prune-transformer-masks": Row(
        pj.PruneTransformer(0.2, criterion="masks", examples=64, round_to=8),
        ("torch",),
        {"criterion": [1]},
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
        kinds=WEIGHTED,
        one="body.1.*",
    ),
    "second-order": Row(
        pj.PruneSecondOrder(0.5, examples=48, stages=2),
        ("torch",),
        WRONG_SPARSITY
        | {
            "examples": [0, 7, 2.5],
            "batch_size": [0],
            "stages": [0, 1.5],
            "ridge": [0, -1, math.inf],
            "iterations": [-1],
            "floor": [-0.1, 1],
        },
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
        kinds=WEIGHTED,
    ),
    "kfac": Row(
        pj.PruneKFAC(0.5, **FEW),
        ("torch",),
        WRONG_LAYERWISE | {"compensate": ["perhaps"]},
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
        kinds=WEIGHTED,
    ),
    "gradual": Row(
        pj.PruneGradually(0.5, **TRAIN, updates=3),
        ("torch",),
        WRONG_SPARSITY
        | WRONG_RECIPE
        | {
            "scope": ["row"],
            "floor": [-0.1, 1],
            "ramp": ["linear"],
            "begin": [-0.1, 1],
            "end": [0, 1.5],
            "updates": [0],
            "criterion": ["random"],
            "rewind": ["rate", "all"],
            "rounds": [0, 2],
            "alpha": [-0.1, 2],
        },
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
        kinds=WEIGHTED,
        reported=("*",),
    ),
    "gradual-movement": Row(
        pj.PruneGradually(pattern="2:4", criterion="movement", **TRAIN),
        ("torch",),
        {},
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
        kinds=("linear",),
    ),
    "magnitude": Row(
        pj.PruneMagnitude(0.5),
        EVERYWHERE,
        WRONG_SPARSITY | {"scope": ["row"], "floor": [-0.1, 1, math.nan]},
        kinds=WEIGHTED,
    ),
    "magnitude-2:4": Row(pj.PruneMagnitude(pattern="2:4"), EVERYWHERE, {}, kinds=WEIGHTED),
    "wanda": Row(pj.PruneWanda(0.5, **FEW), EVERYWHERE, WRONG_LAYERWISE, kinds=WEIGHTED),
    "sparsegpt": Row(pj.PruneSparseGPT(0.5, **FEW), EVERYWHERE, WRONG_CORRECTED, kinds=WEIGHTED),
    "obc": Row(pj.PruneOBC(0.5, **FEW), EVERYWHERE, WRONG_CORRECTED, kinds=WEIGHTED),
    "alps": Row(pj.PruneALPS(0.5, **FEW), EVERYWHERE, WRONG_CORRECTED, kinds=WEIGHTED),
    "alps-global": Row(
        pj.PruneALPS(0.5, allocation="global", compensate=True, **FEW), EVERYWHERE, {}, kinds=WEIGHTED
    ),
    "batchnorm": Row(
        pj.ReestimateBatchNorm(examples=80, batch_size=40),
        ("numpy", "torch"),
        {"examples": [0, 1.5, "all"], "batch_size": [1]},
        refused={"onnx": NO_HANDLER},
        kinds=("batchnorm",),
        one="second_bn | inside_bn",
    ),
    "group-norm": Row(
        pj.ReplaceBatchNorm(groups=2),
        ("torch",),
        {"groups": [0, 1.5, "all"]},
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
        kinds=("batchnorm",),
        one="second_bn | inside_bn",
    ),
    "least-squares": Row(
        pj.LeastSquares(examples=128, observations=2048),
        ("torch",),
        {
            "examples": [0, 31, 2.5, "all"],
            "observations": [0, 63, 2.5],
            "ridge": [0, -1, math.nan, math.inf, "auto"],
        },
        refused={"numpy": NO_HANDLER, "onnx": IN_FRAMEWORK},
        after=(pj.PruneChannels(0.5),),
        kinds=(*WEIGHTED, "batchnorm"),
    ),
    "match-statistics": Row(
        pj.MatchStatistics(examples=128),
        ("torch",),
        {"examples": [0, 31, 2.5, "all"], "variance": ["both", 2], "shrinkage": [-0.1, 1.1, math.nan]},
        refused={"numpy": NO_HANDLER, "onnx": IN_FRAMEWORK},
        after=(pj.PruneChannels(0.5),),
        kinds=(*WEIGHTED, "batchnorm"),
        one="pointwise_bn",
    ),
    "fine-tune": Row(
        pj.FineTune(**TRAIN), ("torch",), WRONG_RECIPE, refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER}
    ),
    "distill": Row(
        pj.Distill(**TRAIN),
        ("torch",),
        WRONG_RECIPE
        | {
            "loss": ["kl", 3],
            "temperature": [0, -1, math.inf],
            "alpha": [-0.1, 1.1],
            "standardize": ["perhaps"],
            "balance": [[1, 2], [1], "both"],
            "loss_warmup": [-0.1, 1.5],
            "cache": ["perhaps"],
            "data": ["validation"],
            "examples": [1, 2.5, 64],
        },
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
    ),
    "distill-synthetic": Row(
        pj.Distill(data="synthetic", examples=64, **TRAIN),
        ("torch",),
        {"alpha": [0.9], "loss": ["dkd"], "loss_warmup": [0.1]},
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
    ),
    "distill-dkd": Row(
        pj.Distill(loss="dkd", balance=(1, 4), **TRAIN),
        ("torch",),
        {"balance": [[0, 0], [-1, 2], [1]]},
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
    ),
    "distill-features": Row(
        pj.DistillFeatures(pairs={"pointwise": "pointwise", "stem": "stem"}, projection="always", **TRAIN),
        ("torch",),
        WRONG_RECIPE
        | {
            "relation": ["similar"],
            "pairs": ["stem", [["stem"]], {"stem": 3}],
            "projection": ["perhaps"],
            "beta": [0, -1, math.inf],
            "alpha": [-0.1, 1.1, None],
            "temperature": [0, math.inf],
        },
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
    ),
    "distill-relational": Row(
        pj.DistillFeatures(relation="relational", **TRAIN),
        ("torch",),
        {},
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
    ),
    "distill-blocks": Row(
        pj.DistillBlocks(**TRAIN),
        ("torch",),
        WRONG_RECIPE | {"blocks": ["body.1", 3, [4]]},
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
        reported=("body.0", "body.1", "body.2"),
        one="body.1*",
    ),
    "distill-relations": Row(
        pj.DistillRelations(**TRAIN),
        ("torch",),
        WRONG_RECIPE
        | {
            "relation": ["attention"],
            "student_layer": ["last", 0.5],
            "teacher_layer": ["last"],
            "heads": [0, 2.5],
            "beta": [0, math.inf],
            "alpha": [-0.1, 1.1],
            "temperature": [0, math.inf],
        },
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
        one="fc",
    ),
    "distill-scores": Row(
        pj.DistillRelations(relation="scores", **TRAIN),
        ("torch",),
        {"heads": [2], "stochastic_depth": [0.1]},
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
        one="fc",
    ),
    "distill-on-policy": Row(
        pj.DistillOnPolicy(prompt=2, alpha=0.5, **TRAIN),
        ("torch",),
        WRONG_RECIPE
        | {
            "on_policy": [-0.1, 1.5],
            "prompt": [0, 1.5],
            "beta": [-0.1, 1.5, math.nan],
            "sampling_temperature": [0, math.inf],
            "end": [-1, 0.5],
            "alpha": [0, 1.1],
            "sam": [0.05],
        },
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
        one="out",
    ),
    "static": Row(
        pj.Int8Static(**FEW),
        INTEGERS,
        {
            "observer": ["median"],
            "examples": [0, -1, 2.5],
            "data": ["noise"],
            "inputs": ["int4", "int8 token"],
            "weights": ["int4 channel", "int8 group 32"],
        },
        adopted=("torch", "numpy"),
        exported=("torch",),
        kinds=WEIGHTED,
    ),
    "static-synthetic": Row(
        pj.Int8Static(**FEW, data="synthetic"),
        ("torch",),
        {},
        adopted=("torch",),
        exported=("torch",),
        refused={"numpy": NO_BATCHNORM, "onnx": NO_BATCHNORM},
        kinds=WEIGHTED,
    ),
    "static-stated": Row(
        pj.Int8Static(**FEW),
        ("torch",),
        {},
        adopted=("torch",),
        exported=("torch",),
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
        after=(pj.QuantizeNearest("int4", "uint8", **FEW),),
        kinds=WEIGHTED,
    ),
    "smooth": Row(
        pj.SmoothActivations(**FEW, gain=0),
        INTEGERS,
        {"examples": [0, -1, 2.5], "gain": [-0.1, 1, math.nan, "some"]},
        adopted=("torch", "numpy"),
        kinds=WEIGHTED,
        one="fc",
    ),
    "equalize": Row(
        pj.EqualizeWeights(),
        INTEGERS,
        {"sweeps": [0, 2.5, "all"]},
        adopted=("torch", "numpy"),
        kinds=WEIGHTED,
        one="depthwise | pointwise",
    ),
    "dynamic": Row(pj.Int8Dynamic(), INTEGERS, {}, adopted=("torch", "numpy"), kinds=WEIGHTED, one="fc"),
    "bias": Row(
        pj.CorrectBias(**FEW),
        INTEGERS,
        {"examples": [0, -1, 2.5]},
        adopted=("torch", "numpy"),
        after=(pj.Int8Static(**FEW),),
        kinds=WEIGHTED,
    ),
    "weight-only": Row(
        pj.WeightOnly("int8 group 16"),
        INTEGERS,
        {"weights": ["int4", "int3 group 32", "nf4", None], "compute": ["float16"]},
        adopted=("torch", "numpy"),
        exported=("torch",),
        kinds=WEIGHTED,
        one="fc",
    ),
    "weight-only-stated": Row(
        pj.WeightOnly("int8 group 16"),
        ("torch",),
        {},
        adopted=("torch",),
        exported=("torch",),
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
        after=(pj.QuantizeNearest("int4 group 16", None, **FEW),),
        kinds=WEIGHTED,
        one="fc",
    ),
    "quantize-embeddings": Row(
        pj.QuantizeEmbeddings(),
        ("onnx", "torch"),
        {"weights": ["int3", "int4 group 24", "nf4", "int8 narrow", None]},
        refused={"numpy": "must change at least one layer"},
        adopted=("torch",),
        kinds=("embedding", "linear"),
        one="table",
    ),
    "quantize-embeddings-groups": Row(
        pj.QuantizeEmbeddings("uint4 group 16"),
        ("onnx", "torch"),
        {},
        refused={"numpy": "must change at least one layer"},
        adopted=("torch",),
        kinds=("embedding", "linear"),
        one="table",
    ),
    "quantize-nearest": Row(
        pj.QuantizeNearest("int4", "uint8", **FEW),
        ("torch",),
        WRONG_FORMATS | {"data": ["noise", None]},
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
        kinds=WEIGHTED,
        simulated=True,
    ),
    "quantize-nearest-synthetic": Row(
        pj.QuantizeNearest("int8", "uint8", examples=16, data="synthetic"),
        ("torch",),
        {},
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
        kinds=WEIGHTED,
        simulated=True,
    ),
    "quantize-nearest-mixed": Row(
        pj.QuantizeNearest(
            by_layer={"stem": ("int8", "uint8")},
            mixed=pj.MixedBits(5.5, options=("int4 channel", ("int8 channel", "uint4")), examples=32),
            **FEW,
        ),
        ("torch",),
        {},
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
        kinds=WEIGHTED,
        one="inside* | pointwise | stem",
        simulated=True,
    ),
    "quantize-reconstruct": Row(
        pj.QuantizeReconstruct("int4", "uint8", steps=3, examples=64),
        ("torch",),
        WRONG_FORMATS | {"examples": [31, 40.5], "steps": [0, 1.5], "block": [0], "drop": [-0.1, 1]},
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
        kinds=WEIGHTED,
        simulated=True,
    ),
    "quantize-gptq": Row(
        pj.QuantizeGPTQ("int4 group 8", **FEW),
        ("torch",),
        WRONG_FORMATS | {"order": ["best"], "compensate": ["perhaps"], "damping": [0, 1.5, math.nan]},
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
        kinds=WEIGHTED,
        simulated=True,
    ),
    "quantize-gptq-compensated": Row(
        pj.QuantizeGPTQ("uint3 channel", "uint8", order="given", compensate=True, **FEW),
        ("torch",),
        {},
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
        kinds=WEIGHTED,
        simulated=True,
    ),
    "quantize-awq": Row(
        pj.QuantizeAWQ("int4 group 8", "int8 token", **FEW),
        ("torch",),
        WRONG_FORMATS | {"inputs": ["uint17", "uint8", "uint8 channel", 3]},
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
        kinds=WEIGHTED,
        one="fc",
        simulated=True,
    ),
    "quantize-autoround": Row(
        pj.QuantizeAutoRound("uint4 group 8", steps=3, **FEW),
        ("torch",),
        WRONG_FORMATS | {"weights": ["int1", "nf4", 3], "steps": [0, 1.5], "block": [0]},
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
        kinds=WEIGHTED,
        simulated=True,
    ),
    "train-quantized": Row(
        pj.TrainQuantized(**TRAIN),
        ("torch",),
        WRONG_RECIPE | {"temperature": [0, -1, math.inf], "alpha": [-0.1, 1.1]},
        refused={"numpy": NO_HANDLER, "onnx": NO_HANDLER},
        after=(pj.QuantizeNearest("int4", "uint8", **FEW),),
        simulated=True,
    ),
}


def cells(choose):
    return pytest.mark.parametrize(
        ("row", "backend"),
        [pytest.param(row, b, id=f"{name}-{b}") for name, row in ROWS.items() for b in choose(row)],
    )


working = cells(lambda row: row.works)
rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def network():
    """Residual, depthwise and pointwise convolutions with BatchNorm, for images of 8 by 8 pixels."""
    rng = np.random.default_rng(0)
    nodes, tensors = [], {}

    def conv(name, x, out, each, kernel, *, groups=1, relu=True):
        weight = rng.normal(size=(out, each, kernel, kernel)) * (2 / (each * kernel**2)) ** 0.5
        tensors[name] = {"weight": weight}
        tensors[f"{name}_bn"] = {
            "weight": rng.uniform(0.5, 1.5, out),
            "bias": rng.normal(size=out) / 4,
            "running_mean": rng.normal(size=out) / 4,
            "running_var": rng.uniform(0.5, 1.5, out),
        }
        nodes.append(Node(name, "conv2d", (x,), {"padding": kernel // 2, "groups": groups}))
        nodes.append(Node(f"{name}_bn", "batchnorm", (name,)))
        if relu:
            nodes.append(Node(f"{name}_relu", "relu", (f"{name}_bn",)))
        return nodes[-1].name

    stem = conv("stem", "x", 16, 1, 3)
    inside = conv("inside", stem, 16, 16, 3)
    second = conv("second", inside, 16, 16, 3, relu=False)
    nodes.append(Node("sum", "add", (second, stem)))
    depthwise = conv("depthwise", "sum", 16, 1, 3, groups=16)
    conv("pointwise", depthwise, 24, 16, 1)
    nodes.append(Node("mean", "global_mean", (nodes[-1].name,)))
    nodes.append(Node("fc", "linear", ("mean",)))
    tensors["fc"] = {"weight": rng.normal(size=(10, 24)) / 3, "bias": rng.normal(size=10) / 4}
    return NumpyNet(("x",), tuple(nodes), tensors)


@pytest.fixture(scope="module")
def task():
    datasets = pytest.importorskip("sklearn.datasets", reason="the extra metrics is not installed")
    digits = datasets.load_digits()
    x, y = (digits.images[:, None] / 16).astype(np.float32), digits.target
    bounds = {"train": slice(0, 320), "valid": slice(320, 440), "test": slice(440, 560)}
    return Task(**{name: Split((x[part],), y[part], name) for name, part in bounds.items()})


def network_of_blocks():
    """Residual blocks in a row, for images of 8 by 8 pixels."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x):
            return torch.relu(x + self.norm(self.conv(x)))

    torch.manual_seed(0)
    body = nn.Sequential(*[Block() for _ in range(3)])
    parts = {"stem": nn.Conv2d(1, 8, 1), "body": body, "pool": nn.AdaptiveAvgPool2d(1)}
    net = nn.Sequential()
    for name, part in (*parts.items(), ("flat", nn.Flatten()), ("fc", nn.Linear(8, 10))):
        net.add_module(name, part)
    return net.eval()


def network_of_lookups():
    """An embedding of grey values, for images of 8 by 8 pixels."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.fc = nn.Embedding(17, 16), nn.Linear(16, 10)

        def forward(self, x):
            return self.fc(self.table((x.flatten(1) * 16).long()).mean(1))

    torch.manual_seed(0)
    return Net().eval()


def task_of_tokens():
    """Rows of tokens that count up or down; what a decoder learns from."""
    from torch.nn.functional import cross_entropy

    rng = np.random.default_rng(0)
    ids = (rng.integers(0, 11, (192, 1)) + rng.choice([-1, 1], (192, 1)) * np.arange(7)) % 11
    bounds = {"train": slice(0, 128), "valid": slice(128, 160), "test": slice(160, 192)}
    splits = {name: Split((ids[part, :-1],), ids[part, 1:], name) for name, part in bounds.items()}

    def loss(outputs, targets):
        return cross_entropy(outputs.flatten(0, 1), targets.flatten())

    return Task(
        **splits,
        loss=loss,
        metric=lambda o, y: float((o.argmax(-1) == y).mean()),
        direction="maximize",
        max_overlap=1,
    )


SPECIAL = {
    pj.RemoveBlocks: "blocks",
    pj.DistillBlocks: "blocks",
    pj.DistillRelations: "transformer",
    pj.DistillOnPolicy: "decoder",
    pj.PruneTransformer: "transformer",
    pj.QuantizeEmbeddings: "lookups",
}
"""Methods whose work the common network does not have, and the network that has it."""


@pytest.fixture(scope="module")
def models(torch_twin, request, tmp_path_factory):
    """The same network on every backend whose packages are there."""
    net = network()
    found = {"numpy": net}
    if not missing("torch"):
        found["torch"] = torch_twin(net)
        found["torch blocks"] = network_of_blocks()
        found["torch lookups"] = network_of_lookups()
        found["torch transformer"] = request.getfixturevalue("tiny_transformer")()
        found["torch decoder"] = request.getfixturevalue("tiny_decoder")()
    if not missing("onnx"):
        path = tmp_path_factory.mktemp("onnx") / "net.onnx"
        NUMPY.export(net, (np.zeros((1, 1, 8, 8), np.float32),), path)
        found["onnx"] = pj.load_onnx(path)
    if "torch" in found and "onnx" in found:
        path = tmp_path_factory.mktemp("onnx") / "lookups.onnx"
        example = (np.zeros((2, 1, 8, 8), np.float32),)
        backend_for(found["torch"]).export(found["torch lookups"], example, path)
        found["onnx lookups"] = pj.load_onnx(path)
    return found


class Lab:
    """Applies plans and remembers what came of them, so that one application serves several tests."""

    def __init__(self, models, task):
        self.models, self.known = models, {}
        self.images, self.tokens = task, task_of_tokens() if "torch" in models else None

    def model(self, backend, plan=()):
        if backend not in self.models:
            pytest.skip(f"the extra {backend} is not installed")
        special = (f"{backend} {SPECIAL.get(type(inner(method)))}" for method in plan)
        return self.models[next((name for name in special if name in self.models), backend)]

    def task(self, plan=(), backend="torch"):
        """The task of the network that a plan works on."""
        decodes = backend == "torch" and any(SPECIAL.get(type(inner(method))) == "decoder" for method in plan)
        return self.tokens if decodes else self.images

    def fresh(self, plan, backend, seed=0):
        model, task = self.model(backend, plan), self.task(plan, backend)
        context = Context(task=task, backend=backend_for(model), original=model, seed=seed)
        return apply(model, plan, task, context=context)

    def applied(self, plan, backend):
        if (plan, backend) not in self.known:
            self.known[plan, backend] = self.fresh(plan, backend)
        return self.known[plan, backend]

    def inputs(self, plan=(), backend="torch"):
        return self.task(plan, backend).valid.arrays()[0]


@pytest.fixture(scope="module")
def lab(models, task):
    return Lab(models, task)


def outputs(model, inputs):
    return backend_for(model).run(model, inputs)


def fingerprint(model):
    return backend_for(model).fingerprint(model)


def gap(a, b):
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def facts(applied):
    """Changes without the numbers that a clock gave."""
    timed = ("seconds", "data_seconds", "samples_per_s")
    return [
        (c.layer, c.status, c.reason, {k: v for k, v in c.detail.items() if k not in timed})
        for c in applied.changes
    ]


def test_the_three_models_are_one(lab):
    reference = outputs(lab.model("numpy"), lab.inputs())
    for backend in set(BACKENDS) & set(lab.models):
        assert gap(outputs(lab.models[backend], lab.inputs()), reference) < 1e-5


def test_every_method_and_every_handler_is_in_the_table():
    for name, kind in load_methods().items():
        mine = [row for row in ROWS.values() if type(row.method) is kind]
        assert mine, f"{name} has no row in tests/test_every_method.py"
        direct = {b for row in mine for b in {*row.works} - {*row.adopted} | {*row.exported}}
        handled = set(backends_of(kind)) - {"any"}
        assert handled <= direct, f"{name}: handlers that no row tries"
        assert "any" in backends_of(kind) or handled == direct, f"{name}: rows without a handler"


@rows
def test_every_cell_either_works_or_is_refused(row):
    assert sorted((*row.works, *row.refused)) == sorted(BACKENDS)


@cells(lambda row: row.refused)
def test_a_cell_without_a_handler_is_refused_with_its_rule(row, backend, lab):
    with pytest.raises(pj.Refused) as caught:
        lab.fresh(row.plan, backend)
    assert row.refused[backend] in str(caught.value)
    assert caught.value.fix


@working
def test_the_input_is_unaltered_and_so_are_the_users_random_numbers(row, backend, lab):
    before, state = fingerprint(lab.model(backend, row.plan)), np.random.get_state()[1].copy()
    result = lab.applied(row.plan, backend)
    assert fingerprint(lab.model(backend, row.plan)) == before != fingerprint(result.model)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    assert backend_for(result.model).name == ("onnx" if backend in row.adopted else backend)


@working
def test_the_same_seed_gives_the_same_result(row, backend, lab):
    first, second = lab.applied(row.plan, backend), lab.fresh(row.plan, backend)
    assert fingerprint(first.model) == fingerprint(second.model)
    assert facts(first) == facts(second)
    np.testing.assert_array_equal(
        outputs(first.model, lab.inputs(row.plan, backend)),
        outputs(second.model, lab.inputs(row.plan, backend)),
    )


@working
def test_the_result_is_delivered_and_loads_to_equal_outputs(row, backend, lab, tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    result = lab.applied(row.plan, backend)
    example = lab.task(row.plan, backend).valid.example()

    def deliver():
        folder = tmp_path / "small"
        return pj.deliver(result, pj.Target(), folder, example=example)

    if row.simulated:
        with pytest.raises(pj.Refused, match="cannot be a simulation of number formats"):
            deliver()
        return
    artefact = deliver()
    assert (
        gap(
            pj.load(artefact.path)(*lab.inputs(row.plan, backend)),
            outputs(result.model, lab.inputs(row.plan, backend)),
        )
        < 1e-5
    )


@working
def test_every_chosen_layer_is_reported(row, backend, lab):
    model = lab.model(backend, row.plan)
    kinds = {layer.name: layer.kind for layer in backend_for(model).layers(model)}
    expected = {name for name, kind in kinds.items() if kind in row.kinds} or set(row.reported) or {"*"}
    changes = [c for c in lab.applied(row.plan, backend).changes if c.method == type(row.method).__name__]
    assert expected <= {c.layer for c in changes}
    assert len({c.layer for c in changes}) == len(changes), "a layer is reported twice"
    assert any(c.done and c.detail for c in changes)
    assert all(c.done or c.reason for c in changes)


@working
def test_outputs_stay_finite_and_near_those_of_the_oracle(row, backend, lab):
    found = outputs(lab.applied(row.plan, backend).model, lab.inputs(row.plan, backend))
    assert np.isfinite(found).all()
    assert np.ptp(found, axis=0).max() > 0
    if "numpy" in row.works and backend != "numpy":
        oracle = outputs(lab.applied(row.plan, "numpy").model, lab.inputs(row.plan, backend))
        # Rounding to integers turns the last bit of a float into a step of the grid.
        assert gap(found, oracle) < (0.03 if row.adopted else 1e-5)


@working
def test_only_some_layers_are_touched(row, backend, lab):
    limited = pj.only(row.one, row.method)
    model = lab.model(backend, row.plan)
    result = lab.fresh(pj.chain(*row.after, limited), backend)
    changes = [c for c in result.changes if c.method == type(row.method).__name__]
    # A layer after a pruned one loses inputs; its own channels stay.
    done = {c.layer for c in changes if c.done and c.detail.get("out_before") != c.detail.get("out_after", 0)}
    assert done
    assert all(name == "*" or limited.covers(name) for name in done)
    reader = backend_for(model)
    names = [layer.name for layer in reader.layers(model)]
    assert any(limited.covers(name) for name in names)
    if backend in row.adopted or backend == "onnx" or stage_of(row.method) == Stage.STRUCTURE:
        return
    start = lab.applied(row.after, backend).model if row.after else model
    if row.simulated and not row.after:
        rounding = [
            name for name, layer in result.model.named_modules() if hasattr(layer, "weight_quantizer")
        ]
        assert rounding
        assert all(limited.covers(name) for name in rounding)
        return
    for name in names:
        before, after = reader.read(start, name), reader.read(result.model, name)
        same = all(np.array_equal(before[tensor], after[tensor]) for tensor in before)
        assert same != limited.covers(name), name


@cells(lambda row: [row.works[0]])
def test_a_pattern_that_matches_nothing_is_refused(row, backend, lab):
    with pytest.raises(pj.Refused):
        lab.fresh(pj.chain(*row.after, pj.only("no_such_layer.*", row.method)), backend)


@rows
def test_repr_and_json_rebuild_the_method(row):
    names = {name: getattr(pj, name) for name in pj.__all__}
    for method in (row.method, pj.only("conv*", row.method)):
        assert eval(repr(method), names) == method  # noqa: S307
        assert method_from_json(json.loads(json.dumps(method_to_json(method)))) == method
        assert hash(method) == hash(method_from_json(method_to_json(method)))


def some_values(info):
    """Values of a field that are good by themselves: every choice, both truths, numbers around bounds."""
    names = ("gt", "ge", "lt", "le")
    bounds = {name: getattr(part, name) for part in info.metadata for name in names if hasattr(part, name)}
    low = bounds.get("ge", bounds.get("gt", 0))
    width = min(bounds.get("le", bounds.get("lt", low + 1)) - low, 1)
    found = [info.get_default(call_default_factory=True)]
    for kind in (info.annotation, *get_args(info.annotation)):
        if get_origin(kind) is Literal:
            found += get_args(kind)
        elif kind is type(None):
            found.append(None)
        elif kind is bool:
            found += [False, True]
        elif kind in (int, float):
            inside = {int: [low + 1, low + 2], float: [0.1 * width + low, 0.9 * width + low]}[kind]
            found += [*inside, *(kind(bounds[name]) for name in ("ge", "le") if name in bounds)]
    return found


FIRST = {type(row.method): row.method for row in reversed(ROWS.values())}
"""Of each kind of method the first in the table."""


@pytest.mark.parametrize("method", FIRST.values(), ids=[kind.__name__ for kind in FIRST])
def test_whatever_two_fields_can_be_constructed_is_rebuilt_from_its_json(method):
    kind, given = type(method), {name: getattr(method, name) for name in method.model_fields_set}
    pairs = itertools.combinations_with_replacement(kind.model_fields, 2)
    built = [kind(**given)]
    for first, second in pairs:
        values = (some_values(kind.model_fields[name]) for name in (first, second))
        for one, other in itertools.product(*values):
            with contextlib.suppress(pj.Refused):
                built.append(kind(**given | {first: one, second: other}))
    for one in built:
        assert method_from_json(json.loads(json.dumps(method_to_json(one)))) == one


WRONG = [
    pytest.param(row, name, value, id=f"{label}-{name}={value!r}")
    for label, row in ROWS.items()
    for name, values in row.wrong.items()
    for value in values
]


@pytest.mark.parametrize(("row", "name", "value"), WRONG)
def test_bad_values_are_refused_at_construction_by_name(row, name, value):
    fields = {k: v for k, v in method_to_json(row.method).items() if k != "method"}
    with pytest.raises(pj.Refused, match=name):
        type(row.method)(**{**fields, name: value})
    with pytest.raises(pj.Refused, match=name):
        method_from_json({**method_to_json(row.method), name: value})


@rows
def test_every_field_is_tried_with_a_bad_value(row):
    tried = {
        name for other in ROWS.values() if type(other.method) is type(row.method) for name in other.wrong
    }
    trains = isinstance(row.method, TrainingMethod)
    assert {*type(row.method).model_fields, *(Strategy.model_fields if trains else ())} == tried


@rows
def test_unknown_fields_are_refused(row):
    with pytest.raises(pj.Refused, match="strenght"):
        method_from_json({**method_to_json(row.method), "strenght": 1})
    with pytest.raises(pj.Refused, match="strenght"):
        type(row.method)(**{k: v for k, v in method_to_json(row.method).items() if k != "method"}, strenght=1)


@rows
def test_methods_are_frozen_and_documented(row):
    kind = type(row.method)
    assert stage_of(row.method) == kind.stage
    for name in kind.model_fields:
        assert name in "".join(base.__doc__ or "" for base in kind.__mro__), f"{kind.__name__}.{name}"
        with pytest.raises(ValidationError, match="frozen"):
            setattr(row.method, name, None)


PRUNE, BN, TUNE, DISTILL, STATIC, DYNAMIC, BIAS = (
    ROWS[name].method for name in ("prune", "batchnorm", "fine-tune", "distill", "static", "dynamic", "bias")
)
PAIRS = [
    (a, b)
    for a in (PRUNE, BN, STATIC, DYNAMIC, BIAS)
    for b in (PRUNE, BN, STATIC, DYNAMIC, BIAS)
    if stage_of(a) <= stage_of(b)
]
NOT_TOGETHER = {
    (STATIC, STATIC): "must be in float",
    (STATIC, DYNAMIC): "must be in float",
    (DYNAMIC, STATIC): "must be in float",
    (DYNAMIC, DYNAMIC): "must be in float",
    **{(first, BIAS): "needs the float model beside" for first in (PRUNE, BN, BIAS)},
    **{(BIAS, second): "needs the float model beside" for second in (STATIC, DYNAMIC)},
    (DYNAMIC, BIAS): "must change at least one layer",
}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "+".join(type(m).__name__ for m in pair))
def test_every_legal_pair_works_or_is_refused_for_what_it_is(pair, lab):
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    if pair in NOT_TOGETHER:
        with pytest.raises(pj.Refused, match=NOT_TOGETHER[pair]):
            lab.applied(pair, "numpy")
        return
    result = lab.applied(pair, "numpy")
    assert np.isfinite(outputs(result.model, lab.inputs())).all()
    for method in pair:
        assert any(c.done for c in result.changes if c.method == type(method).__name__)


CHAINS = [
    pj.chain(PRUNE, BN, DISTILL, STATIC, BIAS),
    pj.chain(PRUNE, DISTILL, TUNE, BN, DYNAMIC),
    pj.chain(PRUNE, PRUNE, TUNE, STATIC),
]


@pytest.mark.parametrize("plan", CHAINS, ids=lambda plan: "+".join(type(m).__name__ for m in plan))
def test_long_chains_work_on_torch_and_are_delivered(plan, lab, tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    before = fingerprint(lab.model("torch"))
    result = lab.applied(plan, "torch")
    assert fingerprint(lab.model("torch")) == before
    assert list(dict.fromkeys(c.method for c in result.changes)) == list(
        dict.fromkeys(type(m).__name__ for m in plan)
    )
    artefact = pj.deliver(result, pj.Target(), tmp_path / "a", example=lab.task().valid.example())
    assert gap(pj.load(artefact.path)(*lab.inputs()), outputs(result.model, lab.inputs())) < 1e-5
    numbers = backend_for(result.model).operations(result.model, lab.task().valid.example())
    whole = NUMPY.operations(lab.model("numpy"), lab.task().valid.example())
    assert numbers.multiply_adds < 0.6 * whole.multiply_adds
