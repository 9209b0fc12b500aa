"""Turn quantization-aware-trained ONNX models into real, fast, faithful INT8 models."""
