"""One description of a number format: what values a tensor may take, and which values share a scale."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, model_serializer, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler

from penjing.core.config import refusal
from penjing.core.errors import Exit, Refused, nearest
from penjing.core.value import Value

Kind = Literal[
    "integer", "fp8_e4m3", "fp8_e5m2", "nf4", "mxfp4", "mxfp8", "mxfp8_e5m2", "nvfp4", "ternary", "binary"
]
Granularity = Literal["tensor", "channel", "group", "token"]

KINDS: tuple[Kind, ...] = get_args(Kind)
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)

_BITS = {
    "fp8_e4m3": 8,
    "fp8_e5m2": 8,
    "nf4": 4,
    "mxfp4": 4,
    "mxfp8": 8,
    "mxfp8_e5m2": 8,
    "nvfp4": 4,
    "ternary": 2,
    "binary": 1,
}
_BLOCKS = {"mxfp4": 32, "mxfp8": 32, "mxfp8_e5m2": 32, "nvfp4": 16}
_DEFAULT_GROUPS = {**_BLOCKS, "nf4": 64}
_INTEGER = re.compile(r"(u?)int([1-9]\d?)")
_FLAGS = ("symmetric", "asymmetric", "narrow")
_EXAMPLE = "write for example int8, 'int4 group 32' or 'uint8 token'"


class NumberFormat(Value):
    """A number format: a value is `(code - zero_point) * scale`, or for tables `table[code] * scale`.

    A short name says the same and is what `str` gives: `NumberFormat.model_validate("int4 group 32")`, or
    `number_format("int4 group 32")`; fields of methods and saved plans take and hold that name.

    Attributes:
        kind: `integer`; `fp8_e4m3` (no infinity, largest 448) and `fp8_e5m2`, the 8-bit floats of
            Micikevicius et al. 2022, "FP8 formats for deep learning"; `nf4`, the 16 values of Dettmers et al.
            2023, "QLoRA", appendix E; `mxfp4`, `mxfp8` (E4M3) and `mxfp8_e5m2` of the OCP Microscaling
            Formats Specification 1.0 (groups of 32 under a scale that is a power of two); `nvfp4` (4-bit
            floats E2M1 in groups of 16 under scales in E4M3, under one float32 scale for the tensor);
            `ternary` {-1, 0, 1}; `binary` {-1, 1}.
        bits: of a stored code; 2 to 16 for integers, fixed for the others (2 for ternary).
        signed: integers from `-2**(bits - 1)`, else from 0.
        symmetric: the zero point is 0 and not stored; integers only, others always are.
        narrow: leave out the lowest code of a signed integer, so that negating a code is possible.
        granularity: which values share a scale: the whole tensor; a channel, axis 0 of `[out, in, *kernel]`;
            a group of `group` neighbours in a row of `[out, in * kernel]`, the last one of a row may be
            shorter; a token, the last axis of `[..., width]`.
        group: length of a group; 0 for other granularities.

    Raises:
        Refused: a field out of its range, or fields that do not go together.

    >>> number_format("int4 group 32")
    number_format('int4 group 32')
    >>> str(NumberFormat(kind="nf4")), str(NumberFormat(signed=False, symmetric=False))
    ('nf4', 'uint8')
    """

    kind: Kind = "integer"
    bits: int = Field(default=8, ge=1, le=16)
    signed: bool = True
    symmetric: bool = True
    narrow: bool = False
    granularity: Granularity = "tensor"
    group: int = Field(default=0, ge=0, le=2**20)

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, data: Any, build: ModelWrapValidatorHandler[NumberFormat]) -> NumberFormat:
        """Take a name or fields, fill in what the kind fixes, and refuse what does not go together."""
        if isinstance(data, str):
            data = _fields_of(data)
        if isinstance(data, dict):
            data = _completed(data)
        try:
            found = build(data)
        except ValidationError as error:
            raise refusal(error, "NumberFormat", cls) from None
        for rule, holds in _rules(found):
            if not holds:
                fields = ", ".join(f"{name}={value!r}" for name, value in found.__repr_args__())
                raise Refused(rule, value=fields, place="NumberFormat", fix=_EXAMPLE, code=Exit.USAGE)
        return found

    @model_serializer
    def _write(self) -> str:
        return str(self)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        """Describe what is saved: the name."""
        return {"type": "string", "title": "NumberFormat", "examples": ["int8 channel", "int4 group 32"]}

    def __repr__(self) -> str:
        return f"number_format({str(self)!r})"

    def __str__(self) -> str:
        words: list[str] = [self.kind]
        if self.kind == "integer":
            words = [f"{'' if self.signed else 'u'}int{self.bits}"]
            if self.symmetric != self.signed:
                words.append("symmetric" if self.symmetric else "asymmetric")
            words += ["narrow"] * self.narrow
        if self.group != _DEFAULT_GROUPS.get(self.kind, 0):
            words.append(f"group {self.group}" if self.group else self.granularity)
        elif not self.group and self.granularity != "tensor":
            words.append(self.granularity)
        return " ".join(words)

    @property
    def lowest(self) -> int:
        """Smallest code: of integers and ternary as a signed number, 0 for tables and binary."""
        if self.kind == "ternary":
            return -1
        return int(self.narrow) - (1 << (self.bits - 1)) if self.kind == "integer" and self.signed else 0

    @property
    def highest(self) -> int:
        """Largest code."""
        if self.kind == "ternary":
            return 1
        return (1 << (self.bits - (self.kind == "integer" and self.signed))) - 1

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a tensor's scales: `()`, `[out]`, `[out, groups]` or all axes but the last.

        Raises:
            Refused: the tensor is empty or has too few axes.
        """
        axes = {"tensor": 0, "channel": 1, "group": 2, "token": 1}[self.granularity]
        if len(shape) < axes or 0 in shape:
            raise Refused(
                f"a tensor with a scale for each {self.granularity} must have {axes} axes and values",
                value=f"shape {tuple(shape)}",
                place=str(self),
                fix="reshape it, or choose another granularity",
            )
        if self.granularity == "channel":
            return (shape[0],)
        if self.granularity == "group":
            return (shape[0], -(-math.prod(shape[1:]) // self.group))
        return tuple(shape[:-1]) if self.granularity == "token" else ()

    def bits_per_value(self, shape: Sequence[int]) -> float:
        """Return stored bits for each value of a tensor: codes, scales, and zero points where there are any.

        Scales take 32 bits, in mx formats and nvfp4 8 (nvfp4 has one more of 32 for the tensor); zero points
        as many as codes. Without the bits that fill up the last byte or a shorter last group.

        >>> number_format("int4 group 32").bits_per_value((64, 64))
        5.0
        """
        count, scales = math.prod(shape), math.prod(self.scale_shape(shape))
        each = 8 if self.kind in _BLOCKS else 32
        extra = 32 if self.kind == "nvfp4" else 0
        return self.bits + (scales * (each + (0 if self.symmetric else self.bits)) + extra) / count


def number_format(name: str) -> NumberFormat:
    """Return the format of a short name.

    A name is `int2` to `int16` (symmetric), `uint2` to `uint16` (asymmetric) or another kind, then any of
    `symmetric`, `asymmetric`, `narrow`, then `tensor`, `channel`, `group N` or `token`. Without the last:
    one scale for the tensor; groups of 64 for nf4, and what the specification says for mx formats and nvfp4.

    Raises:
        Refused: a word is unknown, or words do not go together.

    >>> number_format("int8 narrow channel").lowest, number_format("uint8").highest
    (-127, 255)
    """
    return NumberFormat.model_validate(name)


def _fields_of(name: str) -> dict[str, Any]:
    words = name.lower().split()
    fields: dict[str, Any] = {}
    found = _INTEGER.fullmatch(words[0]) if words else None
    if found is not None:
        fields |= {"kind": "integer", "bits": int(found[2]), "signed": not found[1]}
    elif words and words[0] in KINDS and words[0] != "integer":
        fields["kind"] = words[0]
    else:
        raise Refused(
            "must be known",
            value=repr(name),
            place="number format",
            code=Exit.USAGE,
            fix=nearest(words[0] if words else "", ["int8", "uint8", *KINDS[1:]]),
        )
    rest = words[1:]
    while rest:
        word = rest.pop(0)
        new: dict[str, Any]
        if word == "group" and rest and rest[0].isdecimal():
            new = {"granularity": "group", "group": int(rest.pop(0))}
        elif word in ("symmetric", "asymmetric"):
            new = {"symmetric": word == "symmetric"}
        elif word == "narrow":
            new = {"narrow": True}
        elif word in GRANULARITIES and word != "group":
            new = {"granularity": word}
        else:
            known = [*_FLAGS, "tensor", "channel", "group 32", "token"]
            raise Refused(
                "the words of a number format must be known",
                value=repr(word),
                code=Exit.USAGE,
                place=f"number format {name!r}",
                fix=nearest(word, known),
            )
        if new.keys() & fields.keys():
            raise Refused(
                "must say each thing once",
                value=repr(word),
                code=Exit.USAGE,
                place=f"number format {name!r}",
                fix=_EXAMPLE,
            )
        fields |= new
    return fields


def _completed(data: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with what the kind implies where nothing else was said."""
    kind = data.get("kind", "integer")
    full = dict(data)
    if isinstance(kind, str) and kind in _BITS:
        full.setdefault("bits", _BITS[kind])
    elif isinstance(data.get("signed"), bool):
        full.setdefault("symmetric", data["signed"])
    if "granularity" not in data and "group" not in data and kind in _DEFAULT_GROUPS:
        full["group"] = _DEFAULT_GROUPS[kind]
    if full.get("group") and "granularity" not in data:
        full["granularity"] = "group"
    return full


def _rules(f: NumberFormat) -> list[tuple[str, bool]]:
    """Return every rule on fields together, and whether it holds."""
    integer, block = f.kind == "integer", _BLOCKS.get(f.kind)
    return [
        ("an integer must have 2 to 16 bits", not integer or f.bits >= 2),
        (f"{f.kind} must have {_BITS.get(f.kind)} bits", integer or f.bits == _BITS[f.kind]),
        (f"{f.kind} must be signed: only integers can be unsigned", integer or f.signed),
        (f"{f.kind} must be symmetric: only integers can be asymmetric", integer or f.symmetric),
        ("narrow needs a signed integer", not f.narrow or (integer and f.signed)),
        ("a group must have at least 2 values", f.granularity != "group" or f.group >= 2),
        ("a group length needs the granularity group", f.granularity == "group" or f.group == 0),
        (f"{f.kind} must have groups of {block}", block is None or f.group == block),
    ]
