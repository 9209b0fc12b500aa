"""Turn quantization-aware-trained ONNX models into real, fast, faithful INT8 models.

>>> import qat2int8
>>> conversion = qat2int8.convert("model_qat.onnx")
>>> conversion.save("model_int8.onnx")
>>> conversion.certificate.integer_macs_percent
100.0
"""

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
from qat2int8.pipelines.certificate import Certificate
from qat2int8.pipelines.convert import Conversion, convert
from qat2int8.pipelines.fidelity import Fidelity
from qat2int8.pipelines.version import VERSION as __version__

__all__ = [
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
    "convert",
    "load_model",
    "save_model",
]
