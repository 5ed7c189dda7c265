"""Examine the environment: versions, extras, known conflicts."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from packaging.version import Version

from penjing.core.cache import describe_cache
from penjing.core.errors import Exit
from penjing.core.extras import EXTRAS, bring, missing
from penjing.run.folder import describe_environment

FLOORS = {"torch": "2.10", "onnx": "1.21", "onnxruntime": "1.22", "openvino": "2026.4"}
"""Oldest versions without a known hole in loading files, or that Penjing was tested with."""


def examine() -> dict[str, Any]:
    """Return environment, extras with the reason where one is unusable, cache, problems and an exit code.

    Each extra is really imported: an installed package that cannot be imported is not usable.
    """
    extras = {name: _extra(name) for name in EXTRAS}
    problems = [*_old(), *(f"{name}: {e['reason']}" for name, e in extras.items() if e["broken"])]
    usable = extras["torch"]["usable"] or extras["onnx"]["usable"]
    code = Exit.ENVIRONMENT if problems or not usable else Exit.DONE
    return {
        "environment": describe_environment(),
        "extras": extras,
        "cache": describe_cache(),
        "problems": problems,
        "code": int(code),
    }


def _extra(name: str) -> dict[str, Any]:
    absent = missing(name)
    if absent:
        return {"usable": False, "broken": False, "reason": f'not installed: pip install "penjing[{name}]"'}
    for module in EXTRAS[name]:
        try:
            bring(module)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            reason = f"{module} is installed but cannot be imported: {type(error).__name__}: {error}"
            return {"usable": False, "broken": True, "reason": reason}
    return {"usable": True, "broken": False, "reason": ""}


def _old() -> list[str]:
    found = []
    for package, floor in FLOORS.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if Version(version) < Version(floor):
            found.append(f'{package} {version} is older than {floor}: pip install "{package}>={floor}"')
    return found
