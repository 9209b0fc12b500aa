"""The algebra of folding: ``y = factor * layer(x) + offset`` per output channel becomes one layer.

Folding moves the factor into the weights. Weights that were trained on a grid keep their integers: the step
of a channel is multiplied by ``|factor|`` and the sign goes into the integers themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import Model, QuantParams
from qat2int8.ir.blocks import row_blocks
from qat2int8.passes.output_channel import output_channel_axis

Doubles = npt.NDArray[np.float64]

LAYER_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Ops whose constant weight a per-channel factor can move into."""

_SMALLEST_STEP = float(np.finfo(np.float32).tiny)
"""A step below the smallest normal float32 has no finite reciprocal, so no runtime can divide by it."""

_ROUNDING = 4 * float(np.finfo(np.float32).eps)
"""How far two float32 roundings can push a product off its level, relative to it."""


class NotFoldable(Exception):
    """Why something cannot be folded, for the diagnostic; nothing was changed when this is raised."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        self.reason = reason
        self.remedy = remedy
        super().__init__(reason)


@dataclass(frozen=True, eq=False)
class ChannelAffine:
    """``y = factor * x + offset``; both of shape (C,), float64 so that a chain rounds once."""

    factor: Doubles
    offset: Doubles

    def then(self, after: ChannelAffine) -> ChannelAffine:
        """This one first, ``after`` behind it."""
        return ChannelAffine(after.factor * self.factor, after.factor * self.offset + after.offset)


@dataclass(frozen=True)
class Refit:
    """What of the trained weights could not be carried exactly: numbers of channels."""

    regridded: int = 0
    """Channels that held the lowest level, which has no mirror image; their step grew to reach it."""
    flushed: int = 0
    """Channels so small that no float32 step exists for them; they are zero now."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer with constant parameters, seen as one linear map per output channel.

    Attributes:
        weight: the value at input 1; ``weights`` is its array.
        bias: float64, shape (C,), zeros where the layer has none.
        axis: the axis of ``weights`` that output channels run along.
        groups: the channels of group ``g`` follow those of group ``g - 1``; above 1 only where ``axis`` does
            not span all groups (ConvTranspose).
        rank: the rank of the output; channels are its axis 1.
    """

    node: oir.Node
    weight: oir.Value
    weights: npt.NDArray[Any]
    bias: Doubles
    axis: int
    groups: int
    rank: int

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return self.bias.size

    @classmethod
    def of(cls, model: Model, node: oir.Node) -> Self:
        """Read a node of :data:`LAYER_OPS`.

        Raises:
            NotFoldable: weight or bias are computed at run time, or have no output channel to fold into.
        """
        weight = node.inputs[1]
        weights = model.constant(weight)
        if weight is None or weights is None:
            raise NotFoldable("the weight of the layer before it is not a constant")
        if node.op_type in ("Gemm", "MatMul") and weights.ndim != 2:
            raise NotFoldable(f"the weight of the layer before it has rank {weights.ndim}, not 2")
        if node.op_type == "MatMul" and _rank(node.inputs[0]) != 2 and _rank(node.outputs[0]) != 2:
            raise NotFoldable(
                "the MatMul before it is not known to be two-dimensional", "run shape inference on the model"
            )
        axis, rank = output_channel_axis(node, weights.ndim) or 0, weights.ndim
        groups = node.attributes.get_int("group", 1) if node.op_type == "ConvTranspose" else 1
        bias = _bias(model, node, weights.shape[axis] * groups)
        return cls(node, weight, weights, bias, axis, groups, rank)

    def spread(self, factor: Doubles) -> Doubles:
        """``factor`` (C,) in a shape that broadcasts against the weights."""
        if self.groups > 1:
            rows = np.repeat(factor.reshape(self.groups, -1), self.weights.shape[0] // self.groups, axis=0)
            return rows.reshape(rows.shape + (1,) * (self.weights.ndim - 2))
        shape = [1] * self.weights.ndim
        shape[self.axis] = -1
        return factor.reshape(shape)


def fold(model: Model, layer: Layer, affine: ChannelAffine, origin: str) -> Refit:
    """Rewrite the parameters of ``layer`` so that it computes ``affine`` of what it computed.

    Parameters other nodes read too are copied first. A MatMul that gets an offset becomes a Gemm.

    Args:
        origin: what was folded, for the provenance of the new grid ("BatchNormalization 'bn1'").

    Raises:
        NotFoldable: the trained grid cannot follow, or a product overflows.
    """
    grid, refit = model.scales.get(layer.weight), Refit()
    factor, weights = affine.factor, layer.weights
    with np.errstate(over="ignore", invalid="ignore"):
        if np.any(factor != 1.0):
            if grid is not None:
                grid, factor, refit = _carry(layer, grid, factor, origin)
            weights = _scaled(weights, layer.spread(factor))
        bias = (affine.factor * layer.bias + affine.offset).astype(weights.dtype)
    if not (np.all(np.isfinite(weights)) and np.all(np.isfinite(bias))):
        raise NotFoldable(f"the folded parameters overflow {weights.dtype}")
    if weights is not layer.weights:
        if grid is not None:
            weights = _snapped(weights, grid)
        value = _write(model, layer.node, 1, weights, "weight")
        if grid is not None:
            model.scales.set(value, grid)
    if np.any(bias != 0) or np.any(layer.bias != 0):
        _write_bias(model, layer.node, bias)
    return refit


def _carry(layer: Layer, grid: QuantParams, factor: Doubles, origin: str) -> tuple[QuantParams, Doubles, Refit]:
    """The grid after the fold, the factor that really goes into the weights, and what was lost."""
    axis, per_step = _factor_per_step(layer, grid, factor)
    steps = np.broadcast_to(grid.scale, per_step.shape).astype(np.float64)
    zeros = np.broadcast_to(grid.zero_point, per_step.shape).astype(np.int32)
    lowest, highest = grid.dtype.qmin, grid.dtype.qmax
    mirrored = per_step < 0
    stuck = np.zeros(per_step.shape, bool)
    scaled = steps * np.abs(per_step)
    if not (grid.symmetric and grid.dtype.signed):
        zeros = np.where(mirrored, lowest + highest - zeros, zeros)
    elif lowest < -highest and np.any(mirrored):
        others = tuple(i for i in range(layer.weights.ndim) if i != axis)
        reach = np.min(layer.weights, axis=others) if axis is not None else np.min(layer.weights)
        stuck = mirrored & (reach <= (lowest + 0.5) * steps)
        scaled = np.where(stuck, scaled * (-lowest / highest), scaled)
    if np.any(scaled > np.finfo(np.float32).max):
        raise NotFoldable("the folded weight scale overflows float32")
    flushed = (per_step != 0) & (scaled < _SMALLEST_STEP)
    scaled = np.where(flushed | (per_step == 0), steps, scaled)
    carried = QuantParams.make(
        scaled.astype(np.float32),
        zeros,
        grid.dtype,
        axis=axis,
        source=grid.source,
        origin=f"{grid.origin}, scaled by {origin}",
    )
    kept = np.where(np.resize(flushed, factor.shape), 0.0, factor)
    return carried, kept, Refit(int(stuck.sum()), int(flushed.sum()))


def _factor_per_step(layer: Layer, grid: QuantParams, factor: Doubles) -> tuple[int | None, Doubles]:
    """The axis of the grid after the fold, and the factor each of its steps is multiplied by."""
    if np.all(factor == factor[0]):
        return grid.axis, np.full(grid.scale.shape, factor[0])
    if grid.axis not in (None, layer.axis):
        raise NotFoldable(
            f"the weight was trained with steps along axis {grid.axis}, not along its output channels"
        )
    by_group = factor.reshape(layer.groups, -1)
    if np.any(by_group != by_group[0]):
        raise NotFoldable("the groups of the layer share their weight steps, but not the factor")
    return layer.axis, by_group[0]


def _scaled(weights: npt.NDArray[Any], factor: Doubles) -> npt.NDArray[Any]:
    """``weights * factor``, multiplied in float64."""
    product = np.empty_like(weights)
    for block in row_blocks(weights.shape):
        product[block] = weights[block] * (factor[block] if len(factor) > 1 else factor)
    return product


def _snapped(weights: npt.NDArray[Any], grid: QuantParams) -> npt.NDArray[Any]:
    """``weights`` with what float rounding moved off a level put back on it."""
    snapped = grid.dequantize(grid.quantize(weights)).astype(weights.dtype, copy=False)
    for block in row_blocks(weights.shape):
        far = np.abs(snapped[block] - weights[block]) > _ROUNDING * np.abs(snapped[block])
        if far.any():
            snapped[block] = np.where(far, weights[block], snapped[block])
    return snapped


def _bias(model: Model, node: oir.Node, channels: int) -> Doubles:
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return np.zeros(channels)
    bias = model.constant(value)
    if bias is None:
        raise NotFoldable("the bias of the layer before it is not a constant")
    if bias.size not in (1, channels) or (bias.ndim and bias.shape[-1] != bias.size):
        raise NotFoldable("the bias of the layer before it differs from row to row")
    scale = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
    return np.broadcast_to(bias.astype(np.float64).reshape(-1) * scale, (channels,))


def _write_bias(model: Model, node: oir.Node, bias: npt.NDArray[Any]) -> None:
    if node.op_type == "MatMul":
        node.op_type = "Gemm"
    if node.attributes.get_float("beta", 1.0) != 1.0:
        node.attributes["beta"] = oir.AttrFloat32("beta", 1.0)
    model.scales.discard(_write(model, node, 2, bias, "bias"))


def _write(model: Model, node: oir.Node, index: int, array: npt.NDArray[Any], role: str) -> oir.Value:
    """Make ``array`` the constant at input ``index``: in place where no one else reads it, else as a copy."""
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    value = node.inputs[index]
    if value is not None and value.is_initializer() and len(value.uses()) == 1 and not value.is_graph_output():
        value.const_value = oir.tensor(array, name=value.name)
        value.shape = oir.Shape(array.shape)
        return value
    copy = model.add_initializer(f"{node.name}.{role}", array)
    node.replace_input_with(index, copy)
    return copy


def _rank(value: oir.Value | None) -> int | None:
    return None if value is None or value.shape is None else value.shape.rank()
