"""Write Dequantize, a float operator and Quantize as the one operator that computes it on integers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as oir
import onnx_ir.passes.common as common

from qat2int8.ir import Fact, Format, Model
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.fake_quant import drop_unused_initializers
from qat2int8.passes.output_channel import output_channel_axis
from qat2int8.passes.qdq_step import Step, read_step, reader_of
from qat2int8.passes.qoperators import QOPERATORS, QOperator
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class LowerToQoperators(Pass):
    """Write each float operator between Dequantize and Quantize as onnxruntime's own for it (QLinearConv ...).

    The same operators that onnxruntime's QDQ fusion makes (its ``qdq_selectors.cc`` and ``qdq_actions.cc``), so
    both forms compute the same numbers. MatMul and Gemm can end in float. What has no such operator, or does not
    fit its contract, stays between Quantize and Dequantize; what moves integers is left as it is. The inverse is
    ``raise-qoperators``.

    Options:
        format: ``qoperator`` (default), or ``qdq`` to leave everything as it is.

    Raises:
        PipelineError: the target does not read the format.
    """

    name = "lower-to-qoperators"
    invalidates = frozenset({Fact.QDQ_PLACED})
    # Kernels round once where Dequantize, float operator and Quantize round three times.
    numerics = Numerics.QUANTIZING

    format: Format = Format.QOPERATOR

    def run(self, model: Model, ctx: Context) -> PassResult:
        ctx.target.check_format(self.format)
        if self.format is Format.QDQ:
            return PassResult()
        groups = [group for node in model.nodes() if (group := _group_of(model, node)) is not None]
        if groups:
            # Which ends at operators it does not know, so it has to come first.
            common.ShapeInferencePass()(model.ir)
        lowering = _Lowering(model)
        for group in groups:
            lowering.lower(group)
        lowering.drop_dequantizers()
        return PassResult(Counter(group.operator.op_type for group in groups))


@dataclass(frozen=True, eq=False)
class _Group:
    """A float node with the steps around it.

    Attributes:
        operands: the Dequantize nodes of its inputs.
        bias: the Dequantize of its int32 bias.
        quantizer: the Quantize of its output; None when it ends in float.
    """

    node: oir.Node
    operator: QOperator
    operands: tuple[Step, ...]
    bias: oir.Node | None
    quantizer: Step | None


def _group_of(model: Model, node: oir.Node) -> _Group | None:
    """``node`` as a group, or None where no operator computes what it does."""
    known = [operator for operator in QOPERATORS.values() if operator.float_op == node.op_type]
    if node.domain or not known:
        return None
    quantizer = _quantizer(model, node.outputs[0])
    if quantizer is None and any(use.node.op_type == "QuantizeLinear" for use in node.outputs[0].uses()):
        return None
    fitting = (each for each in known if (each.result if quantizer is not None else each.float_result))
    operator = next(fitting, None)
    if operator is None or not _has_its_attributes(model, node):
        return None
    inputs = list(node.inputs)
    if operator.condition is not None:
        del inputs[operator.condition]
    bias = inputs.pop() if operator.bias is not None and len(inputs) > _WITHOUT_BIAS else None
    steps = [_dequantizer(model, value) for value in inputs]
    operands = tuple(step for step in steps if step is not None)
    if len(operands) < len(steps) or not _has_its_types(node, operands, quantizer):
        return None
    if bias is None:
        return _Group(node, operator, operands, None, quantizer)
    dequantizer = _bias_dequantizer(model, bias, operands)
    return None if dequantizer is None else _Group(node, operator, operands, dequantizer, quantizer)


_WITHOUT_BIAS = 2
_OPSET_OF_PLAIN_SOFTMAX = 13
"""Before, a Softmax was one over all axes from its axis on."""


def _has_its_attributes(model: Model, node: oir.Node) -> bool:
    """Whether the operator for ``node`` can say what its attributes say."""
    attributes = node.attributes
    match node.op_type:
        case "Gemm":
            biased = len(node.inputs) > _WITHOUT_BIAS and node.inputs[_WITHOUT_BIAS] is not None
            return not biased or (attributes.get_float("alpha", 1.0) == attributes.get_float("beta", 1.0) == 1.0)
        case "AveragePool":
            return all(step == 1 for step in attributes.get_ints("dilations", ()))
        case "Softmax":
            return model.opset >= _OPSET_OF_PLAIN_SOFTMAX
    return True


def _has_its_types(node: oir.Node, operands: tuple[Step, ...], quantizer: Step | None) -> bool:
    """Whether the operator takes these types, and scales per channel where there are any."""
    types = {step.zero_point.dtype for step in operands}
    if quantizer is not None and quantizer.zero_point.dtype != operands[0].zero_point.dtype:
        return False
    if node.op_type not in _LAYERS:
        return len(types) == 1 and all(step.axis is None for step in operands)
    first, second = operands
    if first.axis is not None or (first.zero_point.dtype == np.int8 and len(types) > 1):
        return False
    weight = second.node.inputs[0]
    if second.axis is None:
        return True
    if weight is None or weight.shape is None:
        return False
    rank = len(weight.shape)
    return second.axis % rank == output_channel_axis(node, rank)


_LAYERS = ("Conv", "Gemm", "MatMul")


def _dequantizer(model: Model, value: oir.Value | None) -> Step | None:
    """The Dequantize of 8-bit integers that computes ``value``."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear":
        return None
    step = read_step(model, node)
    return step if step is not None and step.zero_point.dtype in _EIGHT_BITS else None


_EIGHT_BITS = (np.dtype(np.int8), np.dtype(np.uint8))


def _quantizer(model: Model, value: oir.Value) -> Step | None:
    """The one reader of ``value``, where that is a Quantize to one 8-bit grid."""
    reader = reader_of(model, value)
    if reader is None or reader[0].op_type != "QuantizeLinear":
        return None
    step = read_step(model, reader[0])
    return step if step is not None and step.movable else None


def _bias_dequantizer(model: Model, bias: oir.Value, operands: tuple[Step, ...]) -> oir.Node | None:
    """The Dequantize of int32 levels that computes ``bias``, when its step is the product of the operands' steps.

    The operator knows no other step: it adds the levels to the products of levels.
    """
    dequantize = bias.producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or dequantize.domain:
        return None
    levels, scale, zero_point = (*dequantize.inputs, None)[:3]
    steps, zeros = model.constant(scale), model.constant(zero_point)
    if levels is None or levels.dtype != oir.DataType.INT32 or levels.shape is None or steps is None:
        return None
    if zero_point is not None and (zeros is None or np.any(zeros)):
        return None
    *others, channels = levels.shape or (1,)
    if any(size != 1 for size in others):
        return None
    expected = np.atleast_1d(operands[0].scale * operands[1].scale)
    if steps.size not in (1, channels) or expected.size not in (1, channels):
        return None
    return dequantize if np.allclose(steps.reshape(-1), expected, rtol=_ROUNDING, atol=0.0) else None


_ROUNDING = 1e-6
"""Of a product of two steps in float32."""


class _Lowering:
    """Writes groups; parameters of one element become scalars, one for all nodes."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._scalars: dict[oir.Value, oir.Value] = {}
        self._dequantizers: dict[oir.Node, None] = {}

    def lower(self, group: _Group) -> None:
        node, operator, quantizer = group.node, group.operator, group.quantizer
        inputs: dict[int, oir.Value | None] = {}
        for place, step in zip(operator.places(len(group.operands)), group.operands, strict=True):
            inputs[place.data] = step.node.inputs[0]
            inputs[place.scale], inputs[place.zero_point] = self._parameters(step)
        if operator.condition is not None:
            inputs[operator.condition] = node.inputs[operator.condition]
        if operator.bias is not None and group.bias is not None:
            inputs[operator.bias] = group.bias.inputs[0]
        if operator.result is not None and quantizer is not None:
            inputs[operator.result[0]], inputs[operator.result[1]] = self._parameters(quantizer)
        made = oir.node(
            operator.op_type,
            [inputs.get(index) for index in range(max(inputs) + 1)],
            domain=operator.domain,
            name=node.name,
            doc_string=node.doc_string,
            metadata_props=dict(node.metadata_props),
        )
        for key in operator.attributes:
            if key in node.attributes:
                made.attributes[key] = node.attributes[key]
        if operator.op_type == "QLinearSoftmax":
            made.attributes["axis"] = oir.AttrInt64("axis", node.attributes.get_int("axis", -1))
            made.attributes["opset"] = oir.AttrInt64("opset", _OPSET_OF_PLAIN_SOFTMAX)
        if operator.domain:
            self.model.ir.opset_imports.setdefault(operator.domain, 1)
        self.model.insert_before(node, made)
        self._take_over(group, made)
        self._dequantizers.update(dict.fromkeys(step.node for step in group.operands))
        if group.bias is not None:
            self._dequantizers[group.bias] = None

    def _take_over(self, group: _Group, made: oir.Node) -> None:
        """Let ``made`` write what the Quantize wrote, or the float node where there is none."""
        node, result = group.node, made.outputs[0]
        if group.quantizer is None:
            self.model.replace_value(node.outputs[0], result)
            self.model.remove(node)
            return
        quantize = group.quantizer.node
        integers = quantize.outputs[0]
        self.model.scales.move(node.outputs[0], integers)
        self.model.replace_value(integers, result)
        self.model.remove(quantize)
        self.model.remove(node)

    def _parameters(self, step: Step) -> tuple[oir.Value, oir.Value]:
        """Scale and zero point of ``step``."""
        scale, zero_point = step.node.inputs[1:3]
        assert scale is not None, "a Step has a scale"
        assert zero_point is not None, "a Step has a zero point"
        if step.axis is not None:
            return scale, zero_point
        return self._scalar(scale, step.scale), self._scalar(zero_point, step.zero_point)

    def _scalar(self, value: oir.Value, array: npt.NDArray[Any]) -> oir.Value:
        if value.shape is not None and not value.shape:
            return value
        if value not in self._scalars:
            self._scalars[value] = self.model.add_initializer(value.name or "parameter", array)
        return self._scalars[value]

    def drop_dequantizers(self) -> None:
        """Remove those that nobody reads any more, and their parameters; integers take over the grids."""
        parameters: list[oir.Value] = []
        for node in self._dequantizers:
            result = node.outputs[0]
            if result.uses() or result.is_graph_output():
                continue
            integers, *rest = [value for value in node.inputs if value is not None]
            if integers not in self.model.scales and not integers.is_initializer():
                self.model.scales.move(result, integers)
            self.model.remove(node)
            parameters += rest
        drop_unused_initializers(self.model, parameters)
