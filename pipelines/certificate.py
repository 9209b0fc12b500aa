"""The certificate: what runs in integers, read from the graph that the runtime executes.

For runtimes that are not at hand it is read from where Quantize and Dequantize stand, and says so.
"""

from __future__ import annotations

import contextlib
import math
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as oir
import onnxruntime as ort

from qat2int8.ir import Diagnostic, Model, Target
from qat2int8.ir.verify import weightless
from qat2int8.passes import Context
from qat2int8.passes.qoperators import qoperator_of
from qat2int8.passes.raise_qoperators import RaiseQoperators
from qat2int8.pipelines.sessions import ModelFile, deployed_session
from qat2int8.pipelines.target_files import DEFAULT_TARGET, load_target
from qat2int8.pipelines.tensorrt_rules import broken_rules

__all__ = ["Certificate", "NodeRecord", "certify", "layer_of"]

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
_EIGHT_BITS = frozenset({onnx.TensorProto.INT8, onnx.TensorProto.UINT8})
_LAYOUT = frozenset({"Transpose", "ReorderInput", "ReorderOutput", "Identity", "Cast"})
_NOT_8_BIT = frozenset(
    {
        *("ArgMax", "Cast", "ConvInteger", "DequantizeLinear", "DynamicQuantizeMatMul"),
        *("MatMulInteger", "MatMulIntegerToFloat", "Shape", "Size"),
    }
)
"""What reads 8-bit integers and writes something else: floats, accumulators, indices."""
_TOKEN = re.compile(r"_token_\d+$")
"""The suffix onnxruntime adds to a node it replaces during layout optimisation."""


@dataclass(frozen=True)
class NodeRecord:
    """One Conv, ConvTranspose, Gemm or MatMul of the converted model, or the integer operator for one."""

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
        runtime: the runtime and version that was asked; the name of one that could not be.
        basis: "executed" when the runtime was asked; "placement" when integer means that everything a node
            computes with comes dequantized.
        broken_rules: what the placement has that the runtime does not take, where its rules are known.
        kernels: op types of the integer kernels, by the names of the node and of what it writes.
    """

    compute: tuple[NodeRecord, ...]
    executed: dict[str, int]
    integer_nodes: int
    float_nodes: int
    runtime: str
    kernels: dict[str, str] = field(repr=False)
    basis: Literal["executed", "placement"] = "executed"
    broken_rules: tuple[Diagnostic, ...] = ()

    def kernel_of(self, node: oir.Node) -> str | None:
        """The integer kernel that executes ``node`` of the converted model, or None: then it runs in float."""
        return _kernel_of(node, self.kernels)

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
            "basis": self.basis,
            "integer_macs_percent": self.integer_macs_percent,
            "integer_nodes_percent": self.integer_nodes_percent,
            "integer_nodes": self.integer_nodes,
            "float_nodes": self.float_nodes,
            "macs": self.macs,
            "executed": self.executed,
            "compute": [asdict(record) for record in self.compute],
            "broken_rules": [finding.as_dict() for finding in self.broken_rules],
        }


def certify(model: Model, file: ModelFile, target: Target | None = None) -> Certificate:
    """Ask onnxruntime how it executes ``model``, or read the placement where the target has another runtime.

    Args:
        model: the converted model, for names and shapes.
        file: the same model, serialised.
        target: what it was made for; the default target if not given.

    Raises:
        UnsupportedModel: onnxruntime refuses the model.
    """
    target = target or load_target(DEFAULT_TARGET)
    if target.runtime != "onnxruntime":
        return _read_placement(model, target)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "executed.onnx"
        deployed_session(target, file, optimized=path)
        executed = onnx.load(path, load_external_data=False)
    reading = _Reading()
    reading.read(executed.graph)
    records = tuple(
        NodeRecord(node.name or "", node.op_type, macs, _kernel_of(node, reading.kernels) is not None)
        for node, macs in _macs_of(model)
    )
    return Certificate(
        records,
        dict(reading.counts.most_common()),
        reading.integer,
        reading.floating,
        f"onnxruntime {ort.__version__} CPU",
        reading.kernels,
    )


def _read_placement(model: Model, target: Target) -> Certificate:
    """What becomes integer by where the quantizers stand."""
    kernels: dict[str, str] = {}
    integer = floating = 0
    for node in model.graph.all_nodes():
        if node.op_type in _BOUNDARY or node.op_type in _LAYOUT:
            continue
        if _reads_quantized(model, node):
            kernels.update((name, node.op_type) for name in (node.name, node.outputs[0].name) if name)
            integer += 1
        else:
            floating += 1
    records = tuple(
        NodeRecord(node.name or "", node.op_type, macs, node.outputs[0].name in kernels)
        for node, macs in _macs_of(model)
    )
    counts = Counter(node.op_type for node in model.graph.all_nodes())
    broken = broken_rules(model) if target.runtime == "tensorrt" else ()
    return Certificate(
        records, dict(counts.most_common()), integer, floating, target.name, kernels, "placement", broken
    )


def _reads_quantized(model: Model, node: oir.Node) -> bool:
    """Whether every activation and weight that ``node`` computes with comes dequantized.

    An Add that is fused into a convolution needs that of one input only.
    """
    operands = node.inputs[:2] if node.op_type in _COMPUTE else node.inputs
    dequantized = [
        value.producer() is not None and value.producer().op_type == "DequantizeLinear"  # type: ignore[union-attr]
        for value in operands
        if value is not None and (node.op_type in _COMPUTE or model.constant(value) is None)
    ]
    return bool(dequantized) and (any if node.op_type == "Add" else all)(dequantized)


def _kernel_of(node: oir.Node, kernels: Mapping[str, str]) -> str | None:
    """By node name, or by the tensor it writes: fusions keep one of the two."""
    names = [node.name]
    for output in node.outputs:
        names.append(output.name)
        names += [use.node.outputs[0].name for use in output.uses() if use.node.op_type == "QuantizeLinear"]
    return next((kernels[name] for name in names if name and name in kernels), None)


class _Reading:
    """What an executed graph does, bodies of control flow included."""

    def __init__(self) -> None:
        self.kernels: dict[str, str] = {}
        """Op types of integer kernels, by their names and those of the tensors they write."""
        self.counts: Counter[str] = Counter()
        self.integer = self.floating = 0
        self._integers: set[str] = set()
        """Names of 8-bit tensors."""

    def read(self, graph: onnx.GraphProto) -> None:
        self._integers.update(info.name for info in graph.input if info.type.tensor_type.elem_type in _EIGHT_BITS)
        self._integers.update(tensor.name for tensor in graph.initializer if tensor.data_type in _EIGHT_BITS)
        for node in graph.node:
            self._read_node(node)
            for attribute in node.attribute:
                for body in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                    self.read(body)

    def _read_node(self, node: onnx.NodeProto) -> None:
        self.counts[node.op_type] += 1
        kernel = node.op_type in INTEGER_KERNELS
        carries = (
            kernel or node.op_type == "QuantizeLinear" or bool(node.input and node.input[0] in self._integers)
        )
        if carries and node.op_type not in _NOT_8_BIT and not _is_float_gemm(node):
            self._integers.update(node.output)
        if kernel:
            written = (_TOKEN.sub("", node.name), *node.output)
            self.kernels.update((name, node.op_type) for name in written if name)
        if node.op_type in _BOUNDARY or node.op_type in _LAYOUT:
            return
        self.integer, self.floating = self.integer + carries, self.floating + (not carries)


def _is_float_gemm(node: onnx.NodeProto) -> bool:
    """Whether ``node`` is a QGemm without a grid for its output."""
    return node.op_type == "QGemm" and (len(node.input) < 8 or not node.input[7])


def layer_of(node: oir.Node) -> tuple[str, tuple[int, int]] | None:
    """The float op that ``node`` is or stands for and its two operands, where that multiplies and accumulates."""
    operator = qoperator_of(node)
    if operator is not None and operator.float_op in _COMPUTE:
        first, second = operator.operands
        return operator.float_op, (first.data, second.data)
    return (node.op_type, (0, 1)) if node.op_type in _COMPUTE and not node.domain else None


def _macs_of(model: Model) -> list[tuple[oir.Node, int]]:
    shapes = _shapes(model)
    return [
        (node, _macs(node, *layer, shapes))
        for node in model.graph.all_nodes()
        if (layer := layer_of(node)) is not None
    ]


def _macs(node: oir.Node, op_type: str, operands: tuple[int, int], shapes: dict[str, list[int]]) -> int:
    read = [node.inputs[index] for index in operands]
    first, second = (shapes.get(value.name or "", []) if value is not None else [] for value in read)
    result = shapes.get(node.outputs[0].name or "", [])
    if op_type == "Conv":
        return math.prod(result) * math.prod(second[1:])
    if op_type == "ConvTranspose":
        return math.prod(first) * math.prod(second[1:])
    if op_type == "Gemm" and node.attributes.get_int("transA", False):
        inner = first[:1]
    else:
        inner = first[-1:] or second[-2:][:1]
    return math.prod(result) * math.prod(inner)


def _shapes(model: Model) -> dict[str, list[int]]:
    """Shapes by value name, with 1 for every dimension of an input that is not fixed, and what follows from it.

    A batch of unknown size that is flattened together with a sequence counts as long as the sequence.
    """
    proto = weightless(model.ir)
    if any(qoperator_of(node) is not None for node in model.graph.all_nodes()):
        # ONNX infers no shapes behind onnxruntime's operators; raised, they write the same tensors.
        raised = Model.from_proto(proto)
        RaiseQoperators().run(raised, Context(load_target(DEFAULT_TARGET)))
        proto = raised.to_proto()
    shapes: dict[str, list[int]] = {}
    _add_shapes(proto.graph, shapes)
    for info in proto.graph.input:
        for dim in info.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.dim_value = 1
    del proto.graph.value_info[:]
    for info in proto.graph.output:
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.ClearField("shape")
    with contextlib.suppress(onnx.shape_inference.InferenceError):
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    _add_shapes(proto.graph, shapes)
    return shapes


def _add_shapes(graph: onnx.GraphProto, shapes: dict[str, list[int]]) -> None:
    for info in (*graph.input, *graph.output, *graph.value_info):
        tensor = info.type.tensor_type
        if tensor.HasField("shape"):
            shapes[info.name] = [dim.dim_value if dim.HasField("dim_value") else 1 for dim in tensor.shape.dim]
    for tensor_proto in graph.initializer:
        shapes[tensor_proto.name] = list(tensor_proto.dims)
    for node in graph.node:
        for attribute in node.attribute:
            for body in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                _add_shapes(body, shapes)
