"""What zeros buy, said plainly."""

from __future__ import annotations

from penjing.core.measurement import Measurement
from penjing.report.record import Record
from penjing.report.words import amount, clean, percent


def describe_zeros(record: Record) -> str:
    """Say what the masks of the delivered model save and what not; empty where no step made masks.

    A step that masks reports the sparsity of each layer in its changes.
    """
    result = record.result
    masked = any(change.done and "sparsity" in change.detail for change in record.changes)
    if result.operations is None or not masked or not result.operations.zeros:
        return ""
    share = percent(round(result.operations.zeros / result.operations.parameters, 3))
    return " ".join(
        [
            f"{share} of the parameters are zero.",
            _bytes(result, record.baselines.target),
            f"In {clean(result.target, 60)} zeros take as much time as other numbers: they save none.",
        ]
    )


def _bytes(result: Measurement, base: Measurement) -> str:
    if result.compressed_bytes is None:
        return "They save bytes where the files are compressed."
    before = (
        ""
        if base.compressed_bytes is None
        else (f", those of the float model {amount(base.compressed_bytes, 'bytes')}")
    )
    return (
        f"They save bytes where the files are compressed: as zip they have "
        f"{amount(result.compressed_bytes, 'bytes')}{before}."
    )
