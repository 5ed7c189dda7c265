"""Remove attention heads and feed-forward neurons of a transformer without training."""

from penjing.prune.transformer.handler import prune_transformer
from penjing.prune.transformer.method import PruneTransformer

__all__ = ["PruneTransformer", "prune_transformer"]
