"""Send a function that makes the user's model to a process of our own."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from penjing.core.errors import Refused
from penjing.core.value import Model

Factory = Callable[[], Model]
"""Makes a model of the user's own class; called without arguments."""


def factory_of(model: Model) -> Factory:
    """Return a factory that hands over a model at hand."""
    return partial(_itself, model)


def _itself(model: Model) -> Model:
    return model


def seal(factory: Factory) -> bytes:
    """Serialize a factory for our own process; code that the process could not import travels by value.

    The bytes go through a pipe and never into a file.

    Raises:
        Refused: something that the factory holds cannot be serialized.
    """
    import cloudpickle

    with contextlib.ExitStack() as stack:
        for module in _unimportable():
            cloudpickle.register_pickle_by_value(module)
            stack.callback(cloudpickle.unregister_pickle_by_value, module)
        try:
            data: bytes = cloudpickle.dumps(factory)
        except (TypeError, AttributeError, ValueError, RuntimeError, ImportError) as error:
            raise Refused(
                "the function that makes the model can go to another process",
                value=str(error).splitlines()[:1],
                place="model()",
                fix="make the model inside the function, from plain values",
            ) from error
    return data


def _unimportable() -> Iterator[Any]:
    """Yield modules that an interpreter with this `sys.path` would not find, or not where they came from."""
    same: dict[str, bool] = {}
    for name, module in list(sys.modules.items()):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top == "__main__" or getattr(module, "__file__", None) is None:
            continue
        if top not in same:
            same[top] = _findable(top)
        if not same[top]:
            yield module


def _findable(top: str) -> bool:
    here = getattr(sys.modules.get(top), "__file__", None)
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        spec = find(top, None) if find is not None else None
        if spec is not None:
            return (
                here is None or spec.origin is None or os.path.realpath(spec.origin) == os.path.realpath(here)
            )
    return False
