"""Fields that methods of sparsity have in common."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from penjing.arrays.sparsity.patterns import Pattern, pattern_of
from penjing.core.method import Method, Stage

Examples = Annotated[int, Field(ge=1, le=1_000_000)]
"""Training examples that a method looks at, all of them together."""

BatchSize = Annotated[int, Field(ge=1)]
"""Examples that run at once."""


class Sparse(Method):
    """What every method says that makes weights zero.

    Attributes:
        pattern: `unstructured`; `N:M`, such as `2:4`, of which N of every M weights along the input axis
            stay; or `block:RxC`, such as `block:4x1`, whose zeros come in blocks of R outputs by C columns
            of the weight seen as `[out, in * kernel]`.
        sparsity: share of zeros, between 0 and 1, both excluded; N:M brings its own.
    """

    stage: ClassVar[Stage] = Stage.WEIGHTS
    pattern: str = "unstructured"
    sparsity: float | None = Field(default=None, gt=0, lt=1)

    def __init__(self, sparsity: float | None = None, **fields: Any) -> None:
        super().__init__(**{"sparsity": sparsity, **fields})

    @field_validator("pattern")
    @classmethod
    def _known(cls, pattern: str) -> str:
        pattern_of(pattern)
        return pattern

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        self._has_a_sparsity()
        return self

    def _has_a_sparsity(self) -> None:
        own = self.zeros.sparsity
        if own is None and self.sparsity is None:
            raise ValueError("sparsity must be given; write the share of zeros, such as sparsity=0.5")
        if own is not None and self.sparsity is not None and abs(self.sparsity - own) > 1e-9:
            raise ValueError(
                f"sparsity must be {own:g}, which the pattern {self.pattern} brings, got {self.sparsity:g}; "
                "leave sparsity out, or choose another pattern"
            )
        if own is not None:
            object.__setattr__(self, "sparsity", own)

    @property
    def zeros(self) -> Pattern:
        """The pattern as data."""
        return pattern_of(self.pattern)

    @property
    def uniform(self) -> bool:
        """Whether every layer gets the same share of zeros, so that one that has it already is done."""
        return True

    @property
    def share(self) -> float:
        """The share of zeros."""
        assert self.sparsity is not None
        return self.sparsity


class Corrected(Sparse):
    """What methods say that zero the weights of one layer after the other and correct those that stay.

    Attributes:
        examples: training examples that the inputs of layers are taken from, at least 1.
        batch_size: examples that run at once, at least 1.
        sequential: each layer sees the inputs that the layers pruned before it give; else those of the dense
            model, in one pass.
        compensate: aim at the outputs that each layer had in the dense model on its dense inputs, so that
            errors of the layers before it are made up for; else at its own outputs on the inputs that it
            has. Needs `sequential`.
        allocation: `uniform`: the same share of zeros in every layer; `global`: shares by the error that each
            level of sparsity causes, relative to the layer's outputs, for the least sum over layers. N:M
            leaves nothing to allocate.
    """

    examples: Examples = 512
    batch_size: BatchSize = 64
    sequential: bool = True
    compensate: bool = False
    allocation: Literal["uniform", "global"] = "uniform"

    @property
    def uniform(self) -> bool:
        """Whether every layer gets the same share of zeros."""
        return self.allocation == "uniform"

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        self._has_a_sparsity()
        refuse_compensation_out_of_order(self.compensate, self.sequential)
        return self


def refuse_compensation_out_of_order(compensate: bool, sequential: bool) -> None:
    """Refuse to make up for layers before where each layer sees the dense model's inputs.

    Raises:
        ValueError: `compensate` without `sequential`.
    """
    if compensate and not sequential:
        raise ValueError(
            "compensate needs sequential=True, since errors of the layers before are known only then; "
            "write compensate=False, or leave sequential as it is"
        )
