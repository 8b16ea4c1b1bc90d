"""`onnx`, `onnx:int8-dynamic` and `onnx:int8-static`: a graph for ONNX Runtime."""
