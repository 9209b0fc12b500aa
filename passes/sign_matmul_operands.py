"""Give products of two activations a second operand with a sign, which is what the fast kernel multiplies by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from qat2int8.ir import Contract, Fact, Model, Target
from qat2int8.passes.base import Context, Pass, PassResult
from qat2int8.passes.pattern import maker
from qat2int8.passes.private_path import private_path
from qat2int8.passes.qdq_step import Step, read_step
from qat2int8.passes.registry import register
from qat2int8.passes.sole_consumer import sole_consumer


@register
@dataclass(frozen=True)
class SignMatmulOperands(Pass):
    """Let the second operand of a MatMul of two activations be int8: the same steps, the zero point 128 lower.

    VNNI multiplies unsigned by signed bytes. For two unsigned operands onnxruntime takes a kernel without it: the
    products of an attention (12 heads, 128 tokens, 64 features) run at 1.2 times the speed of float, against 2.0
    times with a signed one (1.31, one thread). A signed Quantize with its Dequantize right behind is made unsigned
    by the runtime again, but not where a Transpose stands between the two, as it does in an attention. So the type
    changes in front of the last Transpose: in the Quantize there, or by a Dequantize and a Quantize of the same
    step, which round nothing. That costs two passes over the operand, and pays where it meets enough rows.

    Options:
        rows: the least number of rows of the first operand that pays for two passes over the second one.
    """

    name = "sign-matmul-operands"
    requires = frozenset({Fact.QDQ_PLACED})
    per_target = True

    rows: int = 64

    def run(self, model: Model, ctx: Context) -> PassResult:
        signed = 0
        for node in model.nodes("MatMul"):
            first, second = (maker(model, value, "DequantizeLinear") for value in node.inputs)
            if first is None or second is None or sole_consumer(model, second.outputs[0]) is not node:
                continue
            signed += self._sign(model, ctx.target, node, second)
        return PassResult({"signed": signed})

    def _sign(self, model: Model, target: Target, node: oir.Node, dequantize: oir.Node) -> bool:
        step = read_step(model, dequantize)
        # The nearest one whose integers nobody else reads.
        path = private_path(model, dequantize)
        transpose = next((node for node in path if node.op_type == "Transpose"), None)
        if step is None or transpose is None or step.axis is not None or step.zero_point.dtype != np.uint8:
            return False
        source = transpose.inputs[0]
        assert source is not None
        quantize = maker(model, source, "QuantizeLinear")
        before = None if quantize is None else read_step(model, quantize)
        direct = (
            before is not None
            and before.equals(step)
            and sole_consumer(model, source) is transpose
            and not _is_kernel(model, target, before.node.inputs[0])
        )
        if not direct and _rows(node) < self.rows:
            return False
        zero_point = model.add_initializer("zero_point", np.asarray(step.zero - _SHIFT, np.int8))
        if direct and quantize is not None:
            quantize.replace_input_with(2, zero_point)
            source.type = oir.TensorType(oir.DataType.INT8)
        else:
            transpose.replace_input_with(0, _requantized(model, transpose, source, step, zero_point))
        dequantize.replace_input_with(2, zero_point)
        value = transpose.outputs[0]
        while value is not dequantize.outputs[0]:
            value.type = oir.TensorType(oir.DataType.INT8)
            value = next(iter(value.uses())).node.outputs[0]
        return True


_SHIFT = 128


def _is_kernel(model: Model, target: Target, value: oir.Value | None) -> bool:
    """Whether an integer kernel computes ``value``: its result is of the type of its first input."""
    node = value.producer() if value is not None else None
    rule = None if node is None or node.domain else target.ops.get(node.op_type)
    if node is None or rule is None:
        return False
    if rule.contract is Contract.MOVEMENT:
        return _is_kernel(model, target, node.inputs[0])
    return maker(model, node.inputs[0], "DequantizeLinear") is not None


def _rows(node: oir.Node) -> float:
    """How many rows the first operand of a MatMul has; infinitely many where that is not known."""
    first = node.inputs[0]
    shape = None if first is None else first.shape
    if shape is None or shape.rank() < 2:
        return float("inf") if shape is None else 1
    rows = shape[-2]
    return rows if isinstance(rows, int) else float("inf")


def _requantized(
    model: Model, transpose: oir.Node, source: oir.Value, step: Step, zero_point: oir.Value
) -> oir.Value:
    """The integers ``source`` with a sign."""
    scale = step.node.inputs[1]
    name = source.name or transpose.name or "operand"
    floats = oir.node(
        "DequantizeLinear", [source, scale, step.node.inputs[2]], name=model.unique_name(f"{name}_unsigned")
    )
    integers = oir.node(
        "QuantizeLinear", [floats.outputs[0], scale, zero_point], name=model.unique_name(f"{name}_signing")
    )
    for node, dtype, role in ((floats, oir.DataType.FLOAT, "float"), (integers, oir.DataType.INT8, "signed")):
        output = node.outputs[0]
        output.name, output.type = model.unique_name(f"{name}_{role}"), oir.TensorType(dtype)
        output.shape = None if source.shape is None else source.shape.copy()
        model.insert_before(transpose, node)
    return integers.outputs[0]
