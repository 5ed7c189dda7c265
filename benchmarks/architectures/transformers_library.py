"""How models of the transformers library are made: a configuration class, sizes, a model class."""

from collections.abc import Callable
from typing import Any

from torch import nn

from architectures.registry import seeded


def from_library(config: str, model: str, /, **sizes: Any) -> Callable[[], nn.Module]:
    """Return a builder of a model with random weights; the library is imported when it is called.

    Args:
        config: name of the configuration's class.
        model: name of the model's class.
        sizes: fields of the configuration.
    """

    def build() -> nn.Module:
        import transformers

        transformers.logging.set_verbosity_error()
        return getattr(transformers, model)(getattr(transformers, config)(**sizes))

    return seeded(build)
