"""Give tensors the range they took on data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from qat2int8.ir import (
    INT8,
    Code,
    Diagnostic,
    Fact,
    Interval,
    Model,
    PassFailed,
    Provenance,
    QuantParams,
    Severity,
    Target,
)
from qat2int8.ir.ranges import Ranges
from qat2int8.passes.base import Context, Numerics, Pass, PassResult, RangeSource
from qat2int8.passes.registry import register
from qat2int8.passes.tensors_to_calibrate import tensors_to_calibrate


@register
@dataclass(frozen=True)
class GatherCalibratedScales(Pass):
    """Record a grid from calibration for every activation that integer kernels need one for and that has none.

    The ranges come from the context: the model is run on data as it is at this point, layers fused and fake quant
    removed, or they are read from a table by the names of tensors. A range is cut to what its producer can compute
    (never below zero behind a Relu). Trained and derived grids are left alone.

    Options:
        symmetric: steps on both sides of zero alike, for tensors that can be negative; else the grid holds the
            range and no more.

    Raises:
        PassFailed: the context has no ranges.
        DataError: the data do not fit the model.
    """

    name = "gather-calibrated-scales"
    requires = frozenset({Fact.NO_FAKE_QUANT, Fact.CONSTANTS_LIFTED})
    invalidates = frozenset({Fact.PROPAGATED})
    numerics = Numerics.QUANTIZING

    symmetric: bool = False

    def run(self, model: Model, ctx: Context) -> PassResult:
        wanted = tensors_to_calibrate(model, ctx.target)
        if not wanted:
            return PassResult({"calibrated": 0})
        if ctx.ranges is None:
            raise PassFailed(
                "there are neither data nor a table to take ranges from",
                remedy="use 'qat2int8 quantize --data', or 'qat2int8 convert --data' for a model with fake quant",
            )
        found = ctx.ranges.ranges(model, wanted)
        possible = Ranges(model)
        notes: list[Diagnostic] = []
        calibrated = 0
        for value in wanted:
            if value not in found:
                notes.append(self._unknown(value, ctx.ranges))
                continue
            span = found[value] & possible.raw(value)
            if span.width == 0.0:
                notes.append(self._constant(value, span))
            model.scales.set(value, self._grid(span, ctx.target, ctx.ranges.origin))
            calibrated += 1
        return PassResult({"calibrated": calibrated}, tuple(notes))

    def _grid(self, span: Interval, target: Target, origin: str) -> QuantParams:
        if self.symmetric and span.lo < 0.0:
            step = np.float32(max(span.amax / INT8.qmax, float(np.finfo(np.float32).tiny)))
            return QuantParams.make(step, 0, INT8, source=Provenance.CALIBRATED, origin=origin)
        return target.grid_for(span, source=Provenance.CALIBRATED, origin=origin)

    def _unknown(self, value: oir.Value, ranges: RangeSource) -> Diagnostic:
        return self.note(
            Code.SCALE_MISSING,
            f"nothing is known of this tensor from {ranges.origin}",
            value=value.name or "",
            node=_maker(value),
            remedy="calibrate this very model",
        )

    def _constant(self, value: oir.Value, span: Interval) -> Diagnostic:
        return self.note(
            Code.CALIBRATED_CONSTANT,
            f"it was {span.lo:.6g} in every sample, so its grid tells no other value apart",
            value=value.name or "",
            node=_maker(value),
            severity=Severity.WARNING,
            remedy="calibrate on samples that differ; if it is so by design, nothing is lost",
        )


def _maker(value: oir.Value) -> str:
    producer = value.producer()
    return "" if producer is None else producer.name or ""
