"""Quantize a causal language model from its safetensors files, one block in memory at a time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penjing.core.errors import Exit, Refused
from penjing.core.extras import need
from penjing.core.files import (
    publish_folder,
    read_json,
    refusing,
    remove_leftovers,
    verify_manifest,
    write_json,
)
from penjing.core.method import Method
from penjing.core.progress import Line, Say, silent
from penjing.language.blocks import KINDS, Job, quantize_block
from penjing.language.checks import (
    PLACE,
    Tokens,
    digest_of,
    read_tokens,
    refuse_full,
    refuse_patterns,
    refuse_seen,
    weight_method,
)
from penjing.language.hidden_states import write_hidden_states
from penjing.language.packed_weights import PACKED, RECORD
from penjing.language.result import QuantizedCheckpoint, deliver
from penjing.run.lock import DriverLock

if TYPE_CHECKING:
    from penjing.backends.torch.decoder.decoder import Decoder
    from penjing.backends.torch.decoder.decoder_block import Call

_PROGRESS = "progress.json"


def quantize_checkpoint(
    folder: Path | str,
    method: Method,
    tokens: Any,
    out: Path | str,
    *,
    evaluation: Any = None,
    seed: int = 0,
    say: Say = silent,
) -> QuantizedCheckpoint:
    """Quantize the linear layers in the blocks of a causal language model without holding it whole.

    Block by block: a block and its quantized copy are in memory, in float32, nothing of the others; before
    and after that, the embeddings and the output layer. What goes from block to block lies in files. Each
    block is quantized on what the quantized blocks before it give, as `pj.apply` does on the whole model.

    The work is done in a folder beside `out`, with the ending `.partial`, which takes the name `out` when all
    is there. A call after a kill, with the same arguments, goes on behind the last finished block, and the
    result is the same to the bit; a call after the end returns the result. The embeddings and the output
    layer stay as they are, whatever `ends` says.

    `out` is a checkpoint that `AutoModelForCausalLM.from_pretrained` loads: rounded values in the type that
    the weights had, so that its size is the same. In `packed` lie the packed integer codes and scales.

    Args:
        folder: with `config.json` and safetensors files, as `save_pretrained` writes.
        method: one that rounds weights: QuantizeNearest, QuantizeGPTQ, QuantizeAWQ, QuantizeAutoRound or
            QuantizeReconstruct with `inputs=None`; or `only(pattern, method)`.
        tokens: `[examples, length]`, to calibrate on; the method's `examples` says how many are drawn.
        out: folder to be made.
        evaluation: other sequences `[examples, length]` whose perplexity is taken before and after.
        seed: of the draw.
        say: called with lines of progress.

    Raises:
        Refused: a package is missing; the method is of another kind, or its patterns match no layer; the
            checkpoint has no safetensors, an unknown architecture, a missing or damaged shard, NaN, or is
            quantized; tokens are empty, too short, too long or outside of the vocabulary; there is no room;
            the output folder or its beginning is of another run.

    >>> tokens = numpy.load("tokens.npy")  # doctest: +SKIP
    >>> method = penjing.QuantizeGPTQ("int4 group 32", None)  # doctest: +SKIP
    >>> quantize_checkpoint("llama", method, tokens, "small").packed_bytes  # doctest: +SKIP
    """
    start, folder, out = time.perf_counter(), Path(folder), Path(out)
    job = _checked(folder, method, {"tokens": tokens, "evaluation": evaluation}, out, seed, say)
    if out.exists():
        return _finished(job)
    if not job.work.exists():
        ids = sum(ids.size for ids in job.streams.values())
        refuse_full(out, job.decoder, weight_method(method), 4 * ids * job.decoder.width * 4)
        job.decoder.shards.refuse_not_finite()
        with refusing(job.work):
            job.work.mkdir()
    with DriverLock(job.work / "lock"):
        remove_leftovers(job.work)
        result = _run(job, start)
    shutil.rmtree(job.work)
    return result


def _checked(folder: Path, method: Method, tokens: dict[str, Any], out: Path, seed: int, say: Say) -> Job:
    """Refuse what cannot be done, and return the run."""
    need("language", PLACE)
    from penjing.backends.torch.decoder.decoder import open_decoder

    weight_method(method)
    if (folder / RECORD).exists():
        raise Refused(
            "must hold a float model",
            value=f"a folder with {RECORD}, quantized already",
            place=str(folder),
            fix="start from the float checkpoint",
        )
    if not out.absolute().parent.is_dir():
        raise Refused(
            "needs a parent folder that exists",
            value=str(out),
            place=f"{PLACE}.out",
            fix="make the parent, or correct the path",
            code=Exit.ENVIRONMENT,
        )
    decoder = open_decoder(folder)
    refuse_patterns(method, decoder.linear_layers())
    streams = {"calibration": read_tokens(tokens["tokens"], decoder, "tokens")}
    if tokens["evaluation"] is not None:
        streams["evaluation"] = read_tokens(tokens["evaluation"], decoder, "evaluation")
        refuse_seen(*streams.values())
    key = digest_of(decoder, method, streams["calibration"], streams.get("evaluation"), seed)
    return Job(decoder, method, streams, _calls(decoder, streams), out, seed, key, say)


def _calls(decoder: Decoder, streams: Mapping[str, Tokens]) -> dict[int, list[Call]]:
    """Return what blocks take beside hidden states, by the length of the sequences."""
    import torch

    lengths = {ids.shape[1]: torch.from_numpy(ids[:1]) for ids in streams.values()}
    with decoder.outside():
        return {length: decoder.start(ids)[1] for length, ids in lengths.items()}


def _foreign(path: Path, what: str) -> Refused:
    return Refused(
        "must be new, or of the same model, method, tokens and seed",
        value=what,
        place=str(path),
        fix="choose another folder; nothing is ever overwritten",
        code=Exit.USAGE,
    )


def _finished(job: Job) -> QuantizedCheckpoint:
    """Return the result of an earlier call, if it was the same."""
    if not (job.out / RECORD).is_file():
        raise _foreign(job.out, "something else is there")
    if verify_manifest(job.out)["facts"].get("key") != job.key:
        raise _foreign(job.out, "the result of another model, method, tokens or seed")
    shutil.rmtree(job.work, ignore_errors=True)  # of a call that was killed after its last step
    return QuantizedCheckpoint(folder=str(job.out), **read_json(job.out / RECORD)["result"])


def _run(job: Job, start: float) -> QuantizedCheckpoint:
    """Do what is left to do, block by block."""
    progress = _begun(job)
    before = progress["seconds"]
    for index in range(progress["done"], len(job.decoder)):
        job.say(Line.phase(f"block {index + 1} of {len(job.decoder)}"))
        changes, layers = quantize_block(job, index)
        progress["changes"] += [change.model_dump(mode="json") for change in changes]
        progress["layers"] |= layers
        progress |= {"done": index + 1, "seconds": before + time.perf_counter() - start}
        write_json(job.work / _PROGRESS, progress)
        for stream in job.streams:
            for kind in KINDS:
                job.states(stream, kind, index).unlink(missing_ok=True)
    result = deliver(job, progress)
    publish_folder(job.result, job.out, {"key": job.key})
    return result


def _begun(job: Job) -> dict[str, Any]:
    """Return how far an earlier call came, or make a beginning: what the first block takes.

    Raises:
        Refused: the beginning is that of another run.
    """
    path = job.work / _PROGRESS
    if path.exists():
        progress: dict[str, Any] = read_json(path)
        if progress.get("key") != job.key:
            raise _foreign(job.work, "the beginning of another model, method, tokens or seed")
        return progress
    import torch

    with refusing(job.result):
        (job.result / PACKED).mkdir(parents=True, exist_ok=True)
    with job.decoder.outside():
        for stream, ids in job.streams.items():
            for kind in KINDS:
                rows = (job.decoder.start(torch.from_numpy(row[None]))[0].numpy() for row in ids)
                write_hidden_states(job.states(stream, kind, 0), (*ids.shape, job.decoder.width), rows)
    progress = {"key": job.key, "done": 0, "seconds": 0.0, "changes": [], "layers": {}}
    write_json(path, progress)
    return progress
