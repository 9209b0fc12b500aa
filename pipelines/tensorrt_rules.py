"""What TensorRT wants of an explicitly quantized model, checked on the graph, since TensorRT does not run here.

After "Explicit Quantization" in NVIDIA's TensorRT documentation: scales are constant and zero points are zero,
activations have one step for the tensor, weights one per output channel at most; layers quantize all of what
they multiply and none of their bias; nothing stands between Quantize and Dequantize; and no pair stands where it
keeps a layer from being fused with what follows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import Code, Diagnostic, Model, Severity
from qat2int8.passes.output_channel import output_channel_axis

__all__ = ["broken_rules"]

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_FUSED = ("Relu", "Clip", "BatchNormalization")
"""What is fused into the layer before it, when no quantizer stands between them."""


def broken_rules(model: Model) -> tuple[Diagnostic, ...]:
    """Every place where ``model`` breaks a rule, in the order of the graph; none for a model TensorRT takes."""
    found: list[Diagnostic] = []
    for node in model.graph.all_nodes():
        for rule in _RULES.get(node.op_type, ()):
            for reason, value, remedy in rule(model, node):
                found.append(
                    Diagnostic(
                        Code.PLACEMENT_RULE,
                        Severity.WARNING,
                        reason,
                        node=node.name or "",
                        value=value.name or "" if value is not None else "",
                        remedy=remedy,
                        pass_name="tensorrt-rules",
                    )
                )
    return tuple(found)


_Broken = Iterator[tuple[str, oir.Value | None, str]]


def _grid(model: Model, node: oir.Node) -> _Broken:
    """Of a Quantize or Dequantize: int8, zero point 0, constant positive scale, one step for an activation."""
    scale = model.constant(node.inputs[1])
    several = scale is not None and int(scale.size) > 1
    if scale is None:
        yield "its scale is not constant", node.inputs[1], "make the scale an initializer"
    elif not np.all(np.isfinite(scale)) or not np.all(np.greater(scale, 0)):
        yield "its scale is not positive", node.inputs[1], "give it a positive scale"
    zeros = node.inputs[2] if len(node.inputs) > 2 else None
    zero_point = None if zeros is None else model.constant(zeros)
    if zeros is not None and (zero_point is None or np.any(zero_point)):
        yield "its zero point is not 0", zeros, "use a symmetric grid"
    stored = node.inputs[0].dtype if node.op_type == "DequantizeLinear" and node.inputs[0] is not None else None
    if stored is None:
        stored = zeros.dtype if zeros is not None else node.outputs[0].dtype
    if stored is not oir.DataType.INT8:
        yield f"it uses {stored}", node.inputs[0], "use int8"
    if several and _constant_behind(model, node) is None:
        yield "an activation has a step per channel", node.inputs[0], "use one step for the tensor"


def _pair(model: Model, node: oir.Node) -> _Broken:
    """Of a Quantize: nothing but a Dequantize reads it."""
    for use in node.outputs[0].uses():
        if use.node.op_type != "DequantizeLinear":
            remedy = "put it before the Quantize or behind the Dequantize"
            yield f"{use.node.op_type} stands between Quantize and Dequantize", node.outputs[0], remedy


def _fusion(model: Model, node: oir.Node) -> _Broken:
    """Of a Quantize: it does not part a layer from what is fused into it."""
    source = node.inputs[0]
    producer = source.producer() if source is not None else None
    if producer is None or producer.op_type not in _LAYERS:
        return
    for follower in _readers_behind(node):
        if follower.op_type in _FUSED:
            reason = f"a quantizer between {producer.op_type} and {follower.op_type} keeps them from being fused"
            yield reason, source, f"quantize the output of the {follower.op_type}"


def _operands(model: Model, node: oir.Node) -> _Broken:
    """Of a layer: both of what it multiplies are quantized or neither is."""
    operands = [value for value in node.inputs[:2] if value is not None]
    quantized = [_dequantizer(value) is not None for value in operands]
    if any(quantized) and not all(quantized):
        bare = operands[quantized.index(False)]
        yield f"only one of the two operands of {node.op_type} is quantized", bare, "quantize both or neither"


def _weight(model: Model, node: oir.Node) -> _Broken:
    """Of a layer: its weight has one step, or one per output channel."""
    value = node.inputs[1]
    dequantize = _dequantizer(value)
    weight = None if dequantize is None else _constant_behind(model, dequantize)
    if dequantize is None or weight is None:
        return
    scale = model.constant(dequantize.inputs[1])
    if scale is None or scale.size == 1:
        return
    axis = dequantize.attributes.get_int("axis", 1) % weight.ndim
    if axis != output_channel_axis(node, weight.ndim):
        yield f"its weight has a step per channel of axis {axis}", value, "use a step per output channel"


def _bias(model: Model, node: oir.Node) -> _Broken:
    """Of a layer: its bias is float."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if _dequantizer(bias) is not None:
        yield "its bias is quantized", bias, "keep the bias in float"


def _residual(model: Model, node: oir.Node) -> _Broken:
    """Of an Add: the branch of the convolution it is fused into carries no quantizer, the other one does."""
    operands = [value for value in node.inputs if value is not None]
    quantized = [_dequantizer(value) for value in operands]
    direct = [_is_quantized_layer(value) for value in operands]
    if any(direct):
        bare = [value for value, dequantize in zip(operands, quantized, strict=True) if dequantize is None]
        if len(bare) == len(operands) and not any(model.constant(value) is not None for value in operands):
            shortcut = operands[1 - direct.index(True)]
            yield "the residual input is not quantized, so the layer ends in float", shortcut, "quantize it"
        return
    for dequantize in filter(None, quantized):
        quantize = dequantize.inputs[0].producer() if dequantize.inputs[0] is not None else None
        source = quantize.inputs[0] if quantize is not None and quantize.op_type == "QuantizeLinear" else None
        if source is not None and _is_quantized_layer(source):
            reason = "the branch of the layer that the Add could be fused into is quantized"
            yield reason, source, "quantize the residual input only"
            return


def _concat(model: Model, node: oir.Node) -> _Broken:
    """Of a Concat: quantized inputs share a scale."""
    scales = set()
    for value in node.inputs:
        dequantize = _dequantizer(value)
        scale = None if dequantize is None else model.constant(dequantize.inputs[1])
        if scale is not None:
            scales.add(scale.tobytes())
    if len(scales) > 1:
        yield "its inputs have different scales, so they are requantized", node.outputs[0], "train with one scale"


_RULES = {
    "QuantizeLinear": (_grid, _pair, _fusion),
    "DequantizeLinear": (_grid,),
    **dict.fromkeys(_LAYERS, (_operands, _weight, _bias)),
    "Add": (_residual,),
    "Concat": (_concat,),
}


def _dequantizer(value: oir.Value | None) -> oir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _constant_behind(model: Model, node: oir.Node) -> npt.NDArray[Any] | None:
    """The constant that a Quantize or Dequantize, or the Quantize before it, works on."""
    value = node.inputs[0]
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "QuantizeLinear":
        value = producer.inputs[0]
    return model.constant(value)


def _is_quantized_layer(value: oir.Value) -> bool:
    """Whether a convolution with quantized inputs computes ``value`` for its reader alone."""
    node = value.producer()
    if node is None or node.op_type not in ("Conv", "ConvTranspose") or len(value.uses()) > 1:
        return False
    return _dequantizer(node.inputs[0]) is not None


def _readers_behind(quantize: oir.Node) -> Iterator[oir.Node]:
    for use in quantize.outputs[0].uses():
        if use.node.op_type == "DequantizeLinear":
            yield from (behind.node for behind in use.node.outputs[0].uses())
