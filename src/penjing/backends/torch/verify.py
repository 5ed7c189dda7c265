"""Proof that a shrunk model computes what the model with masked units computes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from penjing.backends.torch.capture import BATCH, Capture, bind
from penjing.backends.torch.flow import Flow
from penjing.backends.torch.steps import CONSUMERS, operator_name
from penjing.backends.torch.tensors import evaluating
from penjing.core.errors import Refused

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Largest difference of two outputs, relative to the largest output."""


class MaskedRun(fx.Interpreter):  # type: ignore[misc]
    """Runs a captured graph; what units that go would give to a weight is multiplied by zero."""

    def __init__(self, flow: Flow, stays: NDArray[np.bool_]) -> None:
        super().__init__(flow.capture.program.graph_module, graph=flow.capture.graph)
        self._flow, self._stays = flow, stays

    def run_node(self, n: Any) -> Any:
        """Run one node; mask the input of an operator that contracts channels."""
        if n.op != "call_function" or operator_name(n.target) not in CONSUMERS:
            return super().run_node(n)
        name = operator_name(n.target)
        x = n.args[1] if name == "addmm" else n.args[0]
        mask = self._mask(x, 1 if name.startswith("conv") else -1)
        if mask is None:
            return super().run_node(n)
        plain = self.env[x]
        self.env[x] = plain * mask.to(plain.device, plain.dtype)
        try:
            return super().run_node(n)
        finally:
            self.env[x] = plain

    def _mask(self, node: Any, axis: int) -> Any:
        dims = self._flow.values[node].dims
        stays = self._stays[dims[axis]]
        if stays.all():
            return None
        shape = [1] * len(dims)
        shape[axis] = -1
        return torch.from_numpy(stays).reshape(shape)


class Proof:
    """The masked model's output on examples, to hold shrunk models against."""

    def __init__(self, model: nn.Module, flow: Flow, kept: Mapping[str, NDArray[np.int64]]) -> None:
        self._flow, self._model = flow, model
        self._stays = flow.coupling.staying(kept)
        self._inputs = probes(flow.capture)
        self._expected = self._masked(model, self._inputs)

    def failure(self, shrunk: nn.Module) -> str:
        """Return why a shrunk model is wrong, or an empty string.

        A difference above the tolerance is looked at again in double precision, where rounding cannot be
        the cause.
        """
        try:
            found = run_quietly(shrunk, self._inputs)
        except Exception as error:  # noqa: BLE001 - the user's own code runs on widths that it may not expect
            return f"{type(shrunk).__name__} fails: {str(error).strip().splitlines()[0][:150]}"
        gap = difference(found, self._expected)
        if gap <= TOLERANCE.get(found.dtype, 0.0):
            return ""
        precise = self._precise_gap(shrunk) if np.isfinite(gap) else gap
        return "" if precise <= TOLERANCE[torch.float64] else f"{type(shrunk).__name__} differs by {gap:.1e}"

    def _masked(self, model: nn.Module, inputs: tuple[Any, ...]) -> Any:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return MaskedRun(self._flow, self._stays).run(
                *bind(self._flow.capture, model, tuple(x.clone() for x in inputs))
            )[0]

    def _precise_gap(self, shrunk: nn.Module) -> float:
        inputs = tuple(x.double() if x.is_floating_point() else x for x in self._inputs)
        try:
            expected = self._masked(copy.deepcopy(self._model).double(), inputs)
            return difference(run_quietly(copy.deepcopy(shrunk).double(), inputs), expected)
        except (RuntimeError, TypeError):
            # Code that creates single-precision tensors cannot run in double.
            return float("inf")


def check_capture(model: nn.Module, captured: Capture) -> None:
    """Refuse a graph that does not compute what its module computes.

    Raises:
        Refused: outputs differ, for example because the module keeps state between calls.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        runner = fx.Interpreter(captured.program.graph_module, graph=captured.graph)
        graph = runner.run(*bind(captured, model, probes(captured)))[0]
    # Twice, because state that a call leaves behind shows in the next one.
    outputs = [run_quietly(model, probes(captured)) for _ in range(2)]
    gap = max(difference(graph, output) for output in outputs)
    if gap > 10 * TOLERANCE.get(graph.dtype, 0.0):
        raise Refused("the captured graph computes what the model computes", place="model",
                      value=f"relative difference {gap:.1e}",
                      fix="remove state that changes from call to call from forward")  # fmt: skip


def probes(captured: Capture) -> tuple[Any, ...]:
    """Return a few inputs: the example, and for floats the example with seeded noise."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for x in captured.examples:
        x = x[: BATCH if not captured.dynamic else 2].clone()
        if x.is_floating_point():
            noise = torch.randn(x.shape, generator=generator).to(x.device, x.dtype)
            noise[0] = 0
            x = x + noise * max(float(x.float().std(correction=0)), 0.1)
        found.append(x)
    return tuple(found)


def run_quietly(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Return a module's output in evaluation mode, seeded, without gradients."""
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(*[x.clone() for x in inputs])


def difference(found: Any, expected: Any) -> float:
    """Return the largest absolute difference over the largest expected value; infinite for other shapes."""
    if found.shape != expected.shape:
        return float("inf")
    if not found.numel():
        return 0.0
    a, b = found.double(), expected.double()
    if not bool(torch.equal(a.isfinite(), b.isfinite())):
        return float("inf")
    gap = float((a - b).nan_to_num(0.0).abs().max())
    return gap / max(float(b.nan_to_num(0.0, 0.0, 0.0).abs().max()), 1e-12) if gap else 0.0
