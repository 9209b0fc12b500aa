"""Accuracy and speed of models on data: metrics, interleaved timing, layer by layer comparison."""
