"""A student of the teacher's own architecture, made from a changed configuration."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from penjing.core.errors import Exit, Refused
from penjing.core.progress import Line, Say, silent
from penjing.core.value import Model

if TYPE_CHECKING:
    from torch import nn

DEPTH = "num_hidden_layers"


def shrink(
    teacher: Model,
    *,
    start: str = "teacher",
    seed: int = 0,
    say: Say = silent,
    **changes: Any,
) -> Model:
    """Return a model of the teacher's class, made from its configuration with some values changed.

    Where tensors of the new model have the shape of the teacher's, they start from them; of lists of layers
    that got shorter, every so many layers are taken (Sanh et al. 2019, "DistilBERT"). The rest is drawn.

    Args:
        teacher: a torch module with an attribute `config` that its class is made from, as all models of the
            transformers library have. It stays as it is.
        start: `teacher`, or `drawn`: all weights are.
        seed: of what is drawn.
        say: called with a line that tells what was taken over.
        **changes: values by name in the configuration, for example `num_hidden_layers=3`.

    Raises:
        Refused: no configuration, no changes, a name or value that it does not take.

    >>> from types import SimpleNamespace
    >>> from torch import nn
    >>> class Net(nn.Module):
    ...     def __init__(self, config):
    ...         super().__init__()
    ...         self.config = config
    ...         self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(config.num_hidden_layers))
    >>> teacher = Net(SimpleNamespace(num_hidden_layers=6))
    >>> student = shrink(teacher, num_hidden_layers=2, say=print)
    4 of 4 tensors start from the teacher's, layers 1, 4
    """
    import torch

    if not isinstance(teacher, torch.nn.Module) or not hasattr(teacher, "config"):
        raise Refused(
            "needs a torch module with a configuration that its class is made from",
            place="shrink.teacher",
            value=type(teacher).__name__,
            code=Exit.USAGE,
            fix="cut it with PruneChannels, or give a student of your own",
        )
    if start not in ("teacher", "drawn"):
        raise Refused(
            "must be 'teacher' or 'drawn'",
            value=repr(start),
            place="shrink.start",
            fix="leave it out to start from the teacher's weights",
            code=Exit.USAGE,
        )
    config = _change_config(teacher.config, changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            student = type(teacher)(config)
        except Exception as error:
            # The user's own class runs here and may raise anything.
            raise Refused(
                "the class must take the changed configuration",
                place="shrink",
                value=f"{type(error).__name__}: {str(error)[:200]}",
                code=Exit.USAGE,
                fix="change other values too: heads divide widths",
            ) from error
    like = next(teacher.parameters())
    student = student.to(like.device, like.dtype).train(teacher.training)
    if start == "teacher":
        say(Line.note(_take_over(student, teacher)))
    return student


def _change_config(config: Any, changes: Mapping[str, Any]) -> Any:
    if not changes:
        raise Refused(
            "needs at least one changed value",
            value="none",
            place="shrink",
            code=Exit.USAGE,
            fix=f"give values of the configuration, for example {DEPTH}=3",
        )
    made = copy.deepcopy(config)
    for name, value in changes.items():
        if not hasattr(made, name):
            known = [key for key in vars(made) if not key.startswith("_")]
            close = difflib.get_close_matches(name, known, 3, 0.4) or known[:3]
            raise Refused(
                "must be values of the configuration",
                value=name,
                place="shrink.changes",
                code=Exit.USAGE,
                fix=f"known are {', '.join(close)}",
            )
        before = getattr(made, name)
        if name == DEPTH and isinstance(value, int) and 0 < value < before:
            for key, each in vars(made).items():
                if isinstance(each, list) and len(each) == before:
                    setattr(made, key, [each[_source(index, value, before)] for index in range(value)])
        setattr(made, name, value)
    return made


def _source(index: int, count: int, before: int) -> int:
    """Return which of `before` layers one of `count` is taken from.

    >>> [_source(i, 2, 6) for i in range(2)]
    [1, 4]
    """
    return int((index + 0.5) * before / count)


def _take_over(student: nn.Module, teacher: nn.Module) -> str:
    import torch

    lists = {
        name: (len(module), len(other))
        for name, module in student.named_modules()
        if isinstance(module, torch.nn.ModuleList | torch.nn.Sequential)
        for other in [dict(teacher.named_modules()).get(name)]
        if other is not None and len(other) > len(module)
    }
    known, taken, layers = teacher.state_dict(), 0, set()
    tensors = student.state_dict()
    for name, tensor in tensors.items():
        source, numbers = _rename(name, lists)
        if source in known and known[source].shape == tensor.shape:
            tensor.copy_(known[source])
            taken += 1
            layers.update(numbers)
    words = f", layers {', '.join(map(str, sorted(layers)))}" if layers else ""
    return f"{taken} of {len(tensors)} tensors start from the teacher's{words}"


def _rename(name: str, lists: Mapping[str, tuple[int, int]]) -> tuple[str, list[int]]:
    """Return the name of a tensor in the teacher, and the numbers of the layers that it lies in there."""
    parts, numbers = name.split("."), []
    for place in range(1, len(parts)):
        found = lists.get(".".join(name.split(".")[:place]))
        if found and parts[place].isdecimal():
            numbers.append(_source(int(parts[place]), *found))
            parts[place] = str(numbers[-1])
    return ".".join(parts), numbers
