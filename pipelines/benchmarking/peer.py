"""The peer: onnxruntime's own post-training quantization of the float twin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from qat2int8.pipelines.benchmarking.sketch import Array


class Samples(CalibrationDataReader):  # type: ignore[misc]  # the base class is untyped
    """One sample of the input called ``name`` at a time."""

    def __init__(self, name: str, batch: Array) -> None:
        self._name, self._left = name, iter(np.split(batch, len(batch)))

    def get_next(self) -> dict[str, Array] | None:
        sample = next(self._left, None)
        return None if sample is None else {self._name: sample}


def quantize(source: Path, target: Path, calibration: Array) -> None:
    """uint8 activations, int8 weights per channel, Q/DQ format: its fastest setting on x86."""
    quantize_static(
        source,
        target,
        Samples(onnx.load(source).graph.input[0].name, calibration),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
