"""Fields that methods of quantization have in common."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from penjing.core.errors import Refused
from penjing.core.method import Method, Stage
from penjing.core.number_format import NumberFormat, number_format


class Rounded(Method):
    """What every method says that puts layers on number formats.

    Attributes:
        weights: format of the weights of convolutions and linear layers; one scale for each output channel
            where the format does not say otherwise.
        inputs: format of what these layers take; None: float.
        ends: whether the first and the last layer, in which errors cost most, keep at least 8 bits.
        observer: how the range of inputs is chosen: smallest and largest value, 99.99% of the values, or
            least squared error.
        calibration: training examples that ranges are taken from, at least 1.
        skip: patterns (shell wildcards) of layers that stay float.
    """

    stage: ClassVar[Stage] = Stage.PRECISION
    weights: NumberFormat = number_format("int8 channel")
    inputs: NumberFormat | None = number_format("uint8")
    ends: bool = True
    observer: Literal["minmax", "percentile", "mse"] = "mse"
    calibration: int = Field(default=256, ge=1, le=1_000_000)
    skip: tuple[str, ...] = ()

    def __init__(
        self, weights: NumberFormat | str = "int8 channel", inputs: NumberFormat | str | None = "uint8",
        **fields: Any,
    ) -> None:  # fmt: skip
        super().__init__(**{"weights": weights, "inputs": inputs, **fields})

    @field_validator("weights", "inputs", mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> NumberFormat | None:
        if value is None and info.field_name == "inputs":
            return None
        try:
            return NumberFormat.model_validate(value)
        except Refused as error:
            place = f"{cls.__name__}.{info.field_name}"
            raise Refused(
                error.rule, value=error.value, place=place, fix=error.fix, code=error.code
            ) from None

    @field_validator("weights")
    @classmethod
    def _by_channel(cls, weights: NumberFormat) -> NumberFormat:
        if weights.granularity == "token":
            raise ValueError("the scales of weights are for the tensor, channels or groups")
        if weights.granularity == "tensor":
            return weights.model_copy(update={"granularity": "channel"})
        return weights

    @field_validator("inputs")
    @classmethod
    def _one_scale(cls, inputs: NumberFormat | None) -> NumberFormat | None:
        if inputs is not None and inputs.granularity not in ("tensor", "token"):
            raise ValueError("the scales of inputs are for the tensor or tokens")
        return inputs


class RoundedWeights(Rounded):
    """What methods say that are made for weights alone, of language models above all.

    Attributes:
        weights: 4-bit integers in groups of 32 inputs by default.
        inputs: float by default.
    """

    weights: NumberFormat = number_format("int4 group 32")
    inputs: NumberFormat | None = None

    def __init__(
        self, weights: NumberFormat | str = "int4 group 32", inputs: NumberFormat | str | None = None,
        **fields: Any,
    ) -> None:  # fmt: skip
        super().__init__(weights, inputs, **fields)
