"""Let average pools run on the integer kernel of a convolution."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from qat2int8.ir import INT8, Fact, Model, Provenance, QuantParams
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class AveragePoolToConv(Pass):
    """Replace AveragePool between two grids by a depthwise Conv whose weights are all ``1 / area``.

    onnxruntime's QLinearAveragePool takes 3 to 25 times as long as the float pool; a depthwise QLinearConv is
    faster than both. On integers all weights are 1 with step ``1 / area``, so nothing is rounded but the result.

    Only where padding counts as zeros (no pads, or ``count_include_pad``), the channel count is known, and both
    the input and the output lie on a grid: else the pool runs in float anyway. A model without a single weight on
    a grid is left alone, for its layers are all in float.
    """

    name = "average-pool-to-conv"
    requires = frozenset({Fact.NO_FAKE_QUANT})
    numerics = Numerics.CLOSE
    per_target = True

    def run(self, model: Model, ctx: Context) -> PassResult:
        if not any(value.is_initializer() for value in model.scales):
            return PassResult()
        replaced = 0
        for node in model.nodes("AveragePool"):
            source, result = node.inputs[0], node.outputs[0]
            gridded = all(_has_grid(model, ctx, value) for value in (source, result))
            if gridded and "Conv" in ctx.target.ops and _is_convolution(node):
                _replace(model, node)
                replaced += 1
        return PassResult({"replaced": replaced})


def _has_grid(model: Model, ctx: Context, value: oir.Value | None) -> bool:
    params = model.scales.get(value)
    return params is not None and ctx.target.lower(params) is not None


def _is_convolution(node: oir.Node) -> bool:
    attributes, source = node.attributes, node.inputs[0]
    if source is None or source.shape is None or source.dtype is not oir.DataType.FLOAT or len(source.shape) < 3:
        return False
    padded = any(attributes.get_ints("pads", ())) and not attributes.get_int("count_include_pad", 0)
    plain = (
        attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")
        and not attributes.get_int("ceil_mode", 0)
        and all(step == 1 for step in attributes.get_ints("dilations", ()))
    )
    return plain and not padded and isinstance(source.shape[1], int)


def _replace(model: Model, node: oir.Node) -> None:
    source, result = node.inputs[0], node.outputs[0]
    assert source is not None
    assert source.shape is not None
    channels, kernel = int(str(source.shape[1])), tuple(node.attributes.get_ints("kernel_shape", ()))
    step = np.float32(1.0 / math.prod(kernel))
    weight = model.add_initializer(f"{node.name}.weight", np.full((channels, 1, *kernel), step, np.float32))
    grid = QuantParams.make(
        step, 0, INT8, source=Provenance.COMPUTED, origin=f"the area of AveragePool '{node.name}'"
    )
    model.scales.set(weight, grid)
    kept = {
        name: node.attributes[name]
        for name in ("auto_pad", "kernel_shape", "pads", "strides")
        if name in node.attributes
    }
    conv = oir.Node(
        "", "Conv", [source, weight], [*kept.values(), oir.AttrInt64("group", channels)], name=node.name
    )
    model.insert_before(node, conv)
    model.replace_value(result, conv.outputs[0])
    model.remove(node)
