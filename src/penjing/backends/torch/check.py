"""What is refused of a module before any work, independent copies, and fingerprints."""

from __future__ import annotations

import copy
import hashlib
import inspect
import re
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from penjing.backends.torch.masks import masks_of
from penjing.backends.torch.tensors import evaluating, select_output, tensors_of, to_inputs
from penjing.core.backend import Arrays
from penjing.core.errors import Refused


def copy_module(model: nn.Module) -> nn.Module:
    """Return an independent copy; ties within the model stay.

    Raises:
        Refused: the module holds something that cannot be copied (a lock, a tensor inside a graph).

    >>> net = nn.Linear(2, 3)
    >>> copy_module(net).weight is net.weight
    False
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:
        # Anything that hangs on the user's module takes part in the copy and may raise anything.
        line = str(error).strip().splitlines()[0][:200]
        raise Refused(
            "the model must be one that copy.deepcopy can copy",
            value=f"{type(error).__name__}: {line}",
            place=_culprit(model),
            fix="remove locks and hooks, and detach() what it caches",
        ) from error


def _culprit(model: nn.Module) -> str:
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute.startswith("_") and attribute not in ("_parameters", "_buffers"):
                continue
            try:
                copy.deepcopy(value) if attribute != "_modules" else None
            except Exception:  # noqa: BLE001 - the search is for the attribute whose copy raises, whatever it raises
                return f"{name}.{attribute}".lstrip(".")
    return type(model).__qualname__


def check(model: nn.Module, example: Arrays) -> None:
    """Refuse a module that cannot be worked on; modes are left as they were.

    Raises:
        Refused: uninitialized, meta or complex tensors; several devices; NaN or infinite values (with names
            and counts); a forward that fails on the example, returns no tensor or NaN.
    """
    tensors = tensors_of(model)
    _check_kinds(tensors)
    _check_finite(tensors)
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            output = model(*to_inputs(model, example))
        except Exception as error:
            # The user's forward may raise anything on data that does not fit.
            line = (str(error).strip().splitlines() or [""])[0][:300]
            shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in example)
            raise Refused(
                "the model must run on an example of the data",
                value=f"{type(error).__name__}: {line}",
                place=f"model({shapes})",
                fix="check the order, the shapes and the types of the task's inputs",
            ) from error
    chosen = select_output(output)
    if chosen.is_floating_point() and bool(chosen.isnan().any()):
        raise Refused(
            "the model's output must have no NaN",
            place="model",
            value=f"{int(chosen.isnan().sum())} of {chosen.numel()}",
            fix="look for a division by zero, the root of a negative number, or overflow",
        )


def _check_kinds(tensors: dict[str, Tensor]) -> None:
    lazy = [n for n, t in tensors.items() if isinstance(t, nn.parameter.UninitializedTensorMixin)]
    if lazy:
        raise Refused(
            "every parameter must be initialized",
            value=", ".join(lazy[:5]),
            place="model",
            fix="run the model once on an example",
        )
    rules: tuple[tuple[str, Callable[[Tensor], bool], str], ...] = (
        ("tensors cannot be on the meta device", lambda t: t.is_meta, "load the weights before optimizing"),
        ("tensors cannot be complex", lambda t: t.is_complex(), "split it into real and imaginary parts"),
    )
    for rule, bad, fix in rules:
        names = [n for n, t in tensors.items() if bad(t)]
        if names:
            raise Refused(rule, value=f"{', '.join(names[:5])} ({len(names)} in all)", place="model", fix=fix)
    devices = sorted({str(t.device) for t in tensors.values()})
    if len(devices) > 1:
        raise Refused(
            "all tensors must be on one device",
            value=", ".join(devices),
            place="model",
            fix="move the model with .to(device)",
        )


def _check_finite(tensors: dict[str, Tensor]) -> None:
    counts = {n: int((~t.isfinite()).sum()) for n, t in tensors.items() if t.is_floating_point()}
    bad = [f"{name} ({count})" for name, count in counts.items() if count]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise Refused(
            "weights and buffers must be finite",
            value=", ".join(bad[:5]) + more,
            place="model",
            fix="load a checkpoint without NaN or infinity",
        )


def fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 over all tensors (names, shapes, types, values), masks and the code of the model.

    >>> net = nn.Linear(2, 3)
    >>> fingerprint(net) == fingerprint(copy_module(net)), fingerprint(net) == fingerprint(nn.Linear(2, 3))
    (True, False)
    """
    digest = hashlib.sha256()
    for part in (re.sub(r" at 0x[0-9a-f]+", "", repr(model)), *_sources(model)):
        digest.update(part.encode() + b"\0")
    for name, tensor in sorted(tensors_of(model).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().tobytes())
    for name, mask in sorted(masks_of(model).items()):
        digest.update(f"mask {name}\0".encode() + np.packbits(mask).tobytes())
    return digest.hexdigest()


def _sources(model: nn.Module) -> list[str]:
    """Return the source of every class of the model that is not torch's own, and generated code."""
    found: set[str] = set()
    for module in model.modules():
        code = getattr(module, "_penjing_code", None)
        if code is not None:
            found.add(code.source)
        kind = type(module)
        if not kind.__module__.startswith("torch."):
            try:
                found.add(inspect.getsource(kind))
            except (OSError, TypeError):
                # Defined in a console or generated: no source to read, its name stands in.
                found.add(f"{kind.__module__}.{kind.__qualname__}")
    return sorted(found)
