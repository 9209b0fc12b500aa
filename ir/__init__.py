"""The intermediate representation: what a graph, a grid, a target and a diagnostic are."""

from qat2int8.ir.diagnostic import Code, Diagnostic, Severity
from qat2int8.ir.errors import (
    DataError,
    InvalidModel,
    OutputError,
    PassFailed,
    PipelineError,
    Qat2Int8Error,
    UnsupportedModel,
)
from qat2int8.ir.fact import Fact
from qat2int8.ir.interval import UNBOUNDED, Interval
from qat2int8.ir.model import ChannelMoments, Model
from qat2int8.ir.quant import (
    INT8,
    INT16,
    INT32,
    UINT8,
    UINT16,
    FloatArray,
    IntArray,
    Provenance,
    QuantDType,
    QuantParams,
)
from qat2int8.ir.scale_table import ScaleTable
from qat2int8.ir.target import Contract, OpRule, Target

__all__ = [
    "INT8",
    "INT16",
    "INT32",
    "UINT8",
    "UINT16",
    "UNBOUNDED",
    "ChannelMoments",
    "Code",
    "Contract",
    "DataError",
    "Diagnostic",
    "Fact",
    "FloatArray",
    "IntArray",
    "Interval",
    "InvalidModel",
    "Model",
    "OpRule",
    "OutputError",
    "PassFailed",
    "PipelineError",
    "Provenance",
    "Qat2Int8Error",
    "QuantDType",
    "QuantParams",
    "ScaleTable",
    "Severity",
    "Target",
    "UnsupportedModel",
]
