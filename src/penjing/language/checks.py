"""What `quantize_checkpoint` is asked to do: checked before anything slow begins."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from penjing.calibration.rounding import Rounded
from penjing.core.data.copies import row_hashes
from penjing.core.errors import Exit, Refused, nearest
from penjing.core.files import free_bytes, sha256_file
from penjing.core.method import Method, inner, name_of, unmatched
from penjing.core.registry import handler_for, method_to_json
from penjing.quantize.autoround import QuantizeAutoRound
from penjing.quantize.awq import QuantizeAWQ
from penjing.quantize.gptq import QuantizeGPTQ
from penjing.quantize.nearest import QuantizeNearest
from penjing.quantize.reconstruct import QuantizeReconstruct

if TYPE_CHECKING:
    from penjing.backends.torch.decoder.decoder import Decoder

METHODS: tuple[type[Rounded], ...] = (
    QuantizeNearest,
    QuantizeGPTQ,
    QuantizeAWQ,
    QuantizeAutoRound,
    QuantizeReconstruct,
)
PLACE = "quantize_checkpoint"
Tokens = NDArray[np.int64]


def weight_method(method: Method) -> Rounded:
    """Return the method inside `only`, one that rounds weights alone.

    Raises:
        Refused: it is another one, rounds what layers take, or weighs layers of the whole model.
    """
    found = inner(method) if isinstance(method, Method) else method
    if not isinstance(found, METHODS) or handler_for(found, "torch") is None:
        names = ", ".join(kind.__name__ for kind in METHODS)
        raise Refused(
            "must be a method that quantizes weights",
            value=repr(method)[:80],
            place=f"{PLACE}.method",
            fix=f"choose one of {names}",
            code=Exit.USAGE,
        )
    if found.inputs is not None or any(option[1] is not None for _, option in found.by_layer):
        raise Refused(
            "must be None: a checkpoint holds weights, no formats of activations",
            value=found.inputs,
            place=f"{PLACE}, {name_of(method)}.inputs",
            fix="pass inputs=None, also in by_layer",
            code=Exit.USAGE,
        )
    if found.mixed is not None:
        raise Refused(
            "must be None: mixed bits weigh all layers at once, which needs the whole model",
            value=found.mixed,
            place=f"{PLACE}, {name_of(method)}.mixed",
            fix="choose the formats with by_layer",
            code=Exit.USAGE,
        )
    return found


def quantized_layers(method: Method, layers: Sequence[str]) -> list[str]:
    """Return the layers that a method rounds: those that it covers."""
    return [layer for layer in layers if method.covers(layer)]


def refuse_patterns(method: Method, layers: Sequence[str]) -> None:
    """Refuse patterns that no layer of the blocks matches.

    Args:
        method: to be applied.
        layers: names of the linear layers of all blocks.

    Raises:
        Refused: a pattern of `only` or of `by_layer` matches none, or nothing is left to be rounded.
    """
    if part := unmatched(method, layers):
        raise Refused(
            "must match a linear layer of a block",
            value=repr(part),
            code=Exit.USAGE,
            place=f"each pattern of only(..., {name_of(method)})",
            fix=nearest(part.removeprefix("!"), layers[:8]),
        )
    covered = quantized_layers(method, layers)
    if not covered:
        raise Refused(
            "must leave a linear layer of a block to quantize",
            value=repr(method)[:120],
            place=f"{PLACE}.method",
            fix=f"write a pattern that matches names such as {layers[0]}",
            code=Exit.USAGE,
        )
    for pattern, _ in weight_method(method).by_layer:
        if not any(fnmatchcase(name, pattern) for name in covered):
            raise Refused(
                "must have patterns that match a layer to quantize",
                value=repr(pattern),
                code=Exit.USAGE,
                place=f"{name_of(method)}.by_layer",
                fix=nearest(pattern, covered[:8]),
            )


def read_tokens(tokens: Any, decoder: Decoder, name: str) -> Tokens:
    """Return sequences of tokens `[examples, length]` as int64.

    Raises:
        Refused: they are no such array of whole numbers, empty, shorter than 2 or longer than the model can
            read, or outside of its vocabulary.
    """
    place = f"{PLACE}.{name}"
    found = np.asarray(tokens.detach().cpu().numpy() if hasattr(tokens, "detach") else tokens)
    if found.ndim != 2 or found.dtype.kind not in "iu":
        raise Refused(
            "must be whole numbers of shape [examples, length]",
            value=f"{found.dtype} of shape {list(found.shape)}",
            place=place,
            fix="tokenize the text and cut it into sequences of one length",
        )
    examples, length = found.shape
    if examples < 1 or length < 2:
        raise Refused(
            "must have a sequence of at least 2 tokens",
            value=f"{examples} of {length} tokens",
            place=place,
            fix="give more text",
        )
    if decoder.longest is not None and length > decoder.longest:
        raise Refused(
            f"must have sequences of at most {decoder.longest} tokens, the model's max_position_embeddings",
            value=length,
            place=place,
            fix="cut the text into shorter sequences",
        )
    low, high = int(found.min()), int(found.max())
    if low < 0 or high >= decoder.vocabulary:
        raise Refused(
            f"must lie in 0..{decoder.vocabulary - 1}, the model's vocabulary",
            value=f"{low}..{high}",
            place=place,
            fix="use the model's own tokenizer",
        )
    return found.astype(np.int64)


def refuse_seen(tokens: Tokens, evaluation: Tokens) -> None:
    """Refuse sequences that judge and calibrate both.

    Raises:
        Refused: with their number.
    """
    shared = len(set(row_hashes((tokens,))) & set(row_hashes((evaluation,))))
    if shared:
        raise Refused(
            "must have no sequence that calibrates as well",
            value=f"{shared} in both",
            place=f"{PLACE}.evaluation",
            fix="evaluate on other text",
        )


def refuse_full(out: Path, decoder: Decoder, method: Rounded, states: int) -> None:
    """Refuse an output folder without room for the result.

    Args:
        out: the folder.
        decoder: what is quantized.
        method: says the bits of the codes.
        states: bytes of hidden states that are there at once.

    Raises:
        Refused: with the bytes that are needed and free.
    """
    inside = [source.name for index in range(len(decoder)) for source in decoder.tensors_of(index).values()]
    shapes = [decoder.shards.stored[name].shape for name in inside]
    codes = sum(method.weights.bits_per_value(s) * s[0] * s[1] / 8 for s in shapes if len(s) == 2)
    need, free = int(decoder.shards.bytes + codes + states), free_bytes(out)
    if free is not None and free < need:
        raise Refused(
            f"needs {need:,} bytes of room on the disk",
            value=f"{free:,} bytes free",
            place=str(out),
            fix="free some space or choose another folder",
            code=Exit.ENVIRONMENT,
        )


def digest_of(decoder: Decoder, method: Method, tokens: Tokens, evaluation: Tokens | None, seed: int) -> str:
    """Return a SHA-256 over everything that the result depends on; it reads the checkpoint once."""
    from penjing import __version__

    folder = decoder.shards.folder
    parts: list[Any] = [
        __version__,
        method_to_json(method),
        seed,
        sha256_file(folder / "config.json"),
        {file: sha256_file(folder / file) for file in decoder.shards.files},
        *(None if x is None else [list(x.shape), _digest(x)] for x in (tokens, evaluation)),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _digest(tokens: Tokens) -> str:
    return hashlib.sha256(tokens.tobytes()).hexdigest()
