"""Optional packages: whether they are there, and how to get them."""

from __future__ import annotations

import importlib.util

from penjing.core.errors import Exit, Refused

EXTRAS: dict[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "metrics": ("sklearn",),
}
"""The extras of the package, and the modules that each brings."""


def missing(extra: str) -> tuple[str, ...]:
    """Return the modules of an extra that are not installed; nothing is imported."""
    return tuple(name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None)


def need(extra: str, what: str) -> None:
    """Refuse, with the line to type, if an extra is not installed.

    Args:
        extra: a key of `EXTRAS`.
        what: what needs it, for the message.
    """
    absent = missing(extra)
    if absent:
        raise Refused(
            f"{what} has the packages it needs", value=f"no module {', '.join(absent)}", place="environment",
            fix=f'pip install "penjing[{extra}]"', code=Exit.ENVIRONMENT,
        )  # fmt: skip
