"""The NumPy backend: small networks as data, slow and readable; the oracle of the tests."""

from penjing.backends.numpy.backend import BACKEND
from penjing.backends.numpy.net import Node, NumpyNet

__all__ = ["BACKEND", "Node", "NumpyNet"]
