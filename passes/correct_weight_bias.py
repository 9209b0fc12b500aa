"""Let the quantized weights of each channel keep the mean they had in float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import Fact, Model, Provenance, QuantParams
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class CorrectWeightBias(Pass):
    """Round the weights of each output channel so that their errors add up to less than one step.

    Rounded one by one, the errors of a channel add up to something, and the output is off by that times the mean
    of the input, for every input alike. Here as many weights as it takes are rounded the other way, those nearest
    to the middle between two levels first (C. Guo et al., "SQuant", ICLR 2022, its channel-wise step). No data are
    needed and no weight moves by a step or more. PaddlePaddle's ``bias_correction`` shifts the channel instead
    (arXiv:1810.05723) and rounds again, which takes the shift back.

    Weights that lie on their grid already, as trained ones do, stay as they are.
    """

    name = "correct-weight-bias"
    requires = frozenset({Fact.FLOAT_WEIGHTS, Fact.WEIGHT_SCALES})
    numerics = Numerics.QUANTIZING

    def run(self, model: Model, ctx: Context) -> PassResult:
        corrected = 0
        for value, params in model.scales.items():
            weights = model.constant(value) if params.source is Provenance.COMPUTED else None
            if weights is None or weights.dtype != np.float32:
                continue
            array, moved = _corrected(weights, params)
            if moved:
                value.const_value = oir.tensor(array, name=value.name)
                corrected += 1
        return PassResult({"corrected": corrected})


def _corrected(weights: npt.NDArray[Any], params: QuantParams) -> tuple[npt.NDArray[np.float32], int]:
    """``weights`` on levels of their grid, and how many of them are not on the nearest one."""
    axis = 0 if params.axis is None else params.axis
    rows = np.moveaxis(weights, axis, 0)
    shape = rows.shape
    levels = np.moveaxis(params.quantize(weights), axis, 0).astype(np.float32)
    if params.axis is None:
        rows, levels = rows.reshape(1, -1), levels.reshape(1, -1)
    else:
        rows, levels = rows.reshape(shape[0], -1), levels.reshape(shape[0], -1)
    errors = rows / params.scale.reshape(-1, 1) - levels
    sums = errors.sum(axis=1, dtype=np.float64)
    # In the direction of what is missing, the weight that lost most in rounding comes first.
    towards = np.sign(sums)[:, None].astype(np.float32)
    lost = errors * towards
    rank = np.argsort(np.argsort(-lost, axis=1), axis=1)
    # No weight lost more than half a step, so there are at least twice as many to choose from.
    flipped = rank < np.rint(np.abs(sums))[:, None]
    levels += np.where(flipped, towards, np.float32(0.0))
    integers = np.moveaxis(levels.reshape(shape), 0, axis).astype(params.dtype.numpy)
    return params.dequantize(integers), int(np.count_nonzero(flipped))
