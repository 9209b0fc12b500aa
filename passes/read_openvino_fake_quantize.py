"""Read the fake quant of OpenVINO, which NNCF exports: FakeQuantize."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as oir
import onnx_ir.passes.common as common

from qat2int8.ir import Code, Diagnostic, InvalidModel, Model
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.fake_quant import drop_unused_initializers
from qat2int8.passes.fake_quant_writer import Grid, NodeWriter, NoGrid, per_axis, require_opset
from qat2int8.passes.registry import register

OPENVINO_DOMAIN = "org.openvinotoolkit"

WHOLE = 1e-3
"""How far from a whole number, in steps, float32 bounds leave a zero point that was meant to be one."""

_FINE = 255
"""Levels from which half a step is little enough (0.2 % of the range) to move a grid by."""

Array = npt.NDArray[Any]


@register
@dataclass(frozen=True)
class ReadOpenvinoFakeQuantize(Pass):
    """Write OpenVINO's FakeQuantize as Quantize, Clip, Dequantize, or as float arithmetic.

    ``FakeQuantize(x, il, ih, ol, oh)`` with n levels is ``round((clamp(x, il, ih) - il) / s) * (oh - ol) / (n - 1)
    + ol`` with the step ``s = (ih - il) / (n - 1)``. Where output and input bounds are the same, that is a grid
    with zero point ``-il / s``: signed when 0 is in the middle, unsigned otherwise, per channel where the
    bounds are. No grid is: fewer than four or more than 256 levels, a number of levels that is neither a
    power of two nor one less, a range without 0, and output bounds of their own. Such a constant becomes the
    float numbers it stands for, such an activation float arithmetic; both are reported.

    A zero point that is no whole number is rounded for activations of 255 and 256 levels. That moves every
    level by the same part of a step, at most half of one, which is reported too (GRID_REQUANTIZED). Weights
    and coarser activations keep their grid, in float.

    Raises:
        InvalidModel: an input or the number of levels is missing, or a range is empty or not finite.
        UnsupportedModel: a tensor that is not float32.
    """

    name = "read-openvino-fake-quantize"
    numerics = Numerics.QUANTIZING

    def run(self, model: Model, ctx: Context) -> PassResult:
        notes, parameters = list[Diagnostic](), list[oir.Value]()
        counts = {"quantizers read": 0, "quantizers written in float": 0}
        nodes = [
            node
            for node in model.graph.all_nodes()
            if node.domain == OPENVINO_DOMAIN and node.op_type == "FakeQuantize"
        ]
        for node in nodes:
            require_opset(model, node)
            parameters += [value for value in node.inputs if value is not None]
            place = {"node": node.name or "", "value": node.outputs[0].name or ""}
            try:
                shift = _rewrite(model, node)
            except NoGrid as kept:
                _rewrite_in_float(model, node)
                counts["quantizers written in float"] += 1
                reason = f"kept in float: {kept.reason}"
                notes.append(self.note(Code.UNSUPPORTED_FAKE_QUANT, reason, remedy=kept.remedy, **place))
                continue
            counts["quantizers read"] += 1
            if shift:
                notes.append(
                    self.note(
                        Code.GRID_REQUANTIZED,
                        f"the zero point was no whole number: the grid moved by {shift:.2g} of a step",
                        remedy="train with a range that has 0 on one of its levels",
                        **place,
                    )
                )
        if nodes:
            drop_unused_initializers(model, parameters)
            common.ShapeInferencePass()(model.ir)  # which ends at every op it does not know
        return PassResult(counts, tuple(notes))


def _rewrite(model: Model, node: oir.Node) -> float:
    """Put Quantize and Dequantize in the place of ``node``; returns by what part of a step the grid moved.

    Raises:
        NoGrid: they cannot express it; nothing was changed.
    """
    writer, bounds, levels = NodeWriter(model, node), _bounds(node), _levels(node)
    arrays = [model.constant(bound) for bound in bounds]
    known = [array.astype(np.float32) for array in arrays if array is not None]
    if len(known) < len(arrays):
        raise NoGrid("its bounds are computed while the model runs", "freeze them before the export")
    low, high, out_low, out_high = known
    _check_range(node, low, high)
    if not (_same(low, out_low) and _same(high, out_high)):
        raise NoGrid("its output has another range than its input", "train with one range")
    if not 4 <= levels <= 256 or (levels & (levels + 1) and levels & (levels - 1)):
        raise NoGrid(f"it has {levels} levels", "train with 256 levels, or 255 for weights")
    step = _step(low, high, levels)
    exact = -low.astype(np.float64) / step
    zeros = np.rint(exact)
    shift = float(np.abs(exact - zeros).max())
    if np.any((exact < -WHOLE) | (exact > levels - 1 + WHOLE)):
        raise NoGrid("its range does not hold 0", "train with a range that holds 0")
    array = model.constant(writer.source)
    if shift > WHOLE and array is not None:
        raise NoGrid("the zero point of a constant is no whole number", "train weights symmetrically")
    if shift > WHOLE and levels < _FINE:
        raise NoGrid(
            f"its zero point is no whole number, and half a step of {levels} levels is much",
            "train with a range that has 0 on one of its levels",
        )
    middle = levels // 2
    base = middle if np.all(zeros == middle) else 0
    steps, zero_point, axis = per_axis(step.astype(np.float32), zeros - base, writer.source)
    grid = Grid(steps, zero_point.astype(np.int32), -base, levels - 1 - base, axis)
    if array is None:
        writer.fake_quant(grid)
    else:
        writer.levels(_counted(array, low, high, levels) - base, grid)
    return shift if shift > WHOLE else 0.0


def _rewrite_in_float(model: Model, node: oir.Node) -> None:
    """The formula of FakeQuantize, one node each, or its result for a constant."""
    writer, bounds, levels = NodeWriter(model, node), _bounds(node), _levels(node)
    arrays = [model.constant(value) for value in (writer.source, *bounds)]
    source, low, high, out_low, out_high = (None if a is None else a.astype(np.float32) for a in arrays)
    if (
        source is not None
        and low is not None
        and high is not None
        and out_low is not None
        and out_high is not None
    ):
        counted = _counted(source, low, high, levels)
        writer.float_constant(counted * _step(out_low, out_high, levels) + out_low)
        return
    below, above, out_below, out_above = bounds
    count = writer.scalar("intervals", levels - 1)
    span = writer.add("Sub", "span", above, below)
    # Not Clip, whose bounds are scalars.
    clamped = writer.add("Min", "clamped", writer.add("Max", "raised", writer.source, below), above)
    share = writer.add("Div", "share", writer.add("Sub", "offset", clamped, below), span)
    counted_levels = writer.add("Round", "levels", writer.add("Mul", "steps", share, count))
    out_step = writer.add("Div", "out_step", writer.add("Sub", "out_span", out_above, out_below), count)
    scaled = writer.add("Mul", "scaled", counted_levels, out_step)
    writer.finish(writer.add("Add", "shifted", scaled, out_below))


def _counted(array: Array, low: Array, high: Array, levels: int) -> Array:
    """The levels of a constant, counted from the lowest one."""
    clamped = np.minimum(np.maximum(array.astype(np.float32), low), high)
    counted: Array = np.rint((clamped - low) / (high - low) * np.float32(levels - 1))
    return counted


def _step(low: Array, high: Array, levels: int) -> npt.NDArray[np.float64]:
    step: npt.NDArray[np.float64] = (high.astype(np.float64) - low.astype(np.float64)) / (levels - 1)
    return step


def _same(left: Array, right: Array) -> bool:
    left, right = np.broadcast_arrays(left, right)
    return np.array_equal(left, right)


def _bounds(node: oir.Node) -> tuple[oir.Value, oir.Value, oir.Value, oir.Value]:
    bounds = [value for value in node.inputs[1:] if value is not None]
    if len(bounds) != 4:
        raise InvalidModel(f"has {len(bounds)} bounds where 4 are needed", where=_where(node))
    return bounds[0], bounds[1], bounds[2], bounds[3]


def _levels(node: oir.Node) -> int:
    levels = node.attributes.get_int("levels", 0)
    if levels < 2:
        raise InvalidModel(f"has {levels} levels", where=_where(node), remedy="export the model again")
    return levels


def _check_range(node: oir.Node, low: Array, high: Array) -> None:
    if not (np.all(np.isfinite(low)) and np.all(np.isfinite(high)) and np.all(high > low)):
        raise InvalidModel(
            "a range is empty or not finite", where=_where(node), remedy="train or export the model again"
        )


def _where(node: oir.Node) -> str:
    return f"FakeQuantize '{node.name}'"
