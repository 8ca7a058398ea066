"""A Program as an ONNX model."""
