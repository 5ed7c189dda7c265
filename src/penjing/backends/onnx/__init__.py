"""The ONNX backend, on onnx and ONNX Runtime."""

from penjing.backends.onnx.backend import BACKEND
from penjing.backends.onnx.model import OnnxModel, load_onnx

__all__ = ["BACKEND", "OnnxModel", "load_onnx"]
