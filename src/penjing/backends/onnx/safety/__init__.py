"""What is checked of an ONNX file that nobody vouches for, before a runtime sees it."""
