"""Optimizers by name: the framework's own, with one default rate each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

Name = Literal[
    "sgd", "adam", "adamw", "nadam", "radam", "adamax", "rmsprop", "adagrad", "adadelta", "adafactor"
]  # fmt: skip
NAMES: tuple[Name, ...] = get_args(Name)


@dataclass(frozen=True)
class Kind:
    """One optimizer.

    Attributes:
        cls: its class in `torch.optim`.
        lr: highest rate where none is given.
        fixed: settings that are not the class's defaults.
    """

    cls: str
    lr: float
    fixed: tuple[tuple[str, Any], ...] = ()


KINDS: dict[Name, Kind] = {
    "sgd": Kind("SGD", 0.05, (("momentum", 0.9), ("nesterov", True))),
    "adam": Kind("Adam", 1e-3),
    "adamw": Kind("AdamW", 1e-3),
    "nadam": Kind("NAdam", 1e-3, (("decoupled_weight_decay", True),)),
    "radam": Kind("RAdam", 5e-3, (("decoupled_weight_decay", True),)),
    "adamax": Kind("Adamax", 2e-3),
    "rmsprop": Kind("RMSprop", 1e-3, (("momentum", 0.9),)),
    "adagrad": Kind("Adagrad", 1e-2),
    "adadelta": Kind("Adadelta", 1.0),
    "adafactor": Kind("Adafactor", 1e-2),
}
"""By name. Sutskever et al. 2013 (sgd: Nesterov momentum), Kingma and Ba 2015 (adam, adamax), Loshchilov and
Hutter 2019 (adamw), Dozat 2016 (nadam), Liu et al. 2020 (radam), Tieleman and Hinton 2012 (rmsprop), Duchi et
al. 2011 (adagrad), Zeiler 2012 (adadelta), Shazeer and Stern 2018 (adafactor)."""


def optimizer_of(name: Name, groups: list[dict[str, Any]], rate: float) -> Any:
    """Return the optimizer of this name on parameter groups.

    Args:
        groups: as `torch.optim` takes them; each may have a weight decay of its own. It is taken off the
            weights apart from the gradient's step in `adamw`, `nadam`, `radam` and `adafactor`, and is
            added to the gradient in the others.
        rate: highest learning rate.
    """
    import torch

    kind = KINDS[name]
    make: Callable[..., Any] = getattr(torch.optim, kind.cls)
    return make(groups, lr=rate, **dict(kind.fixed))
