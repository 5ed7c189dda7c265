"""Codes and scales of quantized layers in safetensors files, packed, so that rounding loses nothing more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from penjing.arrays.formats.coding import Encoded, decode
from penjing.arrays.formats.packing import pack, unpack
from penjing.arrays.formats.parameters import code_type
from penjing.calibration.placing import make_quantizer
from penjing.core.errors import Refused
from penjing.core.extras import need
from penjing.core.files import read_json, verify_manifest
from penjing.core.number_format import number_format

RECORD = "quantization.json"
PACKED = "packed"
"""The folder of the packed codes, in files named as the shards."""
CHUNK = 2**20
"""Codes that are packed at a time."""
_PARTS = ("scales", "zero_points", "tensor_scale")


def write_packed_weights(path: Path, layers: Mapping[str, Encoded]) -> dict[str, dict[str, Any]]:
    """Write the codes of layers, and return what must be known to read them.

    A row of a weight `[out, in]` is packed into whole bytes, the first code in the lowest bits.

    Args:
        path: of the file.
        layers: weights by layer, NumPy arrays.

    Raises:
        Refused: as `write_file`.
    """
    import torch

    from penjing.backends.torch.decoder.shards import Part, write_shard

    parts: dict[str, Part] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name, weight in layers.items():
        arrays = {"codes": _packed(weight)}
        arrays |= {part: np.asarray(x) for part in _PARTS if (x := getattr(weight, part)) is not None}
        parts |= {f"{name}.{part}": Part.of(torch.from_numpy(x)) for part, x in arrays.items()}
        facts[name] = {"format": str(weight.format), "shape": list(weight.shape), "file": path.name}
    write_shard(path, parts)
    return facts


def _packed(weight: Encoded) -> Any:
    """Pack row by row, some at a time, since packing takes many times the memory of the codes."""
    rows = weight.codes.reshape(len(weight.codes), -1)
    step = max(1, CHUNK // rows.shape[1])
    parts = [pack(rows[start : start + step], weight.format.bits) for start in range(0, len(rows), step)]
    return np.concatenate(parts)


def read_packed_weights(folder: Path | str) -> Iterator[tuple[str, Encoded]]:
    """Yield the layers of a quantized checkpoint, as `decode` takes them.

    Raises:
        Refused: the folder is no quantized checkpoint.

    >>> for name, weight in read_packed_weights("small"):  # doctest: +SKIP
    ...     print(name, weight.format, decode(weight).shape)
    model.layers.0.self_attn.q_proj int4 group 32 (4096, 4096)
    """
    from safetensors import safe_open

    from penjing.backends.torch.tensors import to_numpy

    folder = Path(folder)
    record = read_json(folder / RECORD)
    if not isinstance(record, dict) or not isinstance(record.get("layers"), dict):
        raise Refused(
            "must name the quantized layers",
            value="none",
            place=str(folder / RECORD),
            fix="give a folder that quantize_checkpoint wrote",
        )
    for name, facts in record["layers"].items():
        format, shape = number_format(facts["format"]), tuple(facts["shape"])
        with safe_open(folder / PACKED / Path(facts["file"]).name, framework="pt") as file:
            stored = set(file.keys())
            found = {
                part: to_numpy(file.get_tensor(f"{name}.{part}"))
                for part in ("codes", *_PARTS)
                if f"{name}.{part}" in stored
            }
        columns = int(np.prod(shape[1:]))
        codes = unpack(found["codes"], format.bits, columns, signed=format.lowest < 0)
        codes = codes.astype(code_type(format, np)).reshape(shape)
        yield (
            name,
            Encoded(codes, found["scales"], found.get("zero_points"), format, found.get("tensor_scale")),
        )


def load_quantized(folder: Path | str) -> Any:
    """Return the model of a quantized checkpoint, whole and in float32, each layer with its very codes.

    Its layers compute with the values of their codes, and say so to `WeightOnly`, which exports them to ONNX
    Runtime's packed operators. It is the way there for models that fit into memory.

    Args:
        folder: that `quantize_checkpoint` made.

    Returns:
        A model of the transformers library in evaluation mode.

    Raises:
        Refused: transformers is missing; the folder is damaged, or no quantized checkpoint.

    >>> model = load_quantized("small")  # doctest: +SKIP
    """
    need("language", "load_quantized")
    verify_manifest(folder)
    import torch
    from transformers import AutoModelForCausalLM

    from penjing.backends.torch.decoder.decoder_block import replace_transposed_linear
    from penjing.backends.torch.quantizers import set_quantizers

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    replace_transposed_linear(model)
    for name, weight in read_packed_weights(folder):
        layer = model.get_submodule(name)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(decode(weight)))
        set_quantizers(layer, make_quantizer(weight.format, weight.parameters), None)
    return model
