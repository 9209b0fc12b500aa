"""Give the first convolution of an image network a channel count its integer kernel likes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from qat2int8.ir import Fact, Model
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.registry import register
from qat2int8.passes.stem import CHANNELS, find_stem


@register
@dataclass(frozen=True)
class PadStemChannels(Pass):
    """Pad the integer input of a 3-channel convolution to 4 channels, and its weight with zeros.

    onnxruntime gathers the patches of an NHWC tensor channel run by channel run, and runs of 3 bytes are slow:
    with 4 the 3x3 stem of a MobileNet-V2 takes half the time, 7 % of the network (``benchmarks/speed.py``). The
    padding holds the zero point and meets weights of zero, so the result is the same bit for bit.

    Not where the image comes with its channels last: there the Pad writes runs of four bytes, one pixel each, and
    takes longer than the convolution (171 of 630 us in a MobileNet-V1 0.25/128).

    Options:
        channels: how many input channels a stem is padded to.
    """

    name = "pad-stem-channels"
    requires = frozenset({Fact.QDQ_PLACED})
    # Exact in integers; see stem-space-to-depth for floats.
    numerics = Numerics.QUANTIZING
    per_target = True

    channels: int = 4

    def run(self, model: Model, ctx: Context) -> PassResult:
        return PassResult({"padded": sum(self._pad(model, node) for node in model.nodes("Conv"))})

    def _pad(self, model: Model, conv: oir.Node) -> bool:
        stem, missing = find_stem(model, conv), self.channels - CHANNELS
        if stem is None or missing <= 0 or stem.is_channels_last:
            return False
        rank = stem.weights.ndim
        pads = np.zeros(2 * rank, np.int64)
        pads[rank + 1] = missing
        amounts = model.add_initializer(f"{conv.name}_pads", pads)
        pad = oir.node("Pad", [stem.activations, amounts, stem.data.inputs[2]], name=f"{conv.name}_Pad")
        widths = [(0, missing) if axis == 1 else (0, 0) for axis in range(rank)]
        weights = np.pad(stem.weights, widths, constant_values=stem.zero)
        stem.replace(model, pad, f"{stem.activations.name}_padded", weights)
        return True
