"""Blocks of a module that a pass-through can stand in for: found on a real run, and taken out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from penjing.backends.torch.check import copy_module
from penjing.backends.torch.hooks import Call, watched
from penjing.backends.torch.structure.history import record_step
from penjing.backends.torch.structure.pass_through import (
    PassThrough,
    Source,
    bypassing,
    main_input,
    main_output,
    set_submodule,
)
from penjing.backends.torch.tensors import evaluating, to_inputs
from penjing.core.backend import Arrays
from penjing.core.errors import Refused


@dataclass(frozen=True)
class Blocks:
    """What can go and what cannot.

    Attributes:
        found: pass-throughs by the names of the blocks, in the order in which the blocks run.
        kept: for the other members of the places where blocks are found, and for repeated modules that
            are no blocks where none is found: why they stay.
    """

    found: Mapping[str, PassThrough]
    kept: Mapping[str, str]


def find_blocks(model: nn.Module, example: Arrays) -> Blocks:
    """Find the blocks that can be taken out one at a time, by running the module on an example.

    A block is a member of an `nn.Sequential` or `nn.ModuleList`, or one of several children of one class. It
    runs once; its first input and its first output have one shape; its other outputs are None or arguments
    that it was given; and its output depends on its input even where all its weights are zero: it has a
    path around them. Where blocks lie within one another, the inner ones count if they hold at least half of
    the outer one's weights. The module must run without each of them and return the same shapes.

    >>> import numpy as np
    >>> net = nn.Sequential(*[nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2)])
    >>> list(find_blocks(net, (np.random.default_rng(0).normal(size=(1, 5, 8)),)).found)
    ['0', '1']
    """
    members, inputs = _members(model), to_inputs(model, example)
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        calls: dict[str, list[Call]] = {}
        with watched(members, lambda name, call: calls.setdefault(name, []).append(call)):
            output = model(*inputs)
        why = dict.fromkeys(members, "the model does not call it as a module")
        found: dict[str, PassThrough] = {}
        for name, runs in calls.items():
            try:
                found[name] = _stand_in(members[name], runs)
            except _NoBlock as reason:
                why[name] = str(reason)
        found = _without_nested(found, members)
        for name, stand_in in list(found.items()):
            why[name] = _fails_without(model, {name: stand_in}, inputs, _shapes(output))
            if why[name]:
                del found[name]
    return Blocks(found, _kept(found, why, members))


def remove_blocks(model: nn.Module, blocks: Blocks, names: list[str], example: Arrays) -> nn.Module:
    """Return a copy without these blocks, whose history says so; all other modules keep their names.

    Raises:
        Refused: a name that is no block of the model, or a model that does not run without them all.
    """
    unknown = [name for name in names if name not in blocks.found]
    if unknown:
        reasons = [f"{name}: {blocks.kept.get(name, 'no block of this name')}" for name in unknown[:5]]
        raise Refused(
            "needs blocks that can go",
            value="; ".join(reasons),
            place="blocks",
            fix="choose among the blocks that `pj.RemoveBlocks` reports, or leave the names out",
        )
    result = copy_module(model)
    gone = {name: blocks.found[name] for name in names}
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        inputs = to_inputs(model, example)
        failure = _fails_without(result, gone, inputs, _shapes(model(*inputs)))
    if failure:
        raise Refused(
            "the model must run without the blocks",
            value=failure,
            place=", ".join(names),
            fix="take fewer of them out",
        )
    for name, stand_in in gone.items():
        set_submodule(result, name, stand_in)
    record_step(result, model, {"skip": [name for name in blocks.found if name in gone]})
    return result


class _NoBlock(Exception):
    """Why a module is no block; never leaves this file."""


def _members(model: nn.Module) -> dict[str, nn.Module]:
    """Return modules that stand in a row: members of lists, and children that share their class."""
    found = {}
    for name, parent in model.named_modules():
        classes = [type(child) for child in parent.children()]
        for key, child in parent.named_children():
            in_a_list = isinstance(parent, nn.Sequential | nn.ModuleList)
            if (in_a_list or classes.count(type(child)) > 1) and not isinstance(child, PassThrough):
                found[f"{name}.{key}".lstrip(".")] = child
    return found


def _stand_in(module: nn.Module, runs: list[Call]) -> PassThrough:
    """Return what can take a block's place.

    Raises:
        _NoBlock: the module is no block, with the reason.
    """
    if len(runs) > 1:
        raise _NoBlock(f"it runs {len(runs)} times in a pass")
    call = runs[0]
    if not _matrices(module):
        raise _NoBlock("it has no weights")
    entering, leaving = main_input(call), main_output(call.output)
    if entering is None or not isinstance(leaving, torch.Tensor):
        raise _NoBlock(f"it takes no numbers or returns {type(call.output).__name__}")
    key, x = entering
    if (x.shape, x.dtype) != (leaving.shape, leaving.dtype):
        before, after = (list(t.shape[1:]) for t in (x, leaving))
        raise _NoBlock(f"it makes {after} of {before} for each example")
    single = isinstance(call.output, torch.Tensor)
    sources = (key,) if single else (key, *(_source(value, call) for value in call.output[1:]))
    if not _passes_around_weights(module, call, key):
        raise _NoBlock("it has no path around its weights")
    return PassThrough(sources, single, _plain_attributes(module))


def _source(value: Any, call: Call) -> Source:
    if value is None:
        return None
    for key, given in call.given.items():
        if given is value:
            return key
    raise _NoBlock(f"it also returns {type(value).__name__} that it did not get")


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if name != "training" and not name.startswith("_") and isinstance(value, int | float | str | None)
    }


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.ndim > 1]


def _passes_around_weights(module: nn.Module, call: Call, key: int | str) -> bool:
    """Tell whether a block with all weights at zero still gives different outputs for different inputs."""
    module = copy.deepcopy(module)
    for weight in _matrices(module):
        weight.zero_()
    x, outputs = call.arguments[key], []
    for value in (x.clone(), x + torch.randn_like(x) * x.std(correction=0).clamp(min=0.1)):
        given = call.arguments | {key: value}
        args = [given[i] for i in range(len(given)) if i in given]
        outputs.append(main_output(module(*args, **{k: v for k, v in given.items() if isinstance(k, str)})))
    return not torch.allclose(outputs[0], outputs[1], rtol=1e-4, atol=1e-6)


def _without_nested(
    found: dict[str, PassThrough], members: Mapping[str, nn.Module]
) -> dict[str, PassThrough]:
    def weights(name: str) -> int:
        return sum(p.numel() for p in members[name].parameters())

    left = dict(found)
    for outer in sorted(found, key=lambda name: -name.count(".")):
        inner = [name for name in left if name.startswith(f"{outer}.")]
        if inner:
            finer = 2 * sum(map(weights, inner)) >= weights(outer)
            for name in [outer] if finer else inner:
                del left[name]
    return left


def _fails_without(
    model: nn.Module,
    gone: Mapping[str, PassThrough],
    inputs: tuple[Tensor, ...],
    wanted: list[tuple[int, ...]],
) -> str:
    with bypassing(model, gone), evaluating(model), torch.no_grad():
        try:
            shapes = _shapes(model(*[x.clone() for x in inputs]))
        except Exception as error:  # noqa: BLE001 - the user's own code may read anything of the missing block
            line = (str(error).strip().splitlines() or [""])[0][:150]
            return f"the model fails without it: {type(error).__name__}: {line}"
    return "" if shapes == wanted else "without it the model returns other shapes"


def _shapes(output: Any) -> list[tuple[int, ...]]:
    if isinstance(output, torch.Tensor):
        return [tuple(output.shape)]
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return [s for o in output for s in _shapes(o)] if isinstance(output, tuple | list) else []


def _kept(
    found: Mapping[str, PassThrough], why: Mapping[str, str], members: Mapping[str, nn.Module]
) -> dict[str, str]:
    """Say why the neighbours of blocks stay; where there are no blocks, why all that could be one is none."""
    places = {name.rpartition(".")[0] for name in found}
    return {
        name: why[name]
        for name, module in members.items()
        if why[name]
        and name not in found
        and _matrices(module)
        and any(True for _ in module.children())
        and not any(other.startswith(f"{name}.") for other in found)
        and (not found or name.rpartition(".")[0] in places)
    }
