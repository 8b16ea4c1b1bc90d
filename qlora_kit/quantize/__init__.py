"""Post-training quantization: calibration data, methods, and the straight line of `quantize`."""
