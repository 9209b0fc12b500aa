"""Compute neighbouring pixels at once in the first convolution of an image network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from qat2int8.ir import Fact, Model
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.integer_conv import Array, IntegerConv, integers_behind, read_integer_conv
from qat2int8.passes.registry import register
from qat2int8.passes.stem import CHANNELS, Stem, find_stem

STRIDE = 2
PIXELS = (4, 2)
"""How many outputs side by side may become channels of one; their blocks of the image have 24 or 12 channels, and
the runtime's fast kernels ask for a multiple of 4."""


@register
@dataclass(frozen=True)
class FoldStemWidth(Pass):
    """Run a 3-channel kernel of stride 2 on blocks of pixels, two or four of its outputs at a time.

    Four pixels side by side, of an image with its channels last, are 12 channels of one, and two outputs side by
    side are one of twice the channels: both are Reshapes, which cost nothing in the layout the runtime's kernels
    work on. Each output has its own copy of the kernel, at its place in the block. Every product is one of the
    original's or meets a zero, so the result is the same bit for bit.

    There are half as many positions to gather pixels for, and a third as many runs of bytes, which are most of the
    work of a stem (``benchmarks/layers.py``). With a weight zero point as well as without.

    Only where the width is known and fits the blocks.

    Options:
        largest_kernel: kernels wider than this are left to ``stem-space-to-depth``, which multiplies fewer zeros.
        most_channels: four outputs where they have no more channels than this together, else two.
    """

    name = "fold-stem-width"
    requires = frozenset({Fact.QDQ_PLACED})
    # Exact in integers; see stem-space-to-depth for floats.
    numerics = Numerics.QUANTIZING
    per_target = True

    largest_kernel: int = 4
    most_channels: int = 32

    def run(self, model: Model, ctx: Context) -> PassResult:
        return PassResult({"folded": sum(self._fold(model, node) for node in model.nodes("Conv"))})

    def _fold(self, model: Model, node: oir.Node) -> bool:
        stem, layer, tensors = find_stem(model, node), read_integer_conv(model, node), integers_behind(model, node)
        if stem is None or layer is None or tensors is None or not stem.is_channels_last:
            return False
        width = _width(stem)
        if width is None or stem.weights.shape[3] > self.largest_kernel or tensors[-1].is_graph_output():
            return False
        few = [pixels for pixels in PIXELS if pixels * layer.outputs <= self.most_channels]
        found = (_Axis.of(node, width, stem.weights.shape[3], pixels) for pixels in few or PIXELS[-1:])
        axis = next((axis for axis in found if axis is not None), None)
        if axis is None:
            return False
        self._read_blocks(model, stem, axis, width)
        self._copy_kernel(model, layer, stem, axis)
        _set_attributes(node, axis, stem.weights.shape[2])
        self._unfold(model, layer, tensors, axis)
        return True

    def _read_blocks(self, model: Model, stem: Stem, axis: _Axis, width: int) -> None:
        """Blocks of the image in front of a Dequantize of their own."""
        transpose, image = stem.activations.producer(), stem.activations
        assert transpose is not None
        name = image.name or ""
        sizes = model.add_initializer(
            f"{name}_sizes", np.asarray([0, 0, width // axis.block, axis.block * CHANNELS], np.int64)
        )
        blocks = _named(model, oir.node("Reshape", [transpose.inputs[0], sizes]), f"{name}_blocks", image)
        planes = _named(
            model, oir.node("Transpose", [blocks.outputs[0]], {"perm": _PLANES}), f"{name}_block_planes", image
        )
        data = oir.node("DequantizeLinear", [planes.outputs[0], *stem.data.inputs[1:]])
        data.attributes.update(stem.data.attributes)
        _named(model, data, f"{name}_blocks_dequantized", stem.data.outputs[0])
        model.graph.insert_before(stem.conv, [blocks, planes, data])
        stem.conv.replace_input_with(0, data.outputs[0])
        for old in (stem.data, transpose):
            if not old.outputs[0].uses() and not old.outputs[0].is_graph_output():
                model.remove(old)

    def _copy_kernel(self, model: Model, layer: IntegerConv, stem: Stem, axis: _Axis) -> None:
        """Weight and bias of the leftmost output, then those of its neighbours."""
        channels = np.tile(np.arange(layer.outputs), axis.pixels)
        layer.weight.replace(model, layer.node, _copies(stem, axis), channels)
        if layer.bias is not None:
            layer.bias.replace(model, layer.node, np.tile(layer.bias.levels, axis.pixels), channels)

    def _unfold(self, model: Model, layer: IntegerConv, tensors: list[oir.Value], axis: _Axis) -> None:
        """Let the readers of the last of ``tensors`` read the pixels one by one, under its old name."""
        last = tensors[-1]
        writer, readers, name, shape = last.producer(), list(last.uses()), last.name or "", last.shape
        assert writer is not None
        for tensor in tensors:
            if tensor.shape is not None:
                batch, _, height, _ = tensor.shape
                tensor.shape = oir.Shape([batch, axis.pixels * layer.outputs, height, axis.blocks])
        sizes = model.add_initializer(
            f"{name}_sizes", np.asarray([0, 0, axis.pixels * axis.blocks, layer.outputs], np.int64)
        )
        last.name = model.unique_name(f"{name}_pairs")
        rows = _named(model, oir.node("Transpose", [last], {"perm": _ROWS}), f"{name}_rows", last)
        pixels = _named(model, oir.node("Reshape", [rows.outputs[0], sizes]), f"{name}_pixels", last)
        planes = oir.node("Transpose", [pixels.outputs[0]], {"perm": _PLANES})
        _named(model, planes, f"{name}_planes", last)
        planes.outputs[0].name, planes.outputs[0].shape = name, shape
        model.graph.insert_after(writer, [rows, pixels, planes])
        model.scales.move_trace(last, planes.outputs[0])
        for use in readers:
            use.node.replace_input_with(use.idx, planes.outputs[0])


_PLANES, _ROWS = [0, 3, 1, 2], [0, 2, 3, 1]


@dataclass(frozen=True)
class _Axis:
    """The width of the convolution on blocks.

    Attributes:
        pixels: how many outputs make a block.
        begin, end: how many blocks of padding stand on either side.
        taps: how many blocks the kernel spans.
        shift: how many pixels the leftmost output's kernel begins behind the first block's first.
        blocks: how many blocks of outputs there are.
    """

    pixels: int
    begin: int
    end: int
    taps: int
    shift: int
    blocks: int

    @classmethod
    def of(cls, conv: oir.Node, width: int, kernel: int, pixels: int) -> _Axis | None:
        """None where the convolution is another one, or its outputs make no whole blocks."""
        attributes = conv.attributes
        pads = tuple(attributes.get_ints("pads", (0, 0, 0, 0)))
        if (
            attributes.get_ints("strides", (1, 1))[1] != STRIDE
            or tuple(attributes.get_ints("dilations", (1, 1))) != (1, 1)
            or attributes.get_string("auto_pad", "NOTSET") != "NOTSET"
        ):
            return None
        left, right, block = pads[1], pads[3], STRIDE * pixels
        outputs = (width + left + right - kernel) // STRIDE + 1
        begin = -(-left // block)
        shift = begin * block - left
        taps = (shift + STRIDE * (pixels - 1) + kernel - 1) // block + 1
        blocks = outputs // pixels
        end = blocks - 1 + taps - width // block - begin
        if width % block or outputs % pixels or outputs <= 0 or end < 0:
            return None
        return cls(pixels, begin, end, taps, shift, blocks)

    @property
    def block(self) -> int:
        """How many pixels of the image make a block."""
        return STRIDE * self.pixels


def _copies(stem: Stem, axis: _Axis) -> Array:
    """[M, 3, kh, kw] as [pixels * M, block * 3, kh, taps], for one output after the other."""
    weights = stem.weights
    outputs, channels, high, wide = weights.shape
    spread = np.full((axis.pixels, outputs, channels, high, axis.taps * axis.block), stem.zero, weights.dtype)
    for pixel in range(axis.pixels):
        first = axis.shift + pixel * STRIDE
        spread[pixel, ..., first : first + wide] = weights
    blocks = spread.reshape(axis.pixels * outputs, channels, high, axis.taps, axis.block).transpose(0, 4, 1, 2, 3)
    return np.ascontiguousarray(blocks.reshape(axis.pixels * outputs, axis.block * channels, high, axis.taps))


def _set_attributes(conv: oir.Node, axis: _Axis, high: int) -> None:
    attributes = conv.attributes
    top, _, bottom, _ = attributes.get_ints("pads", (0, 0, 0, 0))
    stride, _ = attributes.get_ints("strides", (1, 1))
    attributes["pads"] = oir.AttrInt64s("pads", [top, axis.begin, bottom, axis.end])
    attributes["strides"] = oir.AttrInt64s("strides", [stride, 1])
    attributes["kernel_shape"] = oir.AttrInt64s("kernel_shape", [high, axis.taps])


def _named(model: Model, node: oir.Node, name: str, like: oir.Value | None) -> oir.Node:
    """``node`` and its output under names nobody has, the output of the type of ``like``."""
    node.name = model.unique_name(f"{name}_{node.op_type}")
    node.outputs[0].name = model.unique_name(name)
    node.outputs[0].type = None if like is None else like.type
    return node


def _width(stem: Stem) -> int | None:
    """Of the image, where it is known."""
    transpose = stem.activations.producer()
    image = transpose.inputs[0] if transpose is not None else None
    shape = image.shape if image is not None else None
    width = shape[2] if shape is not None and len(shape) == 4 else None
    return width if isinstance(width, int) else None
