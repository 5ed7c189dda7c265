"""Which precision recipes are worth a trial for a model on a target."""

from __future__ import annotations

from collections.abc import Iterable

from penjing.core.plan import Plan, chain
from penjing.core.target import Target, runtime_for
from penjing.quantize.int8_dynamic import Int8Dynamic
from penjing.quantize.int8_static import Int8Static
from penjing.quantize.smooth import SmoothActivations
from penjing.repair.bias import CorrectBias

STATIC = chain(Int8Static(), CorrectBias())
SMOOTHED = chain(SmoothActivations(), Int8Static(observer="minmax"), CorrectBias())
"""Clipping ranges, which helps convolutional networks, harms transformers (docs/benchmarks.md)."""


def choose_recipes_by_rule(kinds: Iterable[str], target: Target) -> tuple[Plan, ...]:
    """Return the recipes of the stage PRECISION for a model with these kinds of layers.

    Convolutions: static int8 only (their dynamic int8 kernel is slower than float). Models of linear
    layers: dynamic and static int8, where the runtime has kernels for both: OpenVINO runs the operators of
    dynamic int8 in float. Static is with smoothed activations where there is more than linear layers and
    BatchNorm, as in transformers; in a plain perceptron smoothing may find nothing to do. None where the
    runtime takes no integer graph.
    """
    if "onnx" not in runtime_for(target).backends():
        return ()
    present = set(kinds)
    if present & {"conv", "depthwise"}:
        return (STATIC,)
    if "linear" not in present:
        return ()
    static = STATIC if present <= {"linear", "batchnorm"} else SMOOTHED
    return (static,) if target.runtime == "openvino" else (chain(Int8Dynamic()), static)
