"""Give untrained weights of quantized layers a grid from their own values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qat2int8.ir import (
    Code,
    Contract,
    Diagnostic,
    Fact,
    Model,
    Provenance,
    QuantDType,
    QuantParams,
    Severity,
)
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.output_channel import output_channel_axis
from qat2int8.passes.registry import register

_WEIGHTS = QuantDType(8, signed=True, narrow_range=True)


@register
@dataclass(frozen=True)
class ComputeWeightScales(Pass):
    """``step = max|w| / 127`` per output channel, for float32 weights that have no grid.

    Only where the layer's data input has one: a layer whose input was not fake-quantized was left float on
    purpose. Trained grids are never touched. A channel of zeros gets step 1.
    """

    name = "compute-weight-scales"
    requires = frozenset({Fact.FLOAT_WEIGHTS})
    provides = frozenset({Fact.WEIGHT_SCALES})
    numerics = Numerics.EXACT

    def run(self, model: Model, ctx: Context) -> PassResult:
        notes: list[Diagnostic] = []
        computed = 0
        for node in model.nodes():
            rule = ctx.target.ops.get(node.op_type) if node.domain == "" else None
            if rule is None or rule.contract is not Contract.COMPUTE or len(node.inputs) < 2:
                continue
            weight = node.inputs[1]
            if weight is None or weight in model.scales or node.inputs[0] not in model.scales:
                continue
            weights = model.constant(weight)
            if weights is None or weights.dtype != np.float32 or weights.size == 0:
                continue
            where: dict[str, Any] = {"node": node.name or "", "value": weight.name or ""}
            if not np.all(np.isfinite(weights)):
                notes.append(self.note(Code.NODE_SKIPPED, "the weight holds values that are not finite", **where))
                continue
            per_channel = ctx.target.per_channel_weights and rule.weight_axis is not None
            axis = output_channel_axis(node, weights.ndim) if per_channel else None
            grid = _grid(weights, axis)
            model.scales.set(weight, grid)
            computed += 1
            reason = f"no trained grid; {grid} computed from the weight's own values"
            notes.append(self.note(Code.WEIGHT_GRID_COMPUTED, reason, severity=Severity.NOTE, **where))
        return PassResult({"computed": computed}, tuple(notes))


def _grid(weights: npt.NDArray[Any], axis: int | None) -> QuantParams:
    """The symmetric grid whose highest level is the largest magnitude of each channel."""
    others = tuple(i for i in range(weights.ndim) if i != axis)
    steps = np.max(np.abs(weights), axis=others) / np.float32(_WEIGHTS.qmax)
    steps = np.where(steps >= np.finfo(np.float32).tiny, steps, np.float32(1.0))
    origin = f"largest magnitude of {'each channel' if axis is not None else 'the weight'}"
    return QuantParams.make(steps, 0, _WEIGHTS, axis=axis, source=Provenance.COMPUTED, origin=origin)
