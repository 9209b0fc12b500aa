"""The peers: onnxruntime's own post-training quantization of the float twin, and OpenVINO on the QAT export."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from qat2int8.pipelines.benchmarking.child import Cost, measured_command
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


_COMMAND = """
import sys
from pathlib import Path
import numpy as np
from qat2int8.pipelines.benchmarking import peer
peer.quantize(Path(sys.argv[1]), Path(sys.argv[2]), np.load(sys.argv[3]))
"""


def cost_of(calibration: Array, source: Path, target: Path) -> Cost:
    """What :func:`quantize` costs in a process of its own.

    Raises:
        CommandFailed: onnxruntime could not do it.
    """
    samples = target.with_suffix(".npy")
    np.save(samples, calibration)
    return measured_command([sys.executable, "-c", _COMMAND, str(source), str(target), str(samples)])


def openvino_caller(path: Path, sample: Array) -> Callable[[], object]:
    """A call that runs the model at ``path`` once in OpenVINO: one thread, floats as floats. It ran once.

    Raises:
        ImportError: OpenVINO is not installed.
        RuntimeError: it does not take the model.
    """
    import openvino

    hints = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(str(path), "CPU", hints)
    model([sample])
    return lambda: model([sample])
