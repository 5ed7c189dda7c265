"""The end of quantizing a checkpoint: perplexity, what is outside of the blocks, the record."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.arrays.bootstrap import bootstrap
from penjing.core.files import MANIFEST, refusing, write_json
from penjing.core.method import Change, name_of
from penjing.core.registry import method_to_json
from penjing.core.value import Value
from penjing.language.blocks import KINDS, Job
from penjing.language.hidden_states import read_hidden_states
from penjing.language.packed_weights import PACKED, RECORD

_COPIED = (".json", ".txt", ".model", ".jinja", ".md")
"""Files of a checkpoint beside its weights: configuration, tokenizer, card."""


class Perplexity(Value):
    """Perplexity of sequences that were not calibrated on, before and after.

    Attributes:
        before, after: exp of the mean negative log-likelihood of a token.
        ratio: after over before.
        low, high: 95% interval of the ratio, by a paired bootstrap over sequences; the ratio itself where
            there is one sequence.
        tokens: that were predicted.
    """

    before: float
    after: float
    ratio: float
    low: float
    high: float
    tokens: int


class QuantizedCheckpoint(Value):
    """What `quantize_checkpoint` made.

    Attributes:
        folder: of the new checkpoint.
        changes: one for each linear layer of the blocks, and for each matrix that stayed as it was.
        perplexity: None where nothing was given to judge on.
        seconds: that it took, over all calls.
        weight_bytes: of the values in the shards, the same as before, since values are written in the type
            that they had.
        packed_bytes: of the same model with packed codes and scales in the place of rounded weights.
    """

    folder: str
    changes: tuple[Change, ...]
    perplexity: Perplexity | None
    seconds: float
    weight_bytes: int
    packed_bytes: int


def deliver(job: Job, progress: dict[str, Any]) -> QuantizedCheckpoint:
    """Complete the folder of the result, without its manifest.

    Args:
        job: of which all blocks are done.
        progress: `changes`, `layers` and `seconds` so far.

    Raises:
        Refused: no room, or no permission.
    """
    from penjing.backends.torch.decoder.shards import INDEX, TYPES, Part, write_shard

    decoder, shards = job.decoder, job.decoder.shards
    rest, last = decoder.rest(), job.shard(len(decoder))
    parts = {}
    for name in rest:
        entry = shards.stored[name]
        parts[name] = Part(TYPES[entry.kind], entry.shape, partial(shards.read, name))
    write_shard(job.result / last, parts)
    weights = dict.fromkeys(rest, last)
    for index in range(len(decoder)):
        weights |= {source.name: job.shard(index) for source in decoder.tensors_of(index).values()}
    write_json(job.result / INDEX, {"metadata": {"total_size": shards.bytes}, "weight_map": weights})
    for path in sorted(shards.folder.iterdir()):
        if path.suffix in _COPIED and path.is_file() and path.name not in (INDEX, RECORD, MANIFEST):
            with refusing(job.result / path.name):
                shutil.copyfile(path, job.result / path.name)
    result = QuantizedCheckpoint(
        folder=str(job.out),
        changes=(*(Change(**c) for c in progress["changes"]), *_outside(job)),
        perplexity=_perplexity(job),
        seconds=progress["seconds"],
        weight_bytes=shards.bytes,
        packed_bytes=_packed_bytes(job, progress["layers"]),
    )
    write_json(
        job.result / RECORD,
        {
            "schema": 1,
            "method": method_to_json(job.method),
            "seed": job.seed,
            "layers": progress["layers"],
            "result": result.model_dump(mode="json", exclude={"folder"}),
        },
    )
    return result


def _outside(job: Job) -> list[Change]:
    """Return a change for each matrix outside of the blocks."""
    prefix, stored = f"{job.decoder.path}.", job.decoder.shards.stored
    return [
        Change(
            method=name_of(job.method),
            layer=name.removesuffix(".weight"),
            status="skipped",
            reason="it is outside of the blocks and stays as it is",
        )
        for name, source in job.decoder.sources.items()
        if not name.startswith(prefix) and len(stored[source.name].shape) > 1
    ]


def _packed_bytes(job: Job, layers: dict[str, Any]) -> int:
    decoder = job.decoder
    float_bytes = sum(decoder.shards.stored[decoder.sources[f"{name}.weight"].name].bytes for name in layers)
    packed = sum(path.stat().st_size for path in (job.result / PACKED).iterdir())
    return decoder.shards.bytes - float_bytes + packed


def _perplexity(job: Job) -> Perplexity | None:
    if "evaluation" not in job.streams:
        return None
    before, after = (_losses(job, kind) for kind in KINDS)
    change = after - before
    ratio = float(np.exp(change.mean()))
    low = high = ratio
    if np.ptp(change) > 0:
        found = bootstrap(lambda weights: weights @ change / weights.sum(1), len(change))
        low, high = (float(np.exp(found.quantile(share))) for share in (0.025, 0.975))
    examples, length = job.streams["evaluation"].shape
    return Perplexity(
        before=float(np.exp(before.mean())),
        after=float(np.exp(after.mean())),
        ratio=ratio,
        low=low,
        high=high,
        tokens=examples * (length - 1),
    )


def _losses(job: Job, kind: str) -> NDArray[np.float64]:
    """Return the mean negative log-likelihood of a token for every sequence, `[examples]`."""
    import torch

    decoder, ids = job.decoder, torch.from_numpy(job.streams["evaluation"])
    states = read_hidden_states(job.states("evaluation", kind, len(decoder)))
    found = []
    with decoder.outside():
        for index in range(len(ids)):
            part = slice(index, index + 1)
            losses = decoder.losses(ids[part], torch.from_numpy(np.array(states[part])))
            found.append(losses.double().mean().item())
    return np.array(found)
