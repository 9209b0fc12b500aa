"""The operators of onnxruntime that compute on integers: what they stand for and where their operands are."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as oir

__all__ = ["CONTRIB_DOMAIN", "QOPERATORS", "Operand", "QOperator", "qoperator_of"]

CONTRIB_DOMAIN = "com.microsoft"
"""Of the operators that ONNX itself does not have; its version is 1."""


@dataclass(frozen=True)
class Operand:
    """Indices of the inputs that hold an integer tensor, its scale and its zero point."""

    data: int
    scale: int
    zero_point: int


@dataclass(frozen=True, kw_only=True)
class QOperator:
    """One operator.

    Attributes:
        domain, op_type: its name.
        float_op: the ONNX op of which it is the integer form.
        operands: its integer tensors, in the order of the float op's inputs; none: as many as one likes.
        result: inputs with scale and zero point of what it writes; None when it always ends in float.
        float_result: whether it can end in float.
        bias: the input with an int32 bias, whose step is the product of the operands' steps.
        float_bias: the input with a bias in float.
        condition: the input with a condition, which has no grid.
        attributes: those of the float op that it has too.
    """

    domain: str = CONTRIB_DOMAIN
    op_type: str
    float_op: str
    operands: tuple[Operand, ...]
    result: tuple[int, int] | None
    float_result: bool = False
    bias: int | None = None
    float_bias: int | None = None
    condition: int | None = None
    attributes: tuple[str, ...] = ()

    def weight_axis(self, node: oir.Node) -> int | None:
        """Along which axis the second operand of ``node`` may have a scale per channel; -1 is the last one."""
        match self.float_op:
            case "Conv":
                return 0
            case "MatMul":
                return -1
            case "Gemm":
                return 0 if node.attributes.get_int("transB", 0) else 1
        return None

    def places(self, count: int) -> tuple[Operand, ...]:
        """:attr:`operands`; of an operator with as many as one likes, the first ``count``."""
        return self.operands or tuple(Operand(at, at + 1, at + 2) for at in range(2, 2 + 3 * count, 3))

    def operands_of(self, node: oir.Node) -> tuple[Operand, ...]:
        """The places of the operands that ``node`` has."""
        return self.places(-(-(len(node.inputs) - 2) // 3))


_ONE, _OTHER = Operand(0, 1, 2), Operand(3, 4, 5)


def _unary(float_op: str, *attributes: str) -> QOperator:
    return QOperator(
        op_type=f"QLinear{float_op}", float_op=float_op, operands=(_ONE,), result=(3, 4), attributes=attributes
    )


def _binary(float_op: str) -> QOperator:
    return QOperator(op_type=f"QLinear{float_op}", float_op=float_op, operands=(_ONE, _OTHER), result=(6, 7))


_ALL = (
    QOperator(
        domain="",
        op_type="QLinearConv",
        float_op="Conv",
        operands=(_ONE, _OTHER),
        result=(6, 7),
        bias=8,
        attributes=("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides"),
    ),
    QOperator(domain="", op_type="QLinearMatMul", float_op="MatMul", operands=(_ONE, _OTHER), result=(6, 7)),
    QOperator(
        op_type="MatMulIntegerToFloat",
        float_op="MatMul",
        operands=(Operand(0, 2, 4), Operand(1, 3, 5)),
        result=None,
        float_result=True,
        float_bias=6,
    ),
    QOperator(
        op_type="QGemm",
        float_op="Gemm",
        operands=(_ONE, _OTHER),
        result=(7, 8),
        float_result=True,
        bias=6,
        attributes=("alpha", "transA", "transB"),
    ),
    QOperator(op_type="QLinearConcat", float_op="Concat", operands=(), result=(0, 1), attributes=("axis",)),
    QOperator(
        op_type="QLinearWhere",
        float_op="Where",
        operands=(Operand(1, 2, 3), Operand(4, 5, 6)),
        result=(7, 8),
        condition=0,
    ),
    _binary("Add"),
    _binary("Mul"),
    _unary("AveragePool", "auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides"),
    _unary("GlobalAveragePool"),
    _unary("LeakyRelu", "alpha"),
    _unary("Sigmoid"),
    _unary("Softmax", "axis"),
)

QOPERATORS = {(operator.domain, operator.op_type): operator for operator in _ALL}
"""By domain and op type."""


def qoperator_of(node: oir.Node) -> QOperator | None:
    """What ``node`` is, or None when it is no such operator."""
    return QOPERATORS.get((node.domain, node.op_type))
