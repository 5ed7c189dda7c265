"""Proof that a shrunk model computes what the model without some of its units computes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from penjing.backends.torch.cut.masked import MaskedRun
from penjing.backends.torch.graph.capture import BATCH, Capture, bind_placeholders
from penjing.backends.torch.graph.flow import Flow
from penjing.backends.torch.tensors import evaluating
from penjing.core.errors import Refused

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Largest difference of two outputs, relative to the largest output."""


class Proof:
    """The masked model's outputs on examples, to hold shrunk models against."""

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
            found = list_tensors(run_quietly(shrunk, self._inputs))
        except Exception as error:  # noqa: BLE001 - the user's own code runs on widths that it may not expect
            line = (str(error).strip().splitlines() or [""])[0][:150]
            return f"{type(shrunk).__name__} fails: {line}"
        gap = largest_gap(found, self._expected)
        if within(found, self._expected):
            return ""
        precise = np.isfinite(gap) and self._precisely_within(shrunk)
        return "" if precise else f"{type(shrunk).__name__} differs by {gap:.1e}"

    def _masked(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            runner = MaskedRun(self._flow, self._stays)
            return list_tensors(
                runner.run(*bind_placeholders(self._flow.capture, model, tuple(x.clone() for x in inputs)))
            )

    def _precisely_within(self, shrunk: nn.Module) -> bool:
        inputs = tuple(x.double() if x.is_floating_point() else x for x in self._inputs)
        try:
            expected = self._masked(copy.deepcopy(self._model).double(), inputs)
            found = list_tensors(run_quietly(copy.deepcopy(shrunk).double(), inputs))
        except (RuntimeError, TypeError):
            # Code that creates single-precision tensors cannot run in double.
            return False
        return largest_gap(found, expected) <= TOLERANCE[torch.float64]


def check_capture(model: nn.Module, captured: Capture) -> None:
    """Refuse a graph that does not compute what its module computes.

    Raises:
        Refused: outputs differ, for example because the module keeps state between calls.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        runner = fx.Interpreter(captured.program.graph_module, graph=captured.graph)
        graph = list_tensors(runner.run(*bind_placeholders(captured, model, probes(captured))))
    # Twice, because state that a call leaves behind shows in the next one.
    outputs = [list_tensors(run_quietly(model, probes(captured))) for _ in range(2)]
    if not all(within(graph, output, slack=10) for output in outputs):
        gap = max(largest_gap(graph, output) for output in outputs)
        raise Refused(
            "the captured graph must compute what the model computes",
            place="model",
            value=f"relative difference {gap:.1e}",
            fix="remove state that changes from call to call from forward",
        )


def probes(captured: Capture) -> tuple[Tensor, ...]:
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


def run_quietly(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """Return a module's output in evaluation mode, seeded, without gradients."""
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(*[x.clone() for x in inputs])


def list_tensors(output: Any) -> list[Tensor]:
    """Return every tensor that a model returned, in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def within(found: list[Tensor], expected: list[Tensor], slack: float = 1) -> bool:
    """Tell whether every tensor is as close as its type allows."""
    return len(found) == len(expected) and all(
        difference(a, b) <= slack * TOLERANCE.get(a.dtype, 0.0) for a, b in zip(found, expected, strict=True)
    )


def largest_gap(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest `difference` of tensors at equal places; infinite for other numbers of them."""
    if len(found) != len(expected):
        return float("inf")
    return max((difference(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)


def difference(found: Tensor, expected: Tensor) -> float:
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
