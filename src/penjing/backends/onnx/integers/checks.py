"""What quantization checks before and after its work."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.quantization import relative_error
from penjing.backends.onnx.graph.index import find_integer_operator
from penjing.backends.onnx.integers.calibrate import iterate_calibration, limit_batch
from penjing.backends.onnx.model import OnnxModel
from penjing.core.context import Context
from penjing.core.errors import Refused
from penjing.core.method import Change

CHECKED_EXAMPLES = 64


def refuse_quantized(model: OnnxModel) -> None:
    """Refuse a model that has integer operators already.

    Raises:
        Refused: with the first such operator.
    """
    found = find_integer_operator(model.proto)
    if found is not None:
        raise Refused(
            "must be in float",
            value=f"an integer operator, {found}",
            place="model",
            fix="leave this step out, or start from the float model",
        )


def compare_outputs(
    method: str, before: OnnxModel, after: OnnxModel, context: Context, examples: int = CHECKED_EXAMPLES
) -> Change:
    """Compare the first output of both models on training examples; the change is for layer `*`.

    Its detail holds the cosine and the relative L2 error over all outputs together.

    Raises:
        Refused: the new outputs are not finite, or constant where the old ones vary.
    """
    old, new = [], []
    size = limit_batch(before.proto, 32)
    for inputs in iterate_calibration(context.task.train, examples, size, context.seed):
        old.append(_rows(before.run(inputs)[0]))
        new.append(_rows(after.run(inputs)[0]))
    x, y = np.concatenate(old), np.concatenate(new)
    finite = bool(np.isfinite(y).all())
    if not finite or np.ptp(y, axis=0).max(initial=0) == 0 < np.ptp(x, axis=0).max(initial=0):
        value = "the same for every example" if finite else "NaN or infinite"
        raise Refused(
            "the outputs of the quantized model must be finite and vary",
            value=value,
            place=method,
            fix="calibrate on more and real examples, or leave layers float with skip=",
        )
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    cosine = float(x.ravel() @ y.ravel()) / norm if norm else 1.0
    error = min(relative_error(y.astype(np.float32), x.astype(np.float32)), 1e9)
    return Change(
        method=method,
        layer="*",
        status="done",
        detail={"cosine": cosine, "relative_error": error, "examples": examples},
    )


def _rows(output: NDArray[Any]) -> NDArray[np.float64]:
    """Return one row for every example."""
    return np.asarray(output, np.float64).reshape(len(output) if output.ndim else 1, -1)


def keep_first_changes(changes: list[Change]) -> list[Change]:
    """Keep the first change of every layer: a layer that is used twice is reported once."""
    return list({change.layer: change for change in reversed(changes)}.values())[::-1]
