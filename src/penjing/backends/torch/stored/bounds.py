"""How much memory a stored graph takes, found without taking it, and how many digits its integers have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from penjing.core.errors import Refused
from penjing.core.memory_limit import LARGEST_PEAK, TRUST

WORD = 64
WIDEST = 4096
"""Bits of an integer that a graph may compute: more than any size needs, and no work."""


def check_integers(nodes: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a graph whose nodes compute integers of very many digits, as towers of powers do.

    Args:
        nodes: of a stored graph, each with `op` and `args`; those that it takes come before it.

    Raises:
        Refused: an integer can have more than `WIDEST` bits, or has an exponent that is computed.

    >>> check_integers([{"op": "operator.mul", "args": [2, 3]}])
    """
    widths: list[int] = []
    for entry in nodes:
        given = [_width(argument, widths) for argument in entry["args"]]
        rule = _WIDTHS.get(str(entry["op"]))
        widths.append(WORD if rule is None or len(given) < 2 else rule(given, entry["args"]))
        if widths[-1] > WIDEST:
            raise Refused(
                f"integers of a stored graph must have at most {WIDEST} bits",
                value=f"{entry['op']} of wider ones",
                place="graph.json",
                fix=TRUST,
            )


def _width(argument: Any, widths: Sequence[int]) -> int:
    """Return the most bits that an argument can have: an integer, or what another node computes."""
    if type(argument) is int:
        return argument.bit_length()
    node = argument.get("node") if isinstance(argument, dict) else None
    return widths[node] if type(node) is int and 0 <= node < len(widths) else WORD


def _power(given: Sequence[int], arguments: Sequence[Any]) -> int:
    exponent = arguments[1]
    return given[0] * max(1, abs(exponent)) if type(exponent) is int else WIDEST + 1


_WIDTHS: dict[str, Callable[[Sequence[int], Sequence[Any]], int]] = {
    "operator.mul": lambda given, arguments: given[0] + given[1],
    "operator.add": lambda given, arguments: max(given) + 1,
    "operator.sub": lambda given, arguments: max(given) + 1,
    "operator.pow": _power,
    "torch.sym_max": lambda given, arguments: max(given),
    "torch.sym_min": lambda given, arguments: max(given),
}
"""How wide the results of operators on integers are; those of others have a word's width."""


class _Sizes(TorchDispatchMode):  # type: ignore[misc]
    """Looks at the size of everything that operators make."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.numel() * leaf.element_size() > LARGEST_PEAK:
                raise Refused(
                    f"must take at most {LARGEST_PEAK} bytes for one tensor",
                    value=f"{leaf.numel() * leaf.element_size()} bytes, in {function}",
                    place="graph.json",
                    fix=TRUST,
                )
        return made


def check_sizes(net: nn.Module, inputs: Sequence[tuple[Sequence[int], torch.dtype]]) -> str:
    """Run a stored graph on tensors that have shapes and no memory.

    Args:
        net: as it was read; it is not changed.
        inputs: shape and type of each input, for a few examples.

    Returns:
        why its sizes have no bound, as a clause; empty where they have one.

    Raises:
        Refused: a tensor would take more than `LARGEST_PEAK` bytes.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with fake, torch.inference_mode(), _Sizes():
            net(*(torch.empty(*shape, dtype=dtype) for shape, dtype in inputs))
    except Refused:
        raise
    except Exception as error:  # noqa: BLE001  torch raises of many kinds; the graph may be anybody's
        return f"its shapes cannot be inferred ({type(error).__name__})"
    return ""
