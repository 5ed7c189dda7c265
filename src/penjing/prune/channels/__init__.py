"""Remove whole channels and heads, so that the network truly shrinks."""

from penjing.prune.channels.handler import prune_channels
from penjing.prune.channels.method import PruneChannels

__all__ = ["PruneChannels", "prune_channels"]
