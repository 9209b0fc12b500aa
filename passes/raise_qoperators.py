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
from qat2int8.passes.qoperators import QOperator, qoperator_of
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
            operator = qoperator_of(node)
            if operator is None:
                continue
            inputs = [value for value in node.inputs if value is not None]
            try:
                _RULES.get(operator.op_type, _plain)(_Raising(model, node, operator, made))
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

    def __init__(
        self, model: Model, node: oir.Node, operator: QOperator, made: dict[tuple[object, ...], oir.Value]
    ) -> None:
        self.model, self.node, self.operator, self._made = model, node, operator, made
        self._name = node.outputs[0].name or node.name or "raised"

    def optional(self, index: int) -> oir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def required(self, index: int) -> oir.Value:
        value = self.optional(index)
        if value is None:
            raise InvalidModel(f"input {index} is missing", where=f"{self.node.op_type} '{self.node.name}'")
        return value

    def operand(self, index: int) -> _Operand:
        """The operand at this place; the second of a layer may have one scale per channel."""
        axis = self.operator.weight_axis(self.node) if index == 1 else None
        slots = self.operator.operands_of(self.node)[index]
        integers, zero = self.required(slots.data), self.optional(slots.zero_point)
        steps = self._constant(self.required(slots.scale))
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
        key = (integers, self.required(slots.scale), zero, axis)
        return _Operand(integers, steps.astype(np.float32), zeros, axis, key)

    def bias(self, left: _Operand, right: _Operand, *, factor: float = 1.0) -> _Operand | None:
        """The int32 bias: levels of the accumulator, whose last axis are the channels."""
        integers = None if self.operator.bias is None else self.optional(self.operator.bias)
        if integers is None:
            return None
        scale = (left.scale * right.scale * np.float32(factor)).astype(np.float32)
        axis = self._axis(integers, -1) if scale.ndim else None
        shape = integers.shape
        if axis is not None and (shape is None or axis < 0 or shape[axis] != scale.size):
            raise _Kept(f"its bias '{integers.name}' has not one element per channel")
        return _Operand(integers, scale, None, axis, (integers, left.key, right.key, factor))

    def result(self, operand: _Operand) -> tuple[oir.Value, oir.Value] | None:
        """Scale and zero point of the output, of the type of ``operand`` where no zero point is given.

        None for an output in float.
        """
        slots = self.operator.result
        if slots is None or (self.operator.float_result and self.optional(slots[0]) is None):
            return None
        steps, zero = self.required(slots[0]), self.optional(slots[1])
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

    @property
    def attributes(self) -> list[oir.Attr]:
        """Those of the node's attributes that the float operator has too."""
        given = self.node.attributes
        return [given[name] for name in self.operator.attributes if name in given]

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
    data, weight = raising.operand(0), raising.operand(1)
    bias, grid = raising.bias(data, weight), raising.result(data)
    inputs = [raising.dequantize(operand) for operand in (data, weight, bias) if operand is not None]
    raising.finish(raising.write("Conv", inputs, attributes=raising.attributes), grid)


def _matmul(raising: _Raising) -> None:
    left, right = raising.operand(0), raising.operand(1)
    grid = raising.result(left)
    bias = None if raising.operator.float_bias is None else raising.optional(raising.operator.float_bias)
    product = raising.write("MatMul", [raising.dequantize(left), raising.dequantize(right)])
    raising.finish(product if bias is None else raising.write("Add", [product, bias]), grid)


def _gemm(raising: _Raising) -> None:
    alpha = raising.node.attributes.get_float("alpha", 1.0)
    left, right = raising.operand(0), raising.operand(1)
    bias, grid = raising.bias(left, right, factor=alpha), raising.result(left)
    inputs = [raising.dequantize(operand) for operand in (left, right, bias) if operand is not None]
    raising.finish(raising.write("Gemm", inputs, attributes=raising.attributes), grid)


def _plain(raising: _Raising) -> None:
    """Operators whose operands have one scale each, and nothing else."""
    if raising.node.attributes.get_int("channels_last", 0):
        raise _Kept("its channels are the last axis")
    operands = [raising.operand(index) for index in range(len(raising.operator.operands_of(raising.node)))]
    if not operands:
        raise InvalidModel("has no tensors", where=f"{raising.node.op_type} '{raising.node.name}'")
    grid = raising.result(operands[0])
    inputs = [raising.dequantize(operand) for operand in operands]
    if raising.operator.condition is not None:
        inputs.insert(0, raising.required(raising.operator.condition))
    raising.finish(raising.write(raising.operator.float_op, inputs, attributes=raising.attributes), grid)


def _softmax(raising: _Raising) -> None:
    axis, source = raising.node.attributes.get_int("axis", -1), raising.required(0)
    last = axis == -1 or (source.shape is not None and axis == len(source.shape) - 1)
    # Before opset 13 all axes from this one on were one; from 13 on it is only this one.
    if not last and (raising.node.attributes.get_int("opset", 0) < 13 or raising.model.opset < 13):
        raise _Kept("it flattens its input, as Softmax did before opset 13")
    data = raising.operand(0)
    grid = raising.result(data)
    given = [oir.AttrInt64("axis", axis)]
    raising.finish(raising.write("Softmax", [raising.dequantize(data)], attributes=given), grid)


_RULES: dict[str, Callable[[_Raising], None]] = {
    "QLinearConv": _conv,
    "QLinearMatMul": _matmul,
    "MatMulIntegerToFloat": _matmul,
    "QGemm": _gemm,
    "QLinearSoftmax": _softmax,
}
"""Those that are more than :func:`_plain`."""
