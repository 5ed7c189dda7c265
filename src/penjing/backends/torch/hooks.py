"""Functions called before and after modules run, for as long as a context lasts.

The only place that registers hooks: they are removed when the context ends, whatever is raised in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

Before = Callable[[str, tuple[Any, ...], dict[str, Any]], Any]
"""Called with a module's name, its positional and its keyword arguments. None leaves them as they are; a pair
`(args, kwargs)` takes their place."""

After = Callable[[str, tuple[Any, ...], Any], Any]
"""Called with a module's name, its positional arguments and its output. None leaves the output as it is;
anything else takes its place."""


class EndOfPass(BaseException):
    """Raised in a hook to end a forward pass early; no `Exception`, so that a forward cannot swallow it."""


@dataclass(frozen=True)
class Call:
    """One run of a module.

    Attributes:
        args, kwargs: tensors among them copied before it ran, since it may work in place.
        given: the very objects that it got, by position or keyword.
        output: what it returned.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: dict[int | str, Any]
    output: Any

    @property
    def arguments(self) -> dict[int | str, Any]:
        """Return `args` and `kwargs` by position or keyword."""
        return _by_key(self.args, self.kwargs)


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module],
    before: Before | None = None,
    after: After | None = None,
    *,
    first: bool = False,
) -> Iterator[None]:
    """Call functions around every run of some modules while the context lasts.

    Args:
        modules: by the name that the functions are told.
        before: what is called ahead of a run.
        after: what is called behind it.
        first: whether `before` sees the arguments as the caller gave them, ahead of the module's own hooks.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with hooked({"0": net[0]}, after=lambda name, args, output: 0 * output):
    ...     bool(net(torch.ones(1, 2)).any())
    False
    """
    with ExitStack() as stack:
        for name, module in modules.items():
            if before is not None:
                hook = partial(_call_before, before, name)
                handle = module.register_forward_pre_hook(hook, prepend=first, with_kwargs=True)
                stack.callback(handle.remove)
            if after is not None:
                stack.callback(module.register_forward_hook(partial(_call_after, after, name)).remove)
        yield


def _call_before(
    before: Before, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return before(name, args, kwargs)


def _call_after(after: After, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return after(name, args, output)


@contextmanager
def watched(modules: Mapping[str, nn.Module], watch: Callable[[str, Call], None]) -> Iterator[None]:
    """Tell of every run of some modules as it ends.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
    >>> with watched({"relu": net[1]}, lambda name, call: print(name, tuple(call.args[0].shape))):
    ...     out = net(torch.ones(1, 2))
    relu (1, 3)
    """
    entered: dict[str, list[tuple[tuple[Any, ...], dict[str, Any], dict[int | str, Any]]]] = {}

    def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        copies = tuple(map(_copy, args)), {key: _copy(value) for key, value in kwargs.items()}
        entered.setdefault(name, []).append((*copies, _by_key(args, kwargs)))

    def leave(name: str, args: tuple[Any, ...], output: Any) -> None:
        watch(name, Call(*entered[name].pop(), output))

    with hooked(modules, enter, leave):
        yield


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _by_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int | str, Any]:
    found: dict[int | str, Any] = dict(enumerate(args))
    found.update(kwargs.items())
    return found
