"""Use the whole unsigned range for tensors that are never negative."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from qat2int8.ir import UINT8, Fact, Interval, Model, QuantDType, QuantParams
from qat2int8.ir.ranges import VALUE_PRESERVING, Ranges
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.registry import register
from qat2int8.passes.scale_groups import moved


class ReluEncoding(enum.StrEnum):
    """How the upper half of a signed grid becomes a uint8 grid; see ``docs/decisions.md``."""

    EXACT = "exact"
    """Step ``s`` and an integer Clip at 127: steps and saturation as trained, for one cheap node a tensor."""
    REFINE = "refine"
    """Step ``127 * s / 255``: saturates where training did, with finer steps (what PaddlePaddle does)."""
    SAME_GRID = "same-grid"
    """Step ``s``: the trained steps, but saturation moves out to ``255 * s``."""


@register
@dataclass(frozen=True)
class UpdateReluOutputScales(Pass):
    """Turn signed grids of tensors that cannot be negative into unsigned ones with zero at the bottom.

    A runtime absorbs a Relu into the quantizer behind it only if the grid starts at zero. Whether a tensor can
    be negative is read from forward ranges, not from its producer's type: a MaxPool behind a Relu counts. Behind a
    Clip the grid ends where both do, because the quantizer can absorb the Clip only then: ``exact`` ends at the
    level that the bound rounds to, which is what clamping before rounding comes to. ``same-grid`` cannot, and
    refines there unless it ends inside the Clip.

    Where a grid ends is part of what was trained: exporters that quantize leave out a Relu6 whose bound the grid
    repeats. That is why ``exact`` is the default and not the slightly faster ``same-grid``.

    Targets whose grids have zero in the middle keep signed grids; on signed integers with any zero point, zero
    becomes the lowest level when quantizers are placed. After PaddlePaddle's
    ``_update_relu_output_scales``, whose doubling of the scale is a defect that is not repeated here.

    Options:
        encoding: ``exact`` (default), ``refine`` or ``same-grid``.
    """

    name = "update-relu-output-scales"
    requires = frozenset({Fact.NO_FAKE_QUANT})
    numerics = Numerics.QUANTIZING
    per_target = True

    encoding: ReluEncoding = ReluEncoding.EXACT

    def run(self, model: Model, ctx: Context) -> PassResult:
        ranges = Ranges(model)
        clamps = _upper_clamps(model, ranges)
        updated = 0
        for value, params in model.scales.items():
            if value.is_initializer() or params.per_channel:
                continue
            clamp = clamps.get(value, math.inf)
            if (params.interval.lo >= 0.0 and params.interval.hi <= clamp) or not ranges.raw(value).nonnegative:
                continue
            encoded = self._encode(params, clamp)
            if encoded is None or encoded.same_grid(params):
                continue
            model.scales.set(value, encoded)
            updated += 1
        return PassResult({"updated": updated})

    def _encode(self, params: QuantParams, clamp: float) -> QuantParams | None:
        """``params`` from zero upwards, for values that end at ``clamp``; None where uint8 has no such grid."""
        if params.dtype.bits > UINT8.bits:
            return None
        top_level = params.dtype.qmax - int(params.zero_point)
        step = float(params.scale)
        top = min(top_level * step, clamp)
        zero = np.zeros((), np.int32)
        if not top > 0.0:
            return None
        if params.dtype.bits < UINT8.bits or self.encoding is ReluEncoding.EXACT:
            if clamp < top_level * step:
                top_level = min(top_level, int(np.rint(np.float32(clamp) / params.scale)))
            return params.with_(zero_point=zero, dtype=QuantDType.up_to(top_level)) if top_level > 0 else None
        if self.encoding is not ReluEncoding.SAME_GRID or UINT8.qmax * step > clamp:
            refined = np.asarray(top / UINT8.qmax, np.float32)
            # A bound below what float32 can divide leaves no step.
            return params.with_(scale=refined, zero_point=zero, dtype=UINT8) if refined > 0.0 else None
        return params.with_(zero_point=zero, dtype=UINT8, trained=Interval(0.0, top))


def _upper_clamps(model: Model, ranges: Ranges) -> dict[oir.Value, float]:
    """The bounds of the Clips that tensors come from, seen through data movement."""
    clamps: dict[oir.Value, float] = {}
    for node in model.nodes():
        if node.domain != "" or not node.inputs or node.inputs[0] is None:
            continue
        if node.op_type == "Clip":
            clamps[node.outputs[0]] = ranges.clip_bounds(node)[1].hi
        elif node.op_type in VALUE_PRESERVING and node.inputs[0] in clamps:
            clamps.update(dict.fromkeys(moved(node), clamps[node.inputs[0]]))
    return clamps
