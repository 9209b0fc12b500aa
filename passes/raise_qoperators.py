"""Raise operators that compute on integers to Dequantize, a float operator and Quantize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as oir
import onnx_ir.passes.common as common

from qat2int8.ir import Code, Diagnostic, InvalidModel, Model
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.fake_quant import drop_unused_initializers
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class RaiseQoperators(Pass):
    """Write onnxruntime's QOperator form (QLinearConv, QGemm ...) as the float operators it stands for.

    Each integer operand gets a DequantizeLinear, one for all readers that name the same scale and zero point, and
    the result a QuantizeLinear that writes the same integer tensor as before: graph inputs and outputs stay
    integers where they were. An int32 bias is dequantized with the product of the scales of input and weight.
    What plain ONNX cannot say so (channels last, a scale per row ...) keeps its operator, which is reported.

    Raises:
        InvalidModel: an operand is missing.
    """

    name = "raise-qoperators"
    numerics = Numerics.QUANTIZING

    def run(self, model: Model, ctx: Context) -> PassResult:
        raised, notes, parameters = 0, list[Diagnostic](), list[oir.Value]()
        made: dict[tuple[object, ...], oir.Value] = {}
        for node in model.nodes():
            rule = _RULES.get((node.domain, node.op_type))
            if rule is None:
                continue
            inputs = [value for value in node.inputs if value is not None]
            try:
                rule(_Raising(model, node, made))
            except _Kept as reason:
                note = self.note(
                    Code.UNSUPPORTED_OP,
                    f"{node.op_type} kept as it is: {reason}",
                    node=node.name or "",
                    value=node.outputs[0].name or "",
                    remedy="export the model in QDQ form",
                )
                notes.append(note)
                continue
            parameters += inputs
            raised += 1
        if raised:
            drop_unused_initializers(model, parameters)
            common.ShapeInferencePass()(model.ir)  # which ends at every op it does not know
        return PassResult({"operators raised": raised}, tuple(notes))


class _Kept(Exception):
    """Why one operator is not raised; never leaves this module, and nothing was changed before."""


@dataclass(frozen=True, eq=False)
class _Operand:
    """An integer tensor with its parameters, which are as DequantizeLinear wants them: of one shape."""

    integers: oir.Value
    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[Any] | None
    axis: int | None
    key: tuple[object, ...]


class _Raising:
    """Raises one node. Operands are read first, which may raise _Kept; then nodes are written.

    ``made`` holds what nodes share: tensors in float by their integers and grid, scalars by their parameter.
    """

    def __init__(self, model: Model, node: oir.Node, made: dict[tuple[object, ...], oir.Value]) -> None:
        self.model, self.node, self._made = model, node, made
        self._name = node.outputs[0].name or node.name or "raised"

    def optional(self, index: int) -> oir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def required(self, index: int) -> oir.Value:
        value = self.optional(index)
        if value is None:
            raise InvalidModel(f"input {index} is missing", where=f"{self.node.op_type} '{self.node.name}'")
        return value

    def operand(self, data: int, scale: int, zero_point: int, *, axis: int | None = None) -> _Operand:
        """The operand at these three inputs, which may have one scale per channel when ``axis`` says of which.

        An axis counted from the back needs a tensor of known rank.
        """
        integers, zero = self.required(data), self.optional(zero_point)
        steps = self._constant(self.required(scale))
        zeros = None if zero is None else self._constant(zero)
        size = max(steps.size, 1 if zeros is None else zeros.size)
        if size == 1:
            steps, zeros, axis = steps.reshape(()), None if zeros is None else zeros.reshape(()), None
        else:
            axis = self._axis(integers, axis)
            if steps.size not in (1, size) or steps.ndim > 1 or (zeros is not None and zeros.ndim > 1):
                raise _Kept(f"a scale of shape {steps.shape} is neither one per tensor nor one per channel")
            steps = np.broadcast_to(steps.reshape(-1), (size,))
            if zeros is not None:
                zeros = np.broadcast_to(zeros.reshape(-1), (size,))
        key = (integers, self.required(scale), zero, axis)
        return _Operand(integers, steps.astype(np.float32), zeros, axis, key)

    def bias(self, index: int, left: _Operand, right: _Operand, *, factor: float = 1.0) -> _Operand | None:
        """The int32 bias at an input: levels of the accumulator, whose last axis are the channels."""
        integers = self.optional(index)
        if integers is None:
            return None
        scale = (left.scale * right.scale * np.float32(factor)).astype(np.float32)
        axis = self._axis(integers, -1) if scale.ndim else None
        shape = integers.shape
        if axis is not None and (shape is None or axis < 0 or shape[axis] != scale.size):
            raise _Kept(f"its bias '{integers.name}' has not one element per channel")
        return _Operand(integers, scale, None, axis, (integers, left.key, right.key, factor))

    def result(self, scale: int, zero_point: int, operand: _Operand) -> tuple[oir.Value, oir.Value]:
        """Scale and zero point of the output, of the type of ``operand`` where no zero point is given."""
        steps, zero = self.required(scale), self.optional(zero_point)
        if self._constant(steps).size != 1:
            raise _Kept("its result has one scale per channel")
        if zero is not None:
            self._constant(zero)
            return self._scalar(steps), self._scalar(zero)
        if operand.zero_point is not None:
            dtype = operand.zero_point.dtype
        elif operand.integers.dtype is not None:
            dtype = operand.integers.dtype.numpy()
        else:
            raise _Kept("the type of its result is not known")
        return self._scalar(steps), self.model.add_initializer(f"{self._name}_zero_point", np.zeros((), dtype))

    def dequantize(self, operand: _Operand) -> oir.Value:
        if operand.key not in self._made:
            name = operand.integers.name or "integers"
            inputs = [operand.integers, self.model.add_initializer(f"{name}_scale", operand.scale)]
            if operand.zero_point is not None:
                inputs.append(self.model.add_initializer(f"{name}_zero_point", operand.zero_point))
            axis = [] if operand.axis is None else [oir.AttrInt64("axis", operand.axis)]
            value = self.write("DequantizeLinear", inputs, f"{name}_dequantized", attributes=axis)
            value.shape = None if operand.integers.shape is None else operand.integers.shape.copy()
            self._made[operand.key] = value
        return self._made[operand.key]

    def attributes(self, *names: str) -> list[oir.Attr]:
        """Those of the node's attributes that the float operator has too."""
        return [self.node.attributes[name] for name in names if name in self.node.attributes]

    def write(
        self, op_type: str, inputs: Sequence[oir.Value], name: str = "", *, attributes: Sequence[oir.Attr] = ()
    ) -> oir.Value:
        """The float output of a new node in front of the raised one."""
        name = self.model.unique_name(name or f"{self._name}_float")
        node = oir.Node("", op_type, inputs, attributes, name=name)
        self.model.insert_before(self.node, node)
        node.outputs[0].name, node.outputs[0].type = name, oir.TensorType(oir.DataType.FLOAT)
        return node.outputs[0]

    def finish(self, result: oir.Value, grid: tuple[oir.Value, oir.Value] | None) -> None:
        """Let ``result``, quantized unless ``grid`` is None, be what the node computed."""
        producer = result.producer()
        assert producer is not None
        producer.name = self.node.name
        if grid is not None:
            scale, zero_point = grid
            result = self.write("QuantizeLinear", [result, scale, zero_point], f"{self._name}_quantized")
            result.type = None if zero_point.dtype is None else oir.TensorType(zero_point.dtype)
        self.model.replace_value(self.node.outputs[0], result)
        self.model.remove(self.node)

    def _constant(self, value: oir.Value) -> npt.NDArray[Any]:
        array = self.model.constant(value)
        if array is None:
            raise _Kept(f"'{value.name}' is computed while the model runs")
        return array

    def _scalar(self, value: oir.Value) -> oir.Value:
        """A parameter of one element without dimensions: one for all nodes, which often share zero points."""
        array, key = self._constant(value), (value,)
        if array.ndim == 0:
            return value
        if key not in self._made:
            self._made[key] = self.model.add_initializer(value.name or "parameter", array.reshape(()))
        return self._made[key]

    def _axis(self, value: oir.Value, axis: int | None) -> int:
        if axis is None:
            raise _Kept(f"'{value.name}' has one scale per channel")
        if axis >= 0:
            return axis
        if value.shape is None:
            raise _Kept(f"the rank of '{value.name}' is not known")
        return axis + len(value.shape)


def _conv(raising: _Raising) -> None:
    data, weight = raising.operand(0, 1, 2), raising.operand(3, 4, 5, axis=0)
    bias, grid = raising.bias(8, data, weight), raising.result(6, 7, data)
    inputs = [raising.dequantize(operand) for operand in (data, weight, bias) if operand is not None]
    attributes = raising.attributes("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
    raising.finish(raising.write("Conv", inputs, attributes=attributes), grid)


def _matmul(raising: _Raising) -> None:
    left, right = raising.operand(0, 1, 2), raising.operand(3, 4, 5, axis=-1)
    grid = raising.result(6, 7, left)
    inputs = [raising.dequantize(left), raising.dequantize(right)]
    raising.finish(raising.write("MatMul", inputs), grid)


def _matmul_to_float(raising: _Raising) -> None:
    left, right = raising.operand(0, 2, 4), raising.operand(1, 3, 5, axis=-1)
    product = raising.write("MatMul", [raising.dequantize(left), raising.dequantize(right)])
    bias = raising.optional(6)
    raising.finish(product if bias is None else raising.write("Add", [product, bias]), None)


def _gemm(raising: _Raising) -> None:
    transposed = raising.node.attributes.get_int("transB", 0)
    alpha = raising.node.attributes.get_float("alpha", 1.0)
    left, right = raising.operand(0, 1, 2), raising.operand(3, 4, 5, axis=0 if transposed else 1)
    bias = raising.bias(6, left, right, factor=alpha)
    grid = None if raising.optional(7) is None else raising.result(7, 8, left)
    inputs = [raising.dequantize(operand) for operand in (left, right, bias) if operand is not None]
    attributes = raising.attributes("alpha", "transA", "transB")
    raising.finish(raising.write("Gemm", inputs, attributes=attributes), grid)


def _binary(op_type: str) -> Callable[[_Raising], None]:
    def rule(raising: _Raising) -> None:
        left, right = raising.operand(0, 1, 2), raising.operand(3, 4, 5)
        grid = raising.result(6, 7, left)
        raising.finish(raising.write(op_type, [raising.dequantize(left), raising.dequantize(right)]), grid)

    return rule


def _unary(op_type: str, *attributes: str) -> Callable[[_Raising], None]:
    def rule(raising: _Raising) -> None:
        if raising.node.attributes.get_int("channels_last", 0):
            raise _Kept("its channels are the last axis")
        data = raising.operand(0, 1, 2)
        grid = raising.result(3, 4, data)
        given = raising.attributes(*attributes)
        raising.finish(raising.write(op_type, [raising.dequantize(data)], attributes=given), grid)

    return rule


def _softmax(raising: _Raising) -> None:
    axis, source = raising.node.attributes.get_int("axis", -1), raising.required(0)
    last = axis == -1 or (source.shape is not None and axis == len(source.shape) - 1)
    # Before opset 13 all axes from this one on were one; from 13 on it is only this one.
    if not last and (raising.node.attributes.get_int("opset", 0) < 13 or raising.model.opset < 13):
        raise _Kept("it flattens its input, as Softmax did before opset 13")
    data = raising.operand(0, 1, 2)
    grid = raising.result(3, 4, data)
    given = [oir.AttrInt64("axis", axis)]
    raising.finish(raising.write("Softmax", [raising.dequantize(data)], attributes=given), grid)


def _concat(raising: _Raising) -> None:
    operands = [raising.operand(at, at + 1, at + 2) for at in range(2, len(raising.node.inputs), 3)]
    if not operands:
        raise InvalidModel("has no tensors", where=f"QLinearConcat '{raising.node.name}'")
    grid = raising.result(0, 1, operands[0])
    inputs = [raising.dequantize(operand) for operand in operands]
    raising.finish(raising.write("Concat", inputs, attributes=raising.attributes("axis")), grid)


_POOL = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")

_RULES: dict[tuple[str, str], Callable[[_Raising], None]] = {
    ("", "QLinearConv"): _conv,
    ("", "QLinearMatMul"): _matmul,
    ("com.microsoft", "MatMulIntegerToFloat"): _matmul_to_float,
    ("com.microsoft", "QGemm"): _gemm,
    ("com.microsoft", "QLinearAdd"): _binary("Add"),
    ("com.microsoft", "QLinearAveragePool"): _unary("AveragePool", *_POOL),
    ("com.microsoft", "QLinearConcat"): _concat,
    ("com.microsoft", "QLinearGlobalAveragePool"): _unary("GlobalAveragePool"),
    ("com.microsoft", "QLinearLeakyRelu"): _unary("LeakyRelu", "alpha"),
    ("com.microsoft", "QLinearMul"): _binary("Mul"),
    ("com.microsoft", "QLinearSigmoid"): _unary("Sigmoid"),
    ("com.microsoft", "QLinearSoftmax"): _softmax,
}

QOPERATORS = frozenset(_RULES)
"""What is raised, by domain and op type."""
