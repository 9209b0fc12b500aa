"""Give depthwise convolutions a channel count their integer kernel likes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as oir

from qat2int8.ir import Fact, Model
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.integer_conv import (
    Array,
    ConstantOperand,
    IntegerConv,
    integers_behind,
    read_integer_conv,
)
from qat2int8.passes.qdq_step import read_step
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class PadChannels(Pass):
    """Pad the channels that a depthwise convolution works on to a multiple of 16, with channels of zero.

    onnxruntime has a fast depthwise kernel for multiples of 16 channels (``MlasConvSymPackWSize`` in its
    ``mlas/lib/convsym.cpp``) and a slow general one for other counts. The convolution that computes the
    channels gets outputs of weight and bias 0, the depthwise ones channels of weight 0, and whoever reads the
    result input channels of weight 0. What the added channels hold meets zeros only, so the result is the same
    bit for bit.

    Only where every tensor in between is quantized once and read by Convs that are dense or depthwise: an Add, a
    Concat or a reader of floats would see the new channels. Not where a depthwise weight has a zero point: the
    fast kernel does not take it at any count.

    Options:
        multiple: what the channel count becomes a multiple of.
        largest_growth: by what factor it may grow at most.
    """

    name = "pad-channels"
    requires = frozenset({Fact.QDQ_PLACED})
    # Exact in integers; see stem-space-to-depth for floats.
    numerics = Numerics.QUANTIZING
    per_target = True

    multiple: int = 16
    largest_growth: float = 2.0

    def run(self, model: Model, ctx: Context) -> PassResult:
        padded = 0
        for node in model.nodes("Conv"):
            layer = read_integer_conv(model, node)
            if layer is None or not layer.is_dense or not self._fits(layer.outputs):
                continue
            tree = _Tree.below(model, layer)
            if tree is not None and tree.pays:
                tree.pad(model, -layer.outputs % self.multiple)
                padded += 1
        return PassResult({"padded": padded})

    def _fits(self, channels: int) -> bool:
        missing = -channels % self.multiple
        return missing > 0 and channels + missing <= self.largest_growth * channels


@dataclass(eq=False)
class _Tree:
    """A dense layer, the depthwise ones behind it, and the dense ones that read any of their outputs.

    Attributes:
        root, depthwise, readers: these layers.
        tensors: all that lies between them.
    """

    root: IntegerConv
    depthwise: list[IntegerConv] = field(default_factory=list)
    readers: list[IntegerConv] = field(default_factory=list)
    tensors: list[oir.Value] = field(default_factory=list)

    @classmethod
    def below(cls, model: Model, root: IntegerConv) -> _Tree | None:
        """All layers that see the output channels of ``root``; None where anything else sees them."""
        tree, waiting = cls(root), [root]
        while waiting:
            tensors = integers_behind(model, waiting.pop().node)
            if tensors is None or tensors[-1].is_graph_output():
                return None
            tree.tensors += tensors
            for use in tensors[-1].uses():
                layers = _readers(model, use.node) if use.idx == 0 else None
                if layers is None:
                    return None
                tree.tensors.append(use.node.outputs[0])
                tree.readers += [layer for layer in layers if layer.is_dense]
                tree.depthwise += [layer for layer in layers if layer.is_depthwise]
                waiting += [layer for layer in layers if layer.is_depthwise]
        return tree

    @property
    def pays(self) -> bool:
        """Whether it has depthwise layers, and all of them can take the fast kernel."""
        weights = [layer.weight for layer in self.depthwise]
        signed = all(weight.levels.dtype == np.int8 and not np.any(weight.step.zero_point) for weight in weights)
        return bool(weights) and signed

    def pad(self, model: Model, missing: int) -> None:
        """Add ``missing`` channels of zero to everything."""
        channels = self.root.outputs + missing
        for layer in (self.root, *self.depthwise):
            for operand in (layer.weight, layer.bias):
                if operand is not None:
                    kept = np.minimum(np.arange(channels), self.root.outputs - 1)
                    operand.replace(model, layer.node, _padded(operand, 0, missing), kept)
        for layer in self.depthwise:
            layer.node.attributes["group"] = oir.AttrInt64("group", channels)
        for layer in self.readers:
            layer.weight.replace(model, layer.node, _padded(layer.weight, 1, missing))
        for tensor in self.tensors:
            if tensor.shape is not None:
                batch, _, *space = tensor.shape
                tensor.shape = oir.Shape([batch, channels, *space])


def _readers(model: Model, dequantize: oir.Node) -> list[IntegerConv] | None:
    """The layers behind one reader of integers; None where it is no Dequantize that only such layers read."""
    step = read_step(model, dequantize)
    if step is None or not step.movable or dequantize.graph is not model.graph:
        return None
    dequantized = dequantize.outputs[0]
    layers = [read_integer_conv(model, node) if index == 0 else None for node, index in dequantized.uses()]
    found = [layer for layer in layers if layer is not None and (layer.is_dense or layer.is_depthwise)]
    return None if dequantized.is_graph_output() or len(found) < len(layers) else found


def _padded(operand: ConstantOperand, axis: int, missing: int) -> Array:
    """The integers with ``missing`` more of 0.0 behind them along ``axis``."""
    levels, zeros = operand.levels, operand.step.zero_point.astype(operand.levels.dtype)
    widths = [(0, missing) if i == axis else (0, 0) for i in range(levels.ndim)]
    padded = np.pad(levels, widths)
    added = tuple(slice(levels.shape[axis], None) if i == axis else slice(None) for i in range(levels.ndim))
    if operand.step.axis is not None:
        # Along the output channels: the new ones have the step of the last.
        zeros = (zeros[-1:] if axis == 0 else zeros).reshape(-1, *[1] * (levels.ndim - 1))
    padded[added] = zeros
    return padded
