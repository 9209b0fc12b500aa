"""Give weights that were trained with a zero point grids with zero point 0, the only ones with a fast kernel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import INT8, Code, Contract, Diagnostic, Fact, Model, QuantDType, QuantParams, Severity, Target
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.output_channel import output_channel_axis
from qat2int8.passes.registry import register

__all__ = ["CentreWeights"]

_NARROW = QuantDType(8, signed=True, narrow_range=True)


@register
@dataclass(frozen=True)
class CentreWeights(Pass):
    """Move weight grids whose zero point is not 0 to int8 with zero point 0, channel by channel.

    What counts is how far the levels of an output channel really lie from the zero point. A channel that stays
    within -127 .. 127 (or -128 .. 127) keeps its trained step, and its integers are the old ones less the zero
    point: exact. Another is rounded again, to the step that makes its farthest level 127, at most 2.01 times the
    trained one; that is reported, with the largest error. One step for the whole weight becomes one a channel only
    where such a channel asks for it and the target takes it.

    With ``exact`` such a weight keeps its zero point instead, moved to int8: ``q - 128`` with zero point
    ``z - 128``. onnxruntime's fast kernel takes it, and its results are those of the uint8 weight bit for bit.
    What it costs is in ``docs/benchmarks.md``. Each channel may have a zero point of its own where the layer is
    not grouped: a depthwise kernel with different ones takes fifty times as long.

    The float weights stay as they are, on the trained grid: the new one says what they are rounded to when
    integers are written.

    Weights that anything but layers of the target reads, or layers with different output channels, are left.

    Options:
        exact: keep the zero point of weights in which a channel would be rounded again; where the target's kernels
            take none, the weight loses its grid and its layer stays in float, with the values that were trained.
    """

    name = "centre-weights"
    requires = frozenset({Fact.FLOAT_WEIGHTS, Fact.WEIGHT_SCALES})
    numerics = Numerics.QUANTIZING

    exact: bool = False

    def run(self, model: Model, ctx: Context) -> PassResult:
        notes: list[Diagnostic] = []
        counts = {"centred": 0, "rounded again": 0, "moved to int8": 0, "left in float": 0}
        for weight, grid in model.scales.items():
            if grid.symmetric or grid.dtype.bits > INT8.bits:
                continue
            array, readers = model.constant(weight), [use.node for use in weight.uses()]
            axes = _channel_axes(model, weight, ctx.target)
            if array is None or len(axes) != 1:
                continue
            (axis,) = axes
            if grid.axis not in (None, axis):
                continue
            centred = _centred(array, grid, axis)
            where = {"node": readers[0].name or "", "value": weight.name or ""}
            if centred.inexact and self.exact:
                kept = _moved_to_int8(grid, readers) if ctx.target.weight_zero_point == "any" else None
                if kept is None:
                    model.scales.discard(weight)
                    counts["left in float"] += 1
                    notes.append(self._left(centred, where))
                elif not kept.same_grid(grid):
                    model.scales.set(weight, kept)
                    counts["moved to int8"] += 1
                continue
            model.scales.set(weight, centred.grid)
            counts["rounded again" if centred.inexact else "centred"] += 1
            if centred.inexact:
                notes.append(self._rounded(centred, where))
        return PassResult(counts, tuple(notes))

    def _left(self, centred: _Centred, where: dict[str, str]) -> Diagnostic:
        return self.note(
            Code.KEPT_FLOAT,
            f"left in float: {centred.inexact} of {centred.channels} channels do not fit int8 with zero point 0",
            severity=Severity.NOTE,
            remedy="train weights with symmetric grids",
            **where,
        )

    def _rounded(self, centred: _Centred, where: dict[str, str]) -> Diagnostic:
        return self.note(
            Code.WEIGHT_REQUANTIZED,
            f"{centred.inexact} of {centred.channels} channels do not fit int8 with zero point 0 and were rounded "
            f"again, by up to {centred.error:.2f} of a trained step",
            remedy=_REMEDY,
            **where,
        )


_REMEDY = "train weights with symmetric grids, or convert with --exact-weights"


@dataclass(frozen=True, eq=False)
class _Centred:
    """A grid with zero point 0, how many of how many channels it does not hold exactly, and by how much.

    ``error`` is the largest one, in trained steps.
    """

    grid: QuantParams
    channels: int
    inexact: int
    error: float


def _moved_to_int8(grid: QuantParams, readers: list[oir.Node]) -> QuantParams | None:
    """The levels of ``grid`` on int8, with their zero point; None where the kernels would be slow."""
    grouped = any(node.attributes.get_int("group", 1) > 1 for node in readers)
    if grouped and np.any(grid.zero_point != grid.zero_point.reshape(-1)[0]):
        return None
    if grid.dtype.signed:
        return grid
    return grid.with_(dtype=INT8, zero_point=(grid.zero_point + INT8.qmin).astype(np.int32))


def _channel_axes(model: Model, weight: oir.Value, target: Target) -> set[int | None]:
    """The output-channel axes of the layers that read ``weight``; none where something else reads it.

    None for a layer that takes one step for the whole weight only.
    """
    axes: set[int | None] = set()
    rank = 0 if weight.shape is None else weight.shape.rank()
    for use in weight.uses():
        rule = target.ops.get(use.node.op_type) if use.node.domain == "" else None
        layer = rule is not None and rule.contract is Contract.COMPUTE and use.node.graph is model.graph
        if not layer or use.idx != 1:
            return set()
        axes.add(output_channel_axis(use.node, rank) if target.per_channel_weights else None)
    return axes


def _centred(array: npt.NDArray[np.generic], grid: QuantParams, axis: int | None) -> _Centred:
    spread = [1] * array.ndim if grid.per_channel else []
    if grid.axis is not None:
        spread[grid.axis] = -1
    levels = grid.quantize(array).astype(np.int16) - grid.zero_point.astype(np.int16).reshape(spread)
    others = tuple(i for i in range(array.ndim) if i != axis)
    low, high = np.min(levels, axis=others, initial=0), np.max(levels, axis=others, initial=0)
    inexact = np.asarray((low < INT8.qmin) | (high > INT8.qmax))
    farthest = np.maximum(-low, high) / float(INT8.qmax)
    steps = np.where(inexact, grid.scale * farthest, grid.scale).astype(np.float32)
    if not inexact.any():
        steps = grid.scale
    lowest = np.min(low, where=~inexact, initial=0)
    centred = grid.with_(
        scale=steps,
        zero_point=np.zeros(steps.shape, np.int32),
        dtype=INT8 if lowest == INT8.qmin else _NARROW,
        axis=axis if steps.ndim else None,
        origin=f"{grid.origin}, centred",
    )
    error = np.abs(centred.dequantize(centred.quantize(array)) - grid.dequantize(grid.quantize(array)))
    largest = float(np.max(error / grid.scale.reshape(spread), initial=0.0))
    return _Centred(centred, inexact.size, int(inexact.sum()), largest)
