"""Find the grid of weights that were fake quantized before the export, of which only the values tell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import Code, Fact, FloatArray, Model, Provenance, QuantDType, QuantParams, Severity
from qat2int8.ir.blocks import row_blocks
from qat2int8.passes.base import Context, Pass, PassResult
from qat2int8.passes.output_channel import output_channel_axis
from qat2int8.passes.registry import register
from qat2int8.passes.scale_groups import is_movement, moved

__all__ = ["RecoverWeightGrids", "recovered_grid"]

_OFF_GRID = 2e-3
"""How far from a level, in steps, a value may lie; 127 times a few float32 roundings are 1e-4."""

_AT_ZERO = 1e-4
"""The same for level 0, which is 0.0 exactly or the rounding of a difference of two levels."""

_CHANCE = 1e-2
"""Bound for the probability that a value on no grid is that close to a level: 2 * 2e-3 where its density is even
over a step, with room for one that is not."""

_BELIEVED = 1e-9
"""The probability below which lying on a grid is no coincidence."""

_LEVELS = 128
_PROBES = 16


@register
@dataclass(frozen=True)
class RecoverWeightGrids(Pass):
    """Give constant weights that lie on an int8 grid, but have none in the table, that grid.

    Some exporters compute the fake quant of weights before they write the model (and fold a BatchNormalization
    into the result, which scales the grid of each channel). Looked at are layers whose data comes, directly or
    through data movement, pools, Relu, Clip and Concat, from tensors with a trained grid: the others were left in
    float on purpose. Tried are, in this order,

    1. a step per output channel that makes its largest magnitude level 127,
    2. one step for the whole weight that does so,
    3. a step per output channel that makes it level k, for the smallest k in 1 .. 128 that fits.

    A grid fits when every value is within 2e-3 steps of a level, and 0.0 up to rounding where the level is 0. A
    channel whose levels have a common divisor may get the coarser grid that holds them: its values are the same,
    so nothing that reads them can tell. A channel of zeros gets step 1.

    Random weights practically never fit. What a channel tells is counted as the number m of different levels it
    uses besides 0, which lies on every grid, and its largest, which the choice of the step puts on the grid. For a
    channel on no grid the chance that a given step fits is at most 0.01 ** m, hence k * 0.01 ** m for the smallest
    of k steps tried. The product over the channels bounds the chance that a weight gets a grid it was not trained
    on, and must be below 1e-9: six levels in one channel are enough, or a few in each of several channels; with
    less the weight is left to compute-weight-scales. (Weights in {-a, 0, a} are; it holds them exactly as well.)

    The weights themselves are not changed: quantizing them with the grid gives the integers of training.
    """

    name = "recover-weight-grids"
    requires = frozenset({Fact.FLOAT_WEIGHTS})

    def run(self, model: Model, ctx: Context) -> PassResult:
        trained = _trained(model)
        notes = []
        for node in model.nodes("Conv", "ConvTranspose", "Gemm", "MatMul"):
            weight = node.inputs[1]
            if weight is None or weight in model.scales or node.inputs[0] not in trained:
                continue
            array = model.constant(weight)
            if array is None or array.dtype != np.float32 or array.size == 0:
                continue
            grid = recovered_grid(array.astype(np.float32, copy=False), output_channel_axis(node, array.ndim))
            if grid is None:
                continue
            model.scales.set(weight, grid)
            notes.append(
                self.note(
                    Code.WEIGHT_GRID_COMPUTED,
                    f"the weight has no fake quant, but lies on {grid}",
                    severity=Severity.NOTE,
                    node=node.name or "",
                    value=weight.name or "",
                )
            )
        return PassResult({"recovered": len(notes)}, tuple(notes))


def recovered_grid(weights: FloatArray, axis: int | None) -> QuantParams | None:
    """The int8 grid ``weights`` lie on, or None where they lie on none or are too few to tell.

    Args:
        weights: any shape.
        axis: the axis output channels run along; None for one step for all.
    """
    rows = (
        weights.reshape(1, -1) if axis is None else np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1)
    )
    largest = np.max(np.abs(rows), axis=1)
    if not np.all(np.isfinite(largest)):
        return None
    found = _highest_levels(rows, largest)
    if found is None:
        return None
    steps, per_tensor = found
    levels = np.rint(rows / steps[:, None]).astype(np.int16)
    if _coincidence(levels) > _BELIEVED:
        return None
    dtype = QuantDType(8, signed=True, narrow_range=bool(levels.min() > -_LEVELS))
    origin = "recovered from the weight's own values"
    return QuantParams.make(
        steps[0] if per_tensor else steps, 0, dtype, axis=axis, source=Provenance.TRAINED, origin=origin
    )


def _highest_levels(rows: FloatArray, largest: FloatArray) -> tuple[FloatArray, bool] | None:
    """The steps of the rows, and whether it is one for all; None where no grid fits.

    Most weights on no grid are given up after a look at a sample of each channel.
    """
    candidates = _candidates(rows, largest)
    if not np.all(candidates.any(axis=1)):
        return None
    highest = np.full(len(rows), _LEVELS - 1)
    if np.all(candidates[:, _LEVELS - 2]) and np.all(_fits(rows, _steps(largest, highest))):
        return _steps(largest, highest), len(rows) == 1
    whole = np.full_like(largest, largest.max() / np.float32(_LEVELS - 1))
    if np.all(_fits(rows, whole)):
        return whole, True
    open_rows = np.arange(len(rows))
    while open_rows.size:
        if not np.all(candidates[open_rows].any(axis=1)):
            return None
        highest[open_rows] = np.argmax(candidates[open_rows], axis=1) + 1
        fits = _fits(rows[open_rows], _steps(largest[open_rows], highest[open_rows]))
        candidates[open_rows, highest[open_rows] - 1] = False
        open_rows = open_rows[~fits]
    return _steps(largest, highest), len(rows) == 1


def _candidates(rows: FloatArray, largest: FloatArray) -> npt.NDArray[np.bool_]:
    """Which highest levels 1 .. 128 (columns) fit a sample of the magnitudes of each row.

    The sample is taken at ranks 0, 1, 3, 7 ... from the top, so that it meets what a sparse row has, and evenly
    between, so that it leaves a row that often reaches its largest.
    """
    size = rows.shape[1]
    ranks = {size - (1 << power) for power in range(size.bit_length())}
    ranks |= {size * part // _PROBES for part in range(_PROBES)}
    wanted = sorted(ranks)
    # Negative, because level 128 has only that side.
    probes = -np.partition(np.abs(rows), wanted, axis=1)[:, wanted]
    columns = [_fits(probes, _steps(largest, np.full(len(rows), highest))) for highest in range(1, _LEVELS + 1)]
    return np.stack(columns, axis=1)


def _steps(largest: FloatArray, highest: npt.NDArray[np.int_]) -> FloatArray:
    """The steps that make the largest magnitude of each row its highest level; 1 for a row of zeros."""
    steps = largest / highest.astype(np.float32)
    return np.where(largest > 0, steps, np.float32(1.0)).astype(np.float32)


def _fits(rows: FloatArray, steps: FloatArray) -> npt.NDArray[np.bool_]:
    """Whether each row lies on the int8 grid of its step.

    No step may be smaller than the normal numbers: the runtime divides by it.
    """
    if not np.all(steps >= np.finfo(np.float32).tiny):
        return np.zeros(len(rows), bool)
    fits = np.empty(len(rows), bool)
    for block in row_blocks(rows.shape):
        levels = rows[block] / steps[block, None]
        nearest = np.rint(levels)
        close = np.abs(levels - nearest) < np.where(nearest == 0, _AT_ZERO, _OFF_GRID)
        fits[block] = np.all(close & (nearest < _LEVELS) & (nearest >= -_LEVELS), axis=1)
    return fits


def _coincidence(levels: npt.NDArray[np.int16]) -> float:
    """How probable it is that a weight on no grid fits this well: see :class:`RecoverWeightGrids`."""
    used = np.zeros((len(levels), _LEVELS + 1), bool)
    magnitudes = np.abs(levels)
    used[np.arange(len(levels))[:, None], magnitudes] = True
    highest = magnitudes.max(axis=1)
    used[:, 0] = False
    used[np.arange(len(levels)), highest] = False
    chances = np.minimum(1.0, np.maximum(highest, 1) * _CHANCE ** used.sum(axis=1).astype(np.float64))
    return float(np.exp(np.log(chances).sum()))


def _trained(model: Model) -> set[oir.Value]:
    """Tensors with a trained grid, and those that will get one from them."""
    trained = {value for value, params in model.scales.items() if params.source >= Provenance.TRAINED}
    for node in model.nodes():
        if node.domain == "" and node.op_type == "Concat" and all(value in trained for value in node.inputs):
            trained.add(node.outputs[0])
        elif node.inputs and node.inputs[0] in trained and (is_movement(model, node) or _passes_on(node)):
            trained.update(moved(node))
    return trained


def _passes_on(node: oir.Node) -> bool:
    """Whether propagate-scales carries a grid across ``node`` from input to output, though it moves no data."""
    return node.domain == "" and node.op_type in ("AveragePool", "Clip", "GlobalAveragePool", "Relu")
