"""The certificate: what the runtime really executes in integers, read from the graph it executes."""

from __future__ import annotations

import contextlib
import math
import re
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as oir

from qat2int8.ir import Model
from qat2int8.ir.verify import weightless
from qat2int8.pipelines.sessions import ModelFile, session

__all__ = ["Certificate", "NodeRecord", "certify"]

INTEGER_KERNELS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QAttention",
        "QGemm",
        "QLinearAdd",
        "QLinearAveragePool",
        "QLinearConcat",
        "QLinearConv",
        "QLinearGlobalAveragePool",
        "QLinearLeakyRelu",
        "QLinearMatMul",
        "QLinearMul",
        "QLinearSigmoid",
        "QLinearSoftmax",
        "QLinearWhere",
    }
)
"""Op types of onnxruntime's CPU provider that compute on 8-bit integers."""

_COMPUTE = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_BOUNDARY = frozenset({"QuantizeLinear", "DequantizeLinear"})
_LAYOUT = frozenset({"Transpose", "ReorderInput", "ReorderOutput", "Identity", "Cast"})
_ENDS_IN_FLOAT = frozenset({"ConvInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"})
_TOKEN = re.compile(r"_token_\d+$")
"""The suffix onnxruntime adds to a node it replaces during layout optimisation."""


@dataclass(frozen=True)
class NodeRecord:
    """One Conv, ConvTranspose, Gemm or MatMul of the converted model."""

    node: str
    op_type: str
    macs: int
    """Multiply-accumulates for one sample; unknown dimensions count as 1."""
    integer: bool


@dataclass(frozen=True)
class Certificate:
    """What runs in integers.

    Attributes:
        compute: every node that multiplies and accumulates.
        executed: op types of the executed graph with counts, Q/DQ and layout changes included.
        integer_nodes, float_nodes: executed nodes that work on integers and on floats, Q/DQ and layout left out.
        runtime: the runtime and version that was asked.
    """

    compute: tuple[NodeRecord, ...]
    executed: dict[str, int]
    integer_nodes: int
    float_nodes: int
    runtime: str

    @cached_property
    def macs(self) -> int:
        """All multiply-accumulates of one sample."""
        return sum(record.macs for record in self.compute)

    @property
    def integer_macs_percent(self) -> float:
        """Share of multiply-accumulates in integer kernels, 0..100; 100 when there are none at all."""
        integer = sum(record.macs for record in self.compute if record.integer)
        return 100.0 * integer / self.macs if self.macs else 100.0

    @property
    def integer_nodes_percent(self) -> float:
        """Share of executed nodes that work on integers, 0..100."""
        total = self.integer_nodes + self.float_nodes
        return 100.0 * self.integer_nodes / total if total else 100.0

    @property
    def float_compute(self) -> tuple[NodeRecord, ...]:
        """The compute nodes that run in float."""
        return tuple(record for record in self.compute if not record.integer)

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "runtime": self.runtime,
            "integer_macs_percent": self.integer_macs_percent,
            "integer_nodes_percent": self.integer_nodes_percent,
            "integer_nodes": self.integer_nodes,
            "float_nodes": self.float_nodes,
            "macs": self.macs,
            "executed": self.executed,
            "compute": [asdict(record) for record in self.compute],
        }


def certify(model: Model, file: ModelFile) -> Certificate:
    """Ask onnxruntime how it executes ``model``.

    Args:
        model: the converted model, for names and shapes.
        file: the same model, serialised.

    Raises:
        UnsupportedModel: onnxruntime refuses the model.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "executed.onnx"
        session(file, optimized=path)
        executed = onnx.load(path, load_external_data=False)
    integer_names, counts, integer, floating = _read_executed(executed.graph)
    records = tuple(
        NodeRecord(node.name or "", node.op_type, macs, _runs_in_integers(node, integer_names))
        for node, macs in _macs_of(model)
    )
    import onnxruntime as ort

    return Certificate(records, counts, integer, floating, f"onnxruntime {ort.__version__} CPU")


def _runs_in_integers(node: oir.Node, integer_names: set[str]) -> bool:
    """By node name, or by the tensor it writes: fusions keep one of the two."""
    names = {node.name or ""}
    for output in node.outputs:
        names.add(output.name or "")
        for use in output.uses():
            if use.node.op_type == "QuantizeLinear":
                names.add(use.node.outputs[0].name or "")
    return bool((names - {""}) & integer_names)


def _read_executed(graph: onnx.GraphProto) -> tuple[set[str], dict[str, int], int, int]:
    names: set[str] = set()
    counts: Counter[str] = Counter()
    integers: set[str] = set()
    integer = floating = 0
    for node in graph.node:
        counts[node.op_type] += 1
        kernel = node.op_type in INTEGER_KERNELS
        carries = kernel or node.op_type == "QuantizeLinear" or bool(node.input and node.input[0] in integers)
        ends_in_float = node.op_type in _ENDS_IN_FLOAT or node.op_type == "DequantizeLinear"
        if node.op_type == "QGemm":
            ends_in_float = len(node.input) < 8 or not node.input[7]
        if carries and not ends_in_float:
            integers.update(node.output)
        if kernel:
            names.add(_TOKEN.sub("", node.name))
            names.update(node.output)
        if node.op_type in _BOUNDARY or node.op_type in _LAYOUT:
            continue
        integer, floating = (integer + 1, floating) if carries else (integer, floating + 1)
    return names, dict(counts.most_common()), integer, floating


def _macs_of(model: Model) -> list[tuple[oir.Node, int]]:
    shapes = _shapes(model)
    compute = (node for node in model.graph.all_nodes() if node.op_type in _COMPUTE and node.domain == "")
    return [(node, _macs(node, shapes)) for node in compute]


def _macs(node: oir.Node, shapes: dict[str, list[int]]) -> int:
    first, second = (shapes.get(value.name or "", []) if value is not None else [] for value in node.inputs[:2])
    result = shapes.get(node.outputs[0].name or "", [])
    if node.op_type == "Conv":
        return math.prod(result) * math.prod(second[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(first) * math.prod(second[1:])
    inner = first[-1] if first else 1
    if node.op_type == "Gemm" and node.attributes.get_int("transA", False) and first:
        inner = first[0]
    return math.prod(result) * inner


def _shapes(model: Model) -> dict[str, list[int]]:
    """Shapes by value name, with 1 for every dimension that is not fixed."""
    proto = weightless(model.ir)
    with contextlib.suppress(onnx.shape_inference.InferenceError):
        proto = onnx.shape_inference.infer_shapes(proto)
    shapes: dict[str, list[int]] = {}
    for info in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        tensor = info.type.tensor_type
        if tensor.HasField("shape"):
            shapes[info.name] = [dim.dim_value or 1 for dim in tensor.shape.dim]
    for tensor_proto in proto.graph.initializer:
        shapes[tensor_proto.name] = list(tensor_proto.dims)
    return shapes
