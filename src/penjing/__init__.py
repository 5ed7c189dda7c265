"""Penjing makes trained neural networks smaller and faster while their quality holds, and proves it.

Importing this package imports no framework; each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from penjing.core.names import NAMES

__version__ = "0.1.0"

__all__ = [*NAMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module 'penjing' has no attribute {name!r}")
    value = getattr(importlib.import_module(NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
