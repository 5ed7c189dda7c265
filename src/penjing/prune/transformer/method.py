"""The configuration of transformer pruning."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from penjing.core.method import Method, Stage
from penjing.core.target import Target

LEAST_EXAMPLES = 32


class PruneTransformer(Method):
    """Remove the attention heads and feed-forward neurons that matter least, without training.

    Units are judged layer by layer; then widths are chosen for all layers at once, so that the least is lost
    at the cost asked for (Kwon et al. 2022, "A fast post-training pruning framework for transformers").
    Nothing is trained; follow it with `LeastSquares`.

    Attributes:
        criterion: `masks`: each unit gets a mask, whose Fisher information tells what the loss gains without
            the unit; which units go is settled within each layer, as a set (Kwon et al.). `refit`: units go
            one after the other by what the loss gains once the layers behind are refitted by least squares,
            with curvature factored by Kronecker (Kurtic et al. 2023, "ZipLM"; Martens & Grosse 2015); takes
            8 (inputs**2 + outputs**2) bytes for every layer behind.
        ratio: share of the cost that is removed, between 0 and 1, both excluded.
        of: the cost: `multiply_adds` or `parameters` of the whole model, or its `latency` measured on the
            target.
        labels: whether the loss of masks is that of the data's labels; False: that of labels drawn from what
            the model itself predicts (for another loss than `cross_entropy`, of random directions of its
            output), as it always is for `refit`.
        examples: of the training data that gradients are taken of, at least 32.
        size: examples in one backward pass.
        round_to: neurons stay in multiples of this; a narrower layer stays whole.
        rearrange: whether sets are settled by the whole Fisher matrix of the masks of each layer; False: by
            its diagonal. Of the criterion `masks` only.
        target: where `latency` is measured.
    """

    stage: ClassVar[Stage] = Stage.STRUCTURE
    ratio: float = Field(gt=0, lt=1)
    criterion: Literal["masks", "refit"] = "refit"
    of: Literal["multiply_adds", "parameters", "latency"] = "multiply_adds"
    labels: bool = True
    examples: int = Field(default=512, ge=LEAST_EXAMPLES, le=1_000_000)
    size: int = Field(default=32, ge=1)
    round_to: int = Field(default=16, ge=1, le=1024)
    rearrange: bool = True
    target: Target = Field(default_factory=Target)

    def __init__(self, ratio: float, **fields: Any) -> None:
        super().__init__(**{"ratio": ratio, **fields})
