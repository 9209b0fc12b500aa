"""Turn the stride of an image network's first convolution into channels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import Fact, Model
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.registry import register
from qat2int8.passes.stem import Stem, find_stem


@register
@dataclass(frozen=True)
class StemSpaceToDepth(Pass):
    """Run a 3-channel kernel of stride 2 as one of half the size and stride 1 on four times the channels.

    ``SpaceToDepth`` puts each 2x2 block of pixels into channels, and the kernel's taps are sorted alike. Every
    product is one of the original's or meets a zero, so the result is the same bit for bit. Runs of 12 bytes are
    gathered much faster than runs of 3: the 7x7 stem of a ResNet-50 takes two thirds of the time
    (``benchmarks/speed.py``). Small kernels gain more from ``pad-stem-channels``, but where the image comes with
    its channels last padding costs more than it gives: there they are folded too (3x3 with 16 to 32 outputs: 1.1
    to 1.4x), unless there are so few outputs that moving the image is most of the work (8 outputs: 0.9x).

    Only where height and width are known and even.

    Options:
        smallest_kernel: kernels smaller than this, in either direction, are left alone.
        fewest_outputs: but not those with at least so many outputs on an image with its channels last.
    """

    name = "stem-space-to-depth"
    requires = frozenset({Fact.QDQ_PLACED})
    # Exact in integers. A float convolution adds in another order, which the quantizer behind it may round apart.
    numerics = Numerics.QUANTIZING
    per_target = True

    smallest_kernel: int = 5
    fewest_outputs: int = 16

    def run(self, model: Model, ctx: Context) -> PassResult:
        folded = 0
        for node in model.nodes("Conv"):
            stem = find_stem(model, node)
            if stem is not None and self._fold(model, stem):
                folded += 1
        return PassResult({"folded": folded})

    def _fold(self, model: Model, stem: Stem) -> bool:
        attributes, kernel = stem.conv.attributes, stem.weights.shape[2:]
        size = _even_size(stem.activations)
        pads = tuple(attributes.get_ints("pads", (0, 0, 0, 0)))
        plain = (
            tuple(attributes.get_ints("strides", (1, 1))) == (2, 2)
            and tuple(attributes.get_ints("dilations", (1, 1))) == (1, 1)
            and attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
        )
        if size is None or len(kernel) != 2 or not plain or not self._pays(stem):
            return False
        axes = [_axis(size[i], kernel[i], pads[i], pads[i + 2]) for i in (0, 1)]
        if any(axis.end < 0 for axis in axes):
            return False
        fold = oir.node(
            "SpaceToDepth", [stem.activations], {"blocksize": 2}, name=f"{stem.conv.name}_SpaceToDepth"
        )
        stem.replace(model, fold, f"{stem.activations.name}_blocks", _sorted_taps(stem, axes))
        attributes["pads"] = oir.AttrInt64s("pads", [*(axis.begin for axis in axes), *(axis.end for axis in axes)])
        attributes["strides"] = oir.AttrInt64s("strides", [1, 1])
        attributes["kernel_shape"] = oir.AttrInt64s("kernel_shape", [axis.taps for axis in axes])
        return True

    def _pays(self, stem: Stem) -> bool:
        outputs, _, *kernel = stem.weights.shape
        return min(kernel) >= self.smallest_kernel or (stem.is_channels_last and outputs >= self.fewest_outputs)


@dataclass(frozen=True)
class _Axis:
    """One direction of the convolution on blocks: ``shift`` leading zero taps bring it onto block borders."""

    shift: int
    taps: int
    begin: int
    end: int


def _axis(size: int, kernel: int, begin: int, end: int) -> _Axis:
    shift = begin % 2
    taps = (kernel + shift + 1) // 2
    outputs = (size + begin + end - kernel) // 2 + 1
    block_begin = (begin + shift) // 2
    return _Axis(shift, taps, block_begin, outputs - 1 + taps - size // 2 - block_begin)


def _sorted_taps(stem: Stem, axes: list[_Axis]) -> npt.NDArray[np.generic]:
    """[M, C, kh, kw] as [M, 4C, kh', kw'], in SpaceToDepth's order: row and column in the block, then C."""
    weights = stem.weights
    outputs, channels = weights.shape[:2]
    high, wide = axes
    spread = [
        (axis.shift, 2 * axis.taps - kernel - axis.shift)
        for axis, kernel in zip(axes, weights.shape[2:], strict=True)
    ]
    taps = np.pad(weights, [(0, 0), (0, 0), *spread], constant_values=stem.zero)
    blocks = taps.reshape(outputs, channels, high.taps, 2, wide.taps, 2).transpose(0, 3, 5, 1, 2, 4)
    return np.ascontiguousarray(blocks.reshape(outputs, 4 * channels, high.taps, wide.taps))


def _even_size(value: oir.Value) -> tuple[int, int] | None:
    shape = value.shape
    if shape is None or len(shape) != 4:
        return None
    high, wide = shape[2], shape[3]
    if not isinstance(high, int) or not isinstance(wide, int) or high % 2 or wide % 2:
        return None
    return high, wide
