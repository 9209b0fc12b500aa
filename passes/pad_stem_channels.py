"""Give the first convolution of an image network a channel count its integer kernel likes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import Fact, Model
from qat2int8.passes.base import Context, Pass, PassResult
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class PadStemChannels(Pass):
    """Pad the integer input of a 3-channel convolution to 4 channels, and its weight with zeros.

    onnxruntime gathers the patches of an NHWC tensor channel run by channel run, and runs of 3 bytes are slow:
    with 4 the 3x3 stem of a MobileNet-V2 takes half the time, 7 % of the network (``benchmarks/speed.py``). The
    padding holds the zero point and meets zero weights, so the result is the same bit for bit.

    Options:
        channels: how many input channels a stem is padded to.
    """

    name = "pad-stem-channels"
    requires = frozenset({Fact.QDQ_PLACED})

    channels: int = 4

    def run(self, model: Model, ctx: Context) -> PassResult:
        padded = sum(self._pad(model, node) for node in model.nodes("Conv"))
        return PassResult({"padded": padded})

    def _pad(self, model: Model, conv: oir.Node) -> bool:
        data, weights = _dequantizer(conv.inputs[0]), _dequantizer(conv.inputs[1])
        if data is None or weights is None or conv.attributes.get_int("group", 1) != 1:
            return False
        integers, zero_point = model.constant(weights.inputs[0]), model.constant(data.inputs[2])
        if (
            integers is None
            or integers.shape[1] != _STEM
            or self.channels <= _STEM
            or not _is_zero(model, weights)
        ):
            return False
        activations = data.inputs[0]
        if zero_point is None or zero_point.size != 1 or activations is None:
            return False
        missing = self.channels - _STEM
        pads = np.zeros(2 * integers.ndim, np.int64)
        pads[integers.ndim + 1] = missing
        pad = oir.node(
            "Pad",
            [activations, model.add_initializer(f"{conv.name}_pads", pads), data.inputs[2]],
            name=model.unique_name(f"{conv.name}_Pad"),
        )
        wider = pad.outputs[0]
        wider.name = model.unique_name(f"{activations.name}_padded")
        wider.type = activations.type
        twin = oir.node("DequantizeLinear", [wider, *data.inputs[1:]], name=model.unique_name(f"{wider.name}_DQ"))
        twin.outputs[0].name = model.unique_name(f"{wider.name}_dequantized")
        twin.outputs[0].type = data.outputs[0].type
        model.graph.insert_before(conv, [pad, twin])
        conv.replace_input_with(0, twin.outputs[0])
        conv.replace_input_with(1, _padded_weight(model, conv, weights, integers, missing))
        for old in (data, weights):
            if not old.outputs[0].uses() and not old.outputs[0].is_graph_output():
                model.remove(old)
        return True


_STEM = 3
"""Channels of an image; other narrow inputs were not faster padded."""


def _padded_weight(
    model: Model, conv: oir.Node, weights: oir.Node, integers: npt.NDArray[np.generic], missing: int
) -> oir.Value:
    widths = [(0, 0)] * integers.ndim
    widths[1] = (0, missing)
    name = weights.inputs[0].name if weights.inputs[0] is not None else conv.name
    wider = model.add_initializer(f"{name}_padded", np.pad(integers, widths))
    twin = oir.node("DequantizeLinear", [wider, *weights.inputs[1:]], name=model.unique_name(f"{name}_padded_DQ"))
    twin.attributes.update(weights.attributes)
    twin.outputs[0].name = model.unique_name(f"{name}_padded_dequantized")
    twin.outputs[0].type = weights.outputs[0].type
    twin.outputs[0].shape = oir.Shape(wider.shape or ())
    model.graph.insert_before(conv, twin)
    return twin.outputs[0]


def _dequantizer(value: oir.Value | None) -> oir.Node | None:
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear" or node.domain != "" or len(node.inputs) < 3:
        return None
    return node


def _is_zero(model: Model, weights: oir.Node) -> bool:
    zero_point = model.constant(weights.inputs[2])
    return zero_point is not None and not np.any(zero_point) and weights.attributes.get_int("axis", 1) != 1
