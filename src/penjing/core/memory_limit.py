"""How much memory and work a call of a model from anywhere may take, and whether this process is limited."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from penjing.core.errors import Refused

LARGEST_PEAK = 2**32
"""Bytes that tensors may take at once, for a few examples; weights do not count."""
LARGEST_UNFOLDED = 2**30
"""Bytes that constants may unfold to while a model is loaded, or `UNFOLDED_SHARE` times its weights."""
UNFOLDED_SHARE = 16
MOST_STEPS = 2**22
"""Nodes that are run in one call, those inside loops each time."""
EXAMPLES = ((4, 256), (2, 64), (1, 32), (1, 8), (1, 1), (2, 512))
"""Lengths that are tried for dimensions that a model leaves open: of the first axis, and of others."""

TRUST = "if you know who made the file, load it with trusted=True; else set a limit first with `ulimit -v`"

_TRUSTED: ContextVar[bool] = ContextVar("trusted", default=False)


@contextmanager
def trusting(trusted: bool) -> Iterator[None]:
    """Leave memory and work of models unjudged while a file of somebody known is loaded.

    >>> with trusting(True):
    ...     is_trusted()
    True
    >>> is_trusted()
    False
    """
    before = _TRUSTED.set(trusted)
    try:
        yield
    finally:
        _TRUSTED.reset(before)


def is_trusted() -> bool:
    """Tell whether the file that is being loaded is trusted by the user."""
    return _TRUSTED.get()


def has_memory_limit() -> bool:
    """Tell whether this process can take a limited amount of memory only.

    >>> isinstance(has_memory_limit(), bool)
    True
    """
    if os.name == "nt":
        return False
    import resource

    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    return any(limit != resource.RLIM_INFINITY for limit in limits)


def require_bounds(unbounded: str, place: str) -> None:
    """Refuse a model whose memory has no bound, unless this process has a limit.

    Args:
        unbounded: why there is no bound, as a clause; empty where there is one.
        place: the file, for the message.

    Raises:
        Refused: there is no bound and no limit, and the file is not trusted.
    """
    if unbounded and not is_trusted() and not has_memory_limit():
        raise Refused(
            "needs a process with a limit on its memory",
            value=f"a model without a bound: {unbounded}",
            place=place,
            fix=TRUST,
        )
