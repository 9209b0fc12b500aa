"""Turn quantization-aware-trained ONNX models into real, fast, faithful INT8 models.

>>> import qat2int8
>>> conversion = qat2int8.convert("model_qat.onnx")
>>> conversion.save("model_int8.onnx")
>>> conversion.certificate.integer_macs_percent
100.0
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qat2int8.ir import (
        DataError,
        Diagnostic,
        InvalidModel,
        Model,
        OutputError,
        PassFailed,
        PipelineError,
        Qat2Int8Error,
        QuantParams,
        ScaleTable,
        Target,
        UnsupportedModel,
    )
    from qat2int8.ir.io import load_model, save_model
    from qat2int8.pipelines.calibration.calibrator import Calibrator, calibrate
    from qat2int8.pipelines.certificate import Certificate
    from qat2int8.pipelines.convert import Conversion, convert
    from qat2int8.pipelines.fidelity import Fidelity
    from qat2int8.pipelines.quantize import quantize
    from qat2int8.pipelines.tables.table import CalibrationTable
    from qat2int8.pipelines.version import VERSION as __version__

_HOMES = {
    "qat2int8.ir.io": ("load_model", "save_model"),
    "qat2int8.pipelines.calibration.calibrator": ("Calibrator", "calibrate"),
    "qat2int8.pipelines.certificate": ("Certificate",),
    "qat2int8.pipelines.convert": ("Conversion", "convert"),
    "qat2int8.pipelines.fidelity": ("Fidelity",),
    "qat2int8.pipelines.quantize": ("quantize",),
    "qat2int8.pipelines.tables.table": ("CalibrationTable",),
}

__all__ = [
    "CalibrationTable",
    "Calibrator",
    "Certificate",
    "Conversion",
    "DataError",
    "Diagnostic",
    "Fidelity",
    "InvalidModel",
    "Model",
    "OutputError",
    "PassFailed",
    "PipelineError",
    "Qat2Int8Error",
    "QuantParams",
    "ScaleTable",
    "Target",
    "UnsupportedModel",
    "__version__",
    "calibrate",
    "convert",
    "load_model",
    "quantize",
    "save_model",
]


def __getattr__(name: str) -> Any:
    # Names are resolved when they are used: importing onnx and onnxruntime takes most of a second, which
    # 'qat2int8 --help' has no use for.
    if name == "__version__":
        return import_module("qat2int8.pipelines.version").VERSION
    if name not in __all__:
        raise AttributeError(f"module 'qat2int8' has no attribute '{name}'")
    home = next((module for module, names in _HOMES.items() if name in names), "qat2int8.ir")
    return getattr(import_module(home), name)
