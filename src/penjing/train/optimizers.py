"""Optimizers by name, from the framework and from one well-kept package, with one default rate each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from penjing.core.extras import need

if TYPE_CHECKING:
    from torch.optim import Optimizer

OptimizerName = Literal[
    "sgd",
    "adam",
    "adamw",
    "nadam",
    "radam",
    "adamax",
    "rmsprop",
    "adagrad",
    "adadelta",
    "adafactor",
    "lion",
    "muon",
    "soap",
    "prodigy",
    "schedule_free",
]
NAMES: tuple[OptimizerName, ...] = get_args(OptimizerName)


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer.

    Attributes:
        cls: its class in `package`.
        lr: highest rate where none is given.
        fixed: settings that are not the class's defaults.
        package: where it lives; other than `torch.optim` the extra `optimizers` brings it.
        schedule: of the rate where none is given.
        matrices: whether it steps on hidden matrices only, with Adam for the rest.
        modes: whether the weights to evaluate are others than those it steps from (`train`, `eval`).
        one_rate: whether its step ignores that parameter groups have rates of their own.
    """

    cls: str
    lr: float
    fixed: tuple[tuple[str, Any], ...] = ()
    package: Literal["torch.optim", "pytorch_optimizer"] = "torch.optim"
    schedule: Literal["linear", "constant"] = "linear"
    matrices: bool = False
    modes: bool = False
    one_rate: bool = False

    @property
    def extra(self) -> str | None:
        """Return the extra that brings it."""
        return None if self.package == "torch.optim" else "optimizers"


OPTIMIZERS: dict[OptimizerName, OptimizerSpec] = {
    "sgd": OptimizerSpec("SGD", 0.05, (("momentum", 0.9), ("nesterov", True))),
    "adam": OptimizerSpec("Adam", 1e-3),
    "adamw": OptimizerSpec("AdamW", 1e-3),
    "nadam": OptimizerSpec("NAdam", 1e-3, (("decoupled_weight_decay", True),)),
    "radam": OptimizerSpec("RAdam", 5e-3, (("decoupled_weight_decay", True),)),
    "adamax": OptimizerSpec("Adamax", 2e-3),
    "rmsprop": OptimizerSpec("RMSprop", 1e-3, (("momentum", 0.9),)),
    "adagrad": OptimizerSpec("Adagrad", 1e-2),
    "adadelta": OptimizerSpec("Adadelta", 1.0),
    "adafactor": OptimizerSpec("Adafactor", 1e-2),
    "lion": OptimizerSpec("Lion", 3e-4, package="pytorch_optimizer"),
    "muon": OptimizerSpec("Muon", 0.02, package="pytorch_optimizer", matrices=True),
    "soap": OptimizerSpec("SOAP", 3e-3, package="pytorch_optimizer"),
    "prodigy": OptimizerSpec(
        "Prodigy", 1.0, (("safeguard_warmup", True),), package="pytorch_optimizer", one_rate=True
    ),
    "schedule_free": OptimizerSpec(
        "ScheduleFreeAdamW", 2.5e-3, package="pytorch_optimizer", schedule="constant", modes=True
    ),
}
"""By name. Sutskever et al. 2013 (sgd: Nesterov momentum), Kingma and Ba 2015 (adam, adamax), Loshchilov and
Hutter 2019 (adamw), Dozat 2016 (nadam), Liu et al. 2020 (radam), Tieleman and Hinton 2012 (rmsprop), Duchi et
al. 2011 (adagrad), Zeiler 2012 (adadelta), Shazeer and Stern 2018 (adafactor), Chen et al. 2023 (lion),
Jordan et al. 2024 (muon), Vyas et al. 2024 (soap), Mishchenko and Defazio 2023 (prodigy: finds its own rate,
`lr` is a factor on it), Defazio et al. 2024 (schedule_free)."""

ADAM_SHARE = 0.15
"""Rate of Adam beside an optimizer of matrices, as a share of that one's: 0.003 beside 0.02."""


def build_optimizer(name: OptimizerName, groups: list[dict[str, Any]], lr: float) -> Optimizer:
    """Return the optimizer of this name on parameter groups.

    Args:
        groups: as `torch.optim` takes them; each may have a weight decay of its own. It is added to the
            gradient in `sgd`, `adam`, `adamax`, `rmsprop`, `adagrad` and `adadelta`, and is taken off the
            weights apart from the gradient's step in the others.
        lr: highest learning rate; a group's `share` of it is what the group trains at.

    Raises:
        Refused: the package of the optimizer is not installed.

    >>> import torch
    >>> type(build_optimizer("adamw", [{"params": [torch.zeros(1)]}], lr=0.001)).__name__
    'AdamW'
    """
    kind = OPTIMIZERS[name]
    if kind.extra is not None:
        need(kind.extra, f"the optimizer {name}")
    make: Callable[..., Optimizer] = getattr(importlib.import_module(kind.package), kind.cls)
    return make(
        [{"share": 1.0, **group, "lr": lr * group.get("share", 1.0)} for group in groups],
        lr=lr,
        **dict(kind.fixed),
    )
