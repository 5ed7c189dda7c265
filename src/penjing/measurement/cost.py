"""What a cut model costs, as a share of what the uncut one costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from penjing.core.context import Context
from penjing.core.measurement import Operations
from penjing.core.scratch import scratch
from penjing.core.target import Target
from penjing.core.value import Model
from penjing.measurement.side_by_side import beside

Cost = Literal["parameters", "multiply_adds", "size", "latency"]
"""What a share can be taken of: counts of the whole model, bytes of its ONNX file, or milliseconds."""


@dataclass(frozen=True)
class Meter:
    """What tells the share of a cost that another model has.

    Attributes:
        dense: counts of the uncut model.
        share: of another model, and how it was found, in words.
        file_bytes: of the uncut model's ONNX file; 0 where the cost is another one.
    """

    dense: Operations
    share: Callable[[Model], tuple[float, str]]
    file_bytes: int = 0


@contextmanager
def open_meter(model: Model, of: Cost, target: Target, context: Context) -> Iterator[Meter]:
    """Give what measures a cost of other models as a share of one model's.

    Args:
        model: uncut.
        of: the cost.
        target: where latency is measured, interleaved with the uncut model's.
        context: of the plan.
    """
    backend, example = context.backend, context.task.valid.example()
    dense = backend.operations(model, example)
    if of == "latency":
        with beside(model, target, context.task.valid) as ratio_of:

            def latency(candidate: Model) -> tuple[float, str]:
                ratio = ratio_of(candidate)
                return ratio.value, (
                    f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f}) of the latency before, "
                    f"{target.label}, {ratio.n} interleaved rounds"
                )

            yield Meter(dense, latency)
    elif of == "size":
        whole = _file_bytes(model, context)

        def size(candidate: Model) -> tuple[float, str]:
            found = _file_bytes(candidate, context)
            return found / whole, f"{found} of {whole} bytes of ONNX"

        yield Meter(dense, size, whole)
    else:

        def counted(candidate: Model) -> tuple[float, str]:
            after, before = (getattr(x, of) for x in (backend.operations(candidate, example), dense))
            return after / max(before, 1), f"{after} of {before} {of.replace('_', '-')}"

        yield Meter(dense, counted)


def _file_bytes(model: Model, context: Context) -> int:
    with scratch() as folder:
        file = folder / "model.onnx"
        context.backend.export(model, context.task.valid.example(), file)
        return file.stat().st_size
