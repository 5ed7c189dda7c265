"""What pruning one architecture comes to: cut, held against the masked model, trained, exported, reloaded."""

import copy
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import penjing as pj
from architectures.registry import Architecture
from penjing.arrays.scores import l2_score
from penjing.arrays.structure.selection import kept_width, strongest
from penjing.backends.torch import BACKEND
from penjing.backends.torch.cut.exported import ExportedNet
from penjing.backends.torch.tensors import evaluating, input_names, tensors_of, to_inputs
from penjing.core.artefact import deliver, load
from penjing.core.data.split import Split
from penjing.core.errors import Refused

MATCHED, EXPORTED = 1e-5, 1e-4
SIMILAR = 0.02
"""How far two cuts of equal widths may differ in parameters: units of one group may be of different sizes."""
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass
class Row:
    """One architecture at one ratio.

    `stage` is the step at which it failed, `reason` why; both are empty where all went well. Differences are
    the largest absolute one over the largest expected value. Seconds are those of one processor. Memory is
    what the process took beyond the model and the libraries, in MB. `apart` counts the units that the
    independent check covers, of `units` cut.
    """

    name: str
    family: str
    ratio: float
    stage: str = ""
    reason: str = ""
    parameters: tuple[int, int] | None = None
    multiply_adds: tuple[int, int] | None = None
    groups: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)
    units: int = 0
    apart: int = 0
    matched: float | None = None
    trained: bool = False
    exported: float | None = None
    reloaded: float | None = None
    own_class: bool | None = None
    analyse_s: float | None = None
    cut_s: float | None = None
    memory_mb: float | None = None

    def plain(self) -> dict[str, Any]:
        """Return the row as JSON data."""
        return asdict(self)


class Wrong(Exception):
    """A check that did not hold."""


def examine(architecture: Architecture, ratio: float, onnx: bool = True) -> Row:
    """Prune a share of every group by the norm of its units, and check the result in every way.

    Whatever is raised on the way ends the examination; the row then says at which step, and why.

    Args:
        architecture: the model.
        ratio: share of units removed of every group.
        onnx: whether to export as well, which takes longest.
    """
    row = Row(architecture.name, architecture.family, ratio)
    try:
        _examine(architecture, row, onnx)
        row.stage = ""
    except Exception as error:  # noqa: BLE001 - a table of what fails has a row for whatever fails
        row.reason = _reason(error)
    return row


def _reason(error: Exception) -> str:
    if isinstance(error, Refused):
        return f"{error.rule}: {error.value} ({error.place})"
    line = (str(error).strip().splitlines() or [""])[0]
    return line if isinstance(error, Wrong) else f"{type(error).__name__}: {line[:200]}"


def _examine(architecture: Architecture, row: Row, onnx: bool) -> None:
    row.stage = "build"
    model = BACKEND.select(architecture.build(), architecture.output)
    example = architecture.example()
    start, begin = time.process_time(), _peak_mb()
    row.stage = "analyse"
    groups = BACKEND.groups(model, example)
    row.analyse_s = time.process_time() - start
    row.groups, row.frozen = len(groups.groups), dict(groups.frozen)
    row.kinds = dict(Counter(group.kind for group in groups.groups))
    kept = chosen(model, groups, row.ratio)
    row.units = sum(group.size - len(kept[group.name]) for group in groups.groups if group.name in kept)
    if not kept:
        top = Counter(groups.frozen.values()).most_common(1)
        raise Wrong(f"nothing to prune: {top[0][0] if top else 'no layer has channels'}")
    row.stage, start = "cut", time.process_time()
    small = BACKEND.keep(model, groups, kept)
    row.cut_s, row.memory_mb = time.process_time() - start, _peak_mb() - begin
    row.own_class = not any(isinstance(module, ExportedNet) for module in small.modules())
    row.stage = "match"
    _match(row, model, small, groups, kept, example)
    row.stage = "train"
    _train(copy.deepcopy(small), example)
    row.trained = True
    row.stage = "count"
    counts = [BACKEND.operations(m, example) for m in (model, small)]
    row.parameters = tuple(c.parameters for c in counts)
    row.multiply_adds = tuple(c.multiply_adds for c in counts)
    row.stage = "method"
    _by_method(row, model, example)
    with tempfile.TemporaryDirectory() as folder:
        row.stage = "reload"
        row.reloaded = _reload(architecture, small, example, Path(folder))
        if onnx:
            row.stage = "export"
            row.exported = _export(small, example, Path(folder) / "model.onnx")


def chosen(model: Any, groups: Any, ratio: float) -> dict[str, np.ndarray]:
    """Return the units of every group that stay, by l2 norm, for the groups that lose any."""
    tensors = {layer.name: BACKEND.read(model, layer.name) for layer in BACKEND.layers(model)}
    kept = {}
    for group in groups.groups:
        width = kept_width(group.size, ratio, len(np.unique(group.blocks)), 1)
        kept[group.name] = strongest(l2_score(group, tensors), width, group.blocks)
    return {g.name: kept[g.name] for g in groups.groups if len(kept[g.name]) < g.size}


def _match(row: Row, model: Any, small: Any, groups: Any, kept: Any, example: Any) -> None:
    """Compare with a model whose weights of removed units are zero, without the labels that the cut used.

    A norm over channels (LayerNorm, GroupNorm) has no such model: removed units count as absent, not as zero.
    The units of such groups are cut in both; `keep` has proved that cut itself.
    """
    absent = {group.name for group in groups.groups if _normalized(model, group)}
    whole = {name: kept[name] for name in kept if name in absent}
    apart = {name: kept[name] for name in kept if name not in whole}
    row.apart = sum(g.size - len(apart[g.name]) for g in groups.groups if g.name in apart)
    reference = BACKEND.keep(model, groups, whole) if whole else copy.deepcopy(model)
    _zero(reference, groups, apart)
    gaps = [_gap(outputs(small, x), outputs(reference, x)) for x in (example, fresh(example))]
    row.matched = max(gaps)
    if row.matched > MATCHED:
        raise Wrong(f"shrunk differs from zeroed weights by {row.matched:.1e}")


def _normalized(model: Any, group: Any) -> bool:
    """Tell whether a norm takes its statistics over the units of a group; classes of libraries go by name."""
    layers = [model.get_submodule(slot.layer) for slot in group.slots]
    each = torch.nn.modules.batchnorm._NormBase
    norms = [layer for layer in layers if "Norm" in type(layer).__name__ and not isinstance(layer, each)]
    return group.kind == "hidden" or bool(norms)


def _zero(model: Any, groups: Any, kept: Mapping[str, np.ndarray]) -> None:
    named = tensors_of(model)
    with torch.no_grad():
        for group in groups.groups:
            if group.name not in kept:
                continue
            gone = np.setdiff1d(np.arange(group.size), kept[group.name])
            for slot in group.slots:
                if slot.tensor not in STATISTICS:
                    _zero_units(named[f"{slot.layer}.{slot.tensor}".lstrip(".")], slot, gone)


def _zero_units(tensor: Any, slot: Any, gone: np.ndarray) -> None:
    lost = torch.from_numpy(np.isin(slot.units, gone))
    length, axis = tensor.shape[slot.axis], slot.axis
    if len(lost) == length:
        tensor.index_fill_(axis, lost.nonzero()[:, 0], 0.0)
        return
    # The input of a grouped convolution: every block of rows has columns of its own.
    blocks = len(lost) // length
    for rows, columns in zip(tensor.chunk(blocks), lost.chunk(blocks), strict=True):
        rows.index_fill_(axis, columns.nonzero()[:, 0], 0.0)


def outputs(model: Any, inputs: Any) -> list[np.ndarray]:
    """Return every tensor that a model returns, in evaluation mode, as arrays."""
    with evaluating(model), torch.no_grad():
        return [tensor.numpy() for tensor in leaves(model(*to_inputs(model, inputs)))]


def leaves(value: Any) -> list[Any]:
    """Return the tensors in a model's output, however nested, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return [leaf for part in value or () for leaf in leaves(part)] if isinstance(value, tuple | list) else []


def fresh(example: Any, batch: int = 3) -> tuple[np.ndarray, ...]:
    """Return other inputs of the same kind and another batch size; integers stay within those seen."""
    random = np.random.default_rng(1)
    made = []
    for x in example:
        shape = (batch, *x.shape[1:])
        if x.dtype.kind == "f":
            made.append(random.standard_normal(shape).astype(x.dtype))
        else:
            made.append(random.choice(x.reshape(-1), shape))
    return tuple(made)


def _gap(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    if [x.shape for x in found] != [x.shape for x in expected]:
        return float("inf")
    gaps = [np.abs(a - b).max() / max(np.abs(b).max(), 1e-12) for a, b in zip(found, expected, strict=True)]
    return float(max(gaps)) if np.isfinite(gaps).all() else float("inf")


def _train(model: Any, example: Any) -> None:
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    torch.manual_seed(0)
    model.train()
    loss = sum(leaf.float().square().mean() for leaf in leaves(model(*to_inputs(model, example))))
    loss.backward()
    optimizer.step()
    moved = sum(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    if not bool(loss.isfinite()) or not moved:
        raise Wrong(f"loss {float(loss):.3g}, {moved} of {len(before)} tensors moved")
    if not all(np.isfinite(output).all() for output in outputs(model, example)):
        raise Wrong("the output after one step is not finite")


def _by_method(row: Row, model: Any, example: Any) -> None:
    """Take the way that users take: the method, in a plan, on a task."""
    targets = np.zeros(len(example[0]), np.int64)
    parts = {name: Split(example, targets, name) for name in ("train", "valid", "test")}
    several = len(outputs(model, example)) > 1
    task = pj.Task(**parts, loss="cross_entropy", output=0 if several else None, prepared=True)
    method = pj.PruneChannels(row.ratio, round_to=1, units=("channel", "head", "hidden"))
    applied = pj.apply(model, method, task)
    left = sum(parameter.numel() for parameter in applied.model.parameters())
    if not several and abs(left - row.parameters[1]) > SIMILAR * row.parameters[1]:
        raise Wrong(f"the method leaves {left} parameters, the cut by hand {row.parameters[1]}")


def _reload(architecture: Architecture, small: Any, example: Any, folder: Path) -> float:
    def made() -> Any:
        return BACKEND.select(architecture.build(), architecture.output)

    artefact = deliver(small, pj.Target("torch"), folder / "torch", example=example)
    gap = _gap([load(artefact.path, made)(*example)], outputs(small, example)[:1])
    if gap > 1e-6:
        raise Wrong(f"reloaded differs by {gap:.1e}")
    return gap


def _export(small: Any, example: Any, path: Path) -> float:
    import onnxruntime

    BACKEND.export(small, example, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    gaps = []
    for inputs in (example, fresh(example)):
        named = dict(zip(input_names(small, len(inputs)), to_inputs(small, inputs), strict=True))
        wanted = {entry.name for entry in session.get_inputs()}
        found = session.run(None, {name: x.numpy() for name, x in named.items() if name in wanted})
        gaps.append(_gap(found, outputs(small, inputs)))
    if max(gaps) > EXPORTED:
        raise Wrong(f"ONNX Runtime differs by {max(gaps):.1e}")
    return max(gaps)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
