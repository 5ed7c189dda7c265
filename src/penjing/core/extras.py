"""Optional packages: whether they are there, and how to get them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from penjing.core.errors import Exit, Refused

EXTRAS: dict[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "openvino": ("openvino",),
    "metrics": ("sklearn",),
    "language": ("torch", "transformers"),
    "optimizers": ("torch", "pytorch_optimizer"),
    "tune": ("torch", "optuna"),
    "distributed": ("torch", "accelerate"),
}
"""The extras of the package, and the modules that each brings."""

_REPORTERS = {"openvino": "openvino_telemetry"}
"""Modules that report to a package's makers that it is imported; the package works without them."""


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
            f"{what} needs packages that are missing",
            value=f"no module {', '.join(absent)}",
            place="environment",
            fix=f'run `pip install "penjing[{extra}]"`',
            code=Exit.ENVIRONMENT,
        )


def bring(module: str) -> ModuleType:
    """Import a module of an extra, and keep it from reporting to its makers that it is used.

    Raises:
        ImportError: as the import raises.
    """
    with _absent(_REPORTERS.get(module)):
        return importlib.import_module(module)


@contextmanager
def _absent(name: str | None) -> Iterator[None]:
    """Let imports of a module fail for a while, unless the program has imported it already."""
    if name is None or name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
