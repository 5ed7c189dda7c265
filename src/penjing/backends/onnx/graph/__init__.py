"""An ONNX graph as something to read and edit."""
