"""Which precision recipes are worth a trial for a model on a target."""

from __future__ import annotations

from collections.abc import Iterable

from penjing.core.plan import Plan, chain
from penjing.core.target import Target, runtime_for
from penjing.quantize.int8_dynamic import Int8Dynamic
from penjing.quantize.int8_static import Int8Static
from penjing.repair.bias import CorrectBias


def recipes(kinds: Iterable[str], target: Target) -> tuple[Plan, ...]:
    """Return the recipes of the stage PRECISION for a model with these kinds of layers.

    Convolutions: static int8 only (their dynamic int8 kernel is slower than float). Models of linear
    layers: dynamic and static int8, where the runtime has kernels for both: OpenVINO runs the operators of
    dynamic int8 in float. None where the runtime takes no integer graph.
    """
    if "onnx" not in runtime_for(target).backends():
        return ()
    present = set(kinds)
    static, dynamic = chain(Int8Static(), CorrectBias()), chain(Int8Dynamic())
    if present & {"conv", "depthwise"}:
        return (static,)
    if target.runtime == "openvino":
        return (static,) if "linear" in present else ()
    return (dynamic, static) if "linear" in present else ()
