"""One block of a language model: quantized on what the quantized blocks before it give, and written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from penjing.core.backend import backend_named
from penjing.core.context import Context
from penjing.core.data.split import Split
from penjing.core.errors import Refused
from penjing.core.method import Change, Method, name_of
from penjing.core.progress import Say
from penjing.core.registry import handler_for
from penjing.core.task import Task
from penjing.language.checks import Tokens, quantized_layers, weight_method
from penjing.language.hidden_states import read_hidden_states, write_hidden_states
from penjing.language.packed_weights import PACKED, write_packed_weights
from penjing.quantize.autoround import QuantizeAutoRound
from penjing.quantize.reconstruct import QuantizeReconstruct

if TYPE_CHECKING:
    from penjing.backends.torch.decoder.decoder import Decoder
    from penjing.backends.torch.decoder.decoder_block import Block, Call

FORWARD_TOKENS = 4096
"""Tokens that go through a block at once, or one sequence where it is longer."""
CALIBRATION_TOKENS = 1024
"""Tokens that go through a block at once beside what a method keeps of its layers' inputs."""
KINDS = ("float", "quantized")
"""The model as it was, and the one with quantized blocks."""


@dataclass(frozen=True)
class Job:
    """One run: where from, what, where to.

    Attributes:
        decoder: the model.
        method: with its limits.
        streams: sequences of tokens by name, `calibration` and maybe `evaluation`.
        calls: what blocks take beside hidden states, by the length of the sequences.
        out: the folder to be made.
        seed: of every draw.
        key: all that the result depends on, hashed.
        say: takes lines of progress.
    """

    decoder: Decoder
    method: Method
    streams: Mapping[str, Tokens]
    calls: Mapping[int, list[Call]]
    out: Path
    seed: int
    key: str
    say: Say

    @property
    def work(self) -> Path:
        """The folder of an unfinished run."""
        return self.out.with_name(f"{self.out.name}.partial")

    @property
    def result(self) -> Path:
        """The folder that becomes `out`."""
        return self.work / "result"

    def states(self, stream: str, kind: str, index: int) -> Path:
        """Return the file of what block `index` takes, of a kind in `KINDS`."""
        return self.work / f"{stream}_{kind}_{index:05d}.npy"

    def shard(self, index: int) -> str:
        """Return the name of the shard of a block; behind the last block, that of all else."""
        return f"model-{index + 1:05d}-of-{len(self.decoder) + 1:05d}.safetensors"


def quantize_block(job: Job, index: int) -> tuple[list[Change], dict[str, Any]]:
    """Quantize one block; write its shard, its codes, and what the next block takes.

    Returns:
        A change for each layer, and what must be known to read the codes.

    Raises:
        Refused: what the method refuses; hidden states that are not finite; no room.
    """
    length = job.streams["calibration"].shape[1]
    block = job.decoder.block(index, job.calls[length][index])
    if index == 0:
        _refuse_joined(job, block)
    _forward(job, block, index, "float")
    given = tuple(
        read_hidden_states(job.states("calibration", kind, index)) for kind in ("quantized", "float")
    )
    changes, facts = _quantize(job, block, index, given)
    _write(job, block, index)
    _forward(job, block, index, "quantized")
    return changes, facts


def _forward(job: Job, block: Block, index: int, kind: str) -> None:
    """Take the hidden states of every stream through a block."""
    for stream, ids in job.streams.items():
        given = read_hidden_states(job.states(stream, kind, index))
        made = _outputs(block, given, job.calls[ids.shape[1]][index])
        write_hidden_states(job.states(stream, kind, index + 1), given.shape, made)


def _outputs(block: Block, states: NDArray[Any], call: Call) -> Iterator[NDArray[np.float32]]:
    import torch

    step = max(1, FORWARD_TOKENS // states.shape[1])
    for start in range(0, len(states), step):
        with torch.no_grad():  # not around the yield: whoever takes what is made keeps their own mode
            made = block.through(torch.from_numpy(np.array(states[start : start + step])), call).numpy()
        yield made


def _refuse_joined(job: Job, block: Block) -> None:
    """Refuse blocks that cannot take several sequences with what one sequence had beside it."""
    import torch

    ids = job.streams["calibration"]
    states = torch.from_numpy(np.array(read_hidden_states(job.states("calibration", "float", 0))[:1]))
    try:
        with torch.no_grad():
            one, two = (
                block.through(states, block.call),
                block.through(torch.cat([states, states]), block.call),
            )
        alike = two.shape == (2, ids.shape[1], job.decoder.width) and torch.allclose(two[1:], one, 1e-3, 1e-3)
    except (RuntimeError, TypeError) as error:
        alike, first = False, str(error).splitlines()[0][:120]
    else:
        first = "outputs differ"
    if not alike:
        raise Refused(
            "must compute the same for one sequence and for several",
            value=first,
            place=f"{type(job.decoder.model).__name__}.{block.name}",
            fix="quantize this architecture in memory instead: pj.apply(model, method, task)",
        )


def _quantize(
    job: Job, block: Block, index: int, given: tuple[NDArray[Any], ...]
) -> tuple[list[Change], dict[str, Any]]:
    """Quantize a block in place, its layers again torch's own, with rounded weights."""
    from penjing.backends.torch.quant.stated import layer_formats
    from penjing.backends.torch.quantizers import remove_quantizers

    split = Split(given, np.zeros(len(given[0]), np.int64), "calibration")
    task = Task(train=split, valid=split, test=split, prepared=True)
    context = Context(
        task,
        backend_named("torch"),
        block,
        job.seed,
        job.method.covers,
        lambda line: job.say(line.under(block.name)),
    )
    inside = [name for name in job.decoder.linear_layers() if name.startswith(f"{block.name}.")]
    layers, changes = quantized_layers(job.method, inside), list[Change]()
    if layers:
        handler = handler_for(job.method, "torch")
        assert handler is not None
        changes = handler(block, _for_block(job, layers), context).changes
    facts = write_packed_weights(
        job.result / PACKED / job.shard(index),
        {name: found.weights for name, found in layer_formats(block).items()},
    )
    remove_quantizers(block)
    return changes + _left(job, index, changes), facts


def _for_block(job: Job, layers: list[str]) -> Method:
    """Return the method as it is for one block: no ends, and no patterns for layers of other blocks."""
    method = weight_method(job.method)
    own = tuple(pair for pair in method.by_layer if any(fnmatchcase(name, pair[0]) for name in layers))
    fields: dict[str, Any] = {"ends": False, "by_layer": own}
    if not isinstance(method, QuantizeAutoRound | QuantizeReconstruct):  # in these it is that of a step
        length = job.streams["calibration"].shape[1]
        fields["batch_size"] = min(method.batch_size, max(1, CALIBRATION_TOKENS // length))
    return method.model_copy(update=fields)


def _left(job: Job, index: int, changes: list[Change]) -> list[Change]:
    """Return a change for each matrix of a block that no other change tells of."""
    told = {change.layer for change in changes}
    left = []
    for name, source in job.decoder.tensors_of(index).items():
        layer, _, leaf = name.rpartition(".")
        if len(job.decoder.shards.stored[source.name].shape) < 2 or layer in told:
            continue
        linear = layer in job.decoder.linear_layers()
        reason = "not covered by the pattern" if linear else "it is no weight of a linear layer"
        place = layer if leaf == "weight" else name
        left.append(Change(method=name_of(job.method), layer=place, status="skipped", reason=reason))
    return left


def _write(job: Job, block: Block, index: int) -> None:
    """Write a block in the types that it came in, and let it compute with what was written."""
    import torch

    from penjing.backends.torch.decoder.shards import TYPES, Part, write_shard

    state: dict[str, torch.Tensor] = block.state_dict()
    parts: dict[str, Part] = {}
    for name, source in job.decoder.tensors_of(index).items():
        kind, value = TYPES[job.decoder.shards.stored[source.name].kind], state[name]
        if kind != value.dtype:
            own = value.to(kind)
            value.copy_(own)
            value = own
        parts[source.name] = Part.of(value.T.contiguous() if source.turned else value)
    write_shard(job.result / job.shard(index), parts)
