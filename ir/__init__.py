"""The intermediate representation: what a graph, a grid, a target and a diagnostic are."""

from qat2int8.ir.analysis import dataflow, find_cycle, integer_islands
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
from qat2int8.ir.io import check_output_path, load_model, save_model
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
from qat2int8.ir.scale_table import ScaleTable, TrainedTensor
from qat2int8.ir.target import Contract, Format, OpRule, Target
from qat2int8.ir.text import text_diff, to_text
from qat2int8.ir.verify import VerifyLevel, verify

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
    "Format",
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
    "TrainedTensor",
    "UnsupportedModel",
    "VerifyLevel",
    "check_output_path",
    "dataflow",
    "find_cycle",
    "integer_islands",
    "load_model",
    "save_model",
    "text_diff",
    "to_text",
    "verify",
]
