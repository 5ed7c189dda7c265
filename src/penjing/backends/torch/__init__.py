"""PyTorch: graphs from torch.export, cuts on the user's own module."""

from penjing.backends.torch.backend import TorchBackend
from penjing.backends.torch.tensors import Selected, select_output

__all__ = ["BACKEND", "Selected", "TorchBackend", "select_output"]

BACKEND = TorchBackend()
