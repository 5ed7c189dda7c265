"""Fields that methods of quantization have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from penjing.arrays.observers.observer import ObserverKind
from penjing.calibration.settings import BatchSize, Examples
from penjing.core.config import refusal
from penjing.core.errors import Refused
from penjing.core.method import Method, Stage
from penjing.core.number_format import NumberFormat, number_format
from penjing.core.value import Value

Option = tuple[NumberFormat, NumberFormat | None]
"""Formats of a layer's weights and of its input; None: that which the method has for inputs."""

_OWN: Any = object()
"""In the place of a format that is not given: the default of the class."""


class MixedBits(Value):
    """Formats of weights chosen for each layer: least expected loss within a size.

    What rounding a layer costs is the second derivative of the loss along the change of the layer's output
    (`backends/torch/curvature/rounding_loss.py`, after Zandonati et al. 2022, "FIT", and NVIDIA ModelOpt's
    AutoQuantize, which take it as diagonal); the choice is an exact knapsack (as in Yao et al. 2021,
    "HAWQ-V3").

    Attributes:
        bits: mean of the stored bits for each weight over all layers that are rounded, scales included, in
            (0, 32]; a share of the float32 size times 32.
        options: formats to choose from, at least two; or pairs of formats of weights and of the layer's
            input, for example `("int4 channel", "uint4")`.
        examples: training examples that losses are taken on, at least 32; labels are not used.

    Raises:
        Refused: a field is unknown or out of its range.

    >>> MixedBits(4.5, options=["int3 channel", "int8 channel"]).bits
    4.5
    """

    bits: float = Field(gt=0, le=32)
    options: tuple[Option, ...] = tuple((number_format(f"int{bits} channel"), None) for bits in (2, 3, 4, 8))
    examples: int = Field(default=512, ge=32, le=1_000_000)

    def __init__(self, bits: float, **fields: Any) -> None:
        try:
            super().__init__(**{"bits": bits, **fields})
        except ValidationError as error:
            raise refusal(error, "MixedBits", type(self)) from None

    @field_validator("options", mode="before")
    @classmethod
    def _read(cls, value: Any) -> tuple[Option, ...]:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ValueError('must be a list of number formats; write ["int4 channel", "int8 channel"]')
        found = tuple(_option(entry, "MixedBits.options") for entry in value)
        if len(set(found)) < max(len(found), 2):
            raise ValueError("must be at least two formats, each once; add another, or use weights=")
        return found


class Rounded(Method):
    """What every method says that puts layers on number formats.

    Attributes:
        weights: format of the weights of convolutions and linear layers; one scale for each output channel
            where the format does not say otherwise.
        inputs: format of what these layers take; None: float.
        ends: whether the first and the last layer, in which errors cost most, keep at least 8 bits.
        observer: how the range of inputs is chosen: smallest and largest value, their moving average over
            batches, 99.99% of the values, least squared error, or least relative entropy of the histogram.
        examples: training examples that are looked at, at least 1.
        batch_size: examples that run at once, at least 1.
        by_layer: formats of some layers, as pairs of a pattern and what `MixedBits.options` takes, of which
            the first that matches counts; a mapping is taken too. They hold for ends as they are.
        mixed: choose the formats of weights for each layer that `by_layer` does not name, in place of
            `weights`; None: `weights` for all.
    """

    stage: ClassVar[Stage] = Stage.PRECISION
    weights: NumberFormat = number_format("int8 channel")
    inputs: NumberFormat | None = number_format("uint8")
    ends: bool = True
    observer: ObserverKind = "mse"
    examples: Examples = 256
    batch_size: BatchSize = 32
    by_layer: tuple[tuple[str, Option], ...] = ()
    mixed: MixedBits | None = None

    def __init__(
        self,
        weights: NumberFormat | str = _OWN,
        inputs: NumberFormat | str | None = _OWN,
        **fields: Any,
    ) -> None:
        formats = {"weights": weights, "inputs": inputs}
        super().__init__(**{name: given for name, given in formats.items() if given is not _OWN}, **fields)

    @field_validator("weights", "inputs", mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> NumberFormat | None:
        if value is None and info.field_name == "inputs":
            return None
        return read_format(value, f"{cls.__name__}.{info.field_name}")

    @field_validator("weights")
    @classmethod
    def _by_channel(cls, weights: NumberFormat) -> NumberFormat:
        return _for_weights(weights)

    @field_validator("inputs")
    @classmethod
    def _one_scale(cls, inputs: NumberFormat | None) -> NumberFormat | None:
        return _for_inputs(inputs)

    @field_validator("by_layer", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        place = f"{cls.__name__}.by_layer"
        pairs = list(value.items()) if isinstance(value, Mapping) else value
        if not isinstance(pairs, list | tuple) or not all(
            isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs
        ):
            raise ValueError('must be pairs of a pattern and a format; write {"head": "int8 channel"}')
        return tuple((pattern, _option(entry, place)) for pattern, entry in pairs)

    @field_validator("mixed", mode="before")
    @classmethod
    def _mix(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        if "bits" not in value:
            raise ValueError("needs the number of bits; write for example {'bits': 4.5}")
        try:
            return MixedBits(**value)
        except Refused as error:
            raise error.at(f"{cls.__name__}.mixed, {error.place}") from None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.mixed is not None and self.weights != type(self).model_fields["weights"].default:
            raise ValueError(
                "weights and mixed cannot both be given, since mixed bits choose the formats of weights; "
                "leave one of them out"
            )
        return self


def read_format(value: Any, place: str) -> NumberFormat:
    """Return a number format from its name or its fields.

    Raises:
        Refused: it is none; at the place given.
    """
    try:
        return NumberFormat.model_validate(value)
    except Refused as error:
        raise error.at(place) from None


def _option(entry: Any, place: str) -> Option:
    """Read an option: a format of weights, or a pair with that of the input."""
    weights, inputs = entry if isinstance(entry, list | tuple) and len(entry) == 2 else (entry, None)
    first = read_format(weights, place)
    return _for_weights(first), _for_inputs(None if inputs is None else read_format(inputs, place))


def _for_weights(weights: NumberFormat) -> NumberFormat:
    if weights.granularity == "token":
        raise ValueError("must have scales for the tensor, channels or groups; write int8 channel")
    if weights.granularity == "tensor":
        return weights.model_copy(update={"granularity": "channel"})
    return weights


def _for_inputs(inputs: NumberFormat | None) -> NumberFormat | None:
    if inputs is not None and inputs.granularity not in ("tensor", "token"):
        raise ValueError("must have one scale, or one for each token; write uint8 or int8 token")
    return inputs
