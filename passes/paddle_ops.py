"""Paddle's fake quant ops, read as what they are: what they do, their thresholds, how they round.

Not a pass. The ops are those of PaddlePaddle's ``fake_quantize_op.cc``, ``fake_dequantize_op.cc`` and
``quantize_linear_op.cc``, as a converter writes them that knows no counterpart: under their own names, in some
domain that is not ONNX's. A threshold t is the largest magnitude; one step is t / 127.
"""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import InvalidModel, Model, UnsupportedModel
from qat2int8.ir.quant import FloatArray
from qat2int8.passes.fake_quant_writer import Grid

__all__ = [
    "LEVELS",
    "Role",
    "attribute",
    "channel_axis",
    "grid_of",
    "highest_of",
    "is_paddle",
    "levels_of",
    "require_eight_bits",
    "role_of",
    "rounds_away",
    "thresholds_of",
]

LEVELS = 127
"""Levels on either side of zero; what the formulas of Paddle divide by."""


class Role(enum.Enum):
    """What an op does with its first input."""

    QUANTIZE = enum.auto()
    """To whole numbers in float."""
    DEQUANTIZE = enum.auto()
    """From whole numbers in float."""
    BOTH = enum.auto()
    """To the grid and back."""
    OBSERVE = enum.auto()
    """Nothing: it only kept a record in training."""


_ROLES = {
    "fake_quantize_abs_max": Role.QUANTIZE,
    "fake_quantize_range_abs_max": Role.QUANTIZE,
    "fake_quantize_moving_average_abs_max": Role.QUANTIZE,
    "fake_channel_wise_quantize_abs_max": Role.QUANTIZE,
    "quantize_linear": Role.QUANTIZE,
    "fake_dequantize_max_abs": Role.DEQUANTIZE,
    "fake_channel_wise_dequantize_max_abs": Role.DEQUANTIZE,
    "dequantize_linear": Role.DEQUANTIZE,
    "fake_quantize_dequantize_abs_max": Role.BOTH,
    "fake_quantize_dequantize_moving_average_abs_max": Role.BOTH,
    "fake_channel_wise_quantize_dequantize_abs_max": Role.BOTH,
    "moving_average_abs_max_scale": Role.OBSERVE,
}

_OWN_THRESHOLD = frozenset(
    {
        "fake_quantize_abs_max",
        "fake_channel_wise_quantize_abs_max",
        "fake_quantize_dequantize_abs_max",
        "fake_channel_wise_quantize_dequantize_abs_max",
    }
)
"""Ops that take the threshold from the tensor itself, each time they run, where they are given none."""

_ONNX_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})


def is_paddle(node: oir.Node) -> bool:
    """Whether ``node`` is one of the ops read here."""
    return node.op_type in _ROLES and node.domain not in _ONNX_DOMAINS


def role_of(node: oir.Node) -> Role:
    """What ``node`` does; an observer that was left in the place of a quantizer does nothing."""
    if node.attributes.get_int("only_observer", 0):
        return Role.OBSERVE
    return _ROLES[node.op_type]


def attribute(node: oir.Node, name: str, default: float) -> float:
    """A number among the attributes, written as an integer or not.

    Raises:
        InvalidModel: it is something else.
    """
    found = node.attributes.get(name)
    return default if found is None else float(_numbers(node, name, found.value).reshape(-1)[0])


def require_eight_bits(node: oir.Node) -> None:
    """Raise where the levels are not those of eight bits, as Paddle's own conversion does.

    Raises:
        UnsupportedModel: another width.
    """
    bits = [int(attribute(node, "bit_length", 8))]
    widths = node.attributes.get("quant_bits")
    if widths is not None:
        bits += [int(width) for width in _numbers(node, "quant_bits", widths.value).reshape(-1)]
    if any(width != 8 for width in bits):
        raise UnsupportedModel(
            f"it has {next(width for width in bits if width != 8)} bits, and only 8 are read",
            where=_where(node),
            remedy="train with 8 bits",
        )


def thresholds_of(model: Model, node: oir.Node, index: int = 1) -> FloatArray | None:
    """The thresholds that ``node`` was trained with, of shape () or (C,); None where the model computes them.

    They are input ``index``; the first ones may be an attribute instead, or what a constant tells itself.

    Raises:
        InvalidModel: one is negative or no number, or there is none at all.
    """
    value = node.inputs[index] if index < len(node.inputs) else None
    given = next((node.attributes[name] for name in _NAMES if name in node.attributes), None)
    if value is not None:
        found = model.constant(value)
    elif node.op_type in _OWN_THRESHOLD:
        array = model.constant(node.inputs[0])
        found = None if array is None else _largest(array, channel_axis(node))
    elif given is not None and index == 1:
        found = _numbers(node, given.name, given.value)
    else:
        raise InvalidModel("it has no threshold", where=_where(node), remedy="export the model again")
    if found is None:
        return None
    thresholds = found.astype(np.float32)
    thresholds = thresholds.reshape(() if thresholds.size == 1 else -1)
    if not thresholds.size or not np.all(np.isfinite(thresholds)) or np.any(thresholds < 0):
        raise InvalidModel(
            "a threshold is not a magnitude", where=_where(node), remedy="train or export the model again"
        )
    return thresholds


_NAMES = ("InScale", "Scale", "Scales")


def channel_axis(node: oir.Node) -> int | None:
    """The axis that has one threshold per channel; None where there is one for the whole tensor.

    Raises:
        InvalidModel: an op that has one per channel names no axis.
    """
    if "channel_wise" in node.op_type:
        axis = int(attribute(node, "quant_axis", 0))
        if axis < 0:
            raise InvalidModel(f"quant_axis is {axis}", where=_where(node), remedy="export the model again")
        return axis
    axis = int(attribute(node, "quant_axis", -1)) if node.op_type.endswith("_linear") else -1
    return axis if axis >= 0 else None


def grid_of(node: oir.Node, thresholds: FloatArray, axis: int | None) -> Grid:
    """The levels that ``node`` quantizes to; a channel that is zero throughout gets step 1.

    Rounding half to even saturates at -128, rounding away from zero clips to the threshold first.
    """
    steps = np.where(thresholds > 0, thresholds / np.float32(LEVELS), np.float32(1)).astype(np.float32)
    low = -LEVELS if rounds_away(node) else -LEVELS - 1
    return Grid(steps, np.zeros(steps.shape, np.int32), low, LEVELS, axis if steps.ndim else None)


def highest_of(node: oir.Node) -> float:
    """The level that stands for the threshold, by which a dequantizer divides."""
    return attribute(node, "max_range", LEVELS) if node.op_type == "fake_dequantize_max_abs" else LEVELS


def rounds_away(node: oir.Node) -> bool:
    """Whether ties are rounded away from zero: the habit of the older ops, not of the linear ones."""
    return attribute(node, "round_type", 0 if node.op_type.endswith("_linear") else 1) == 1


def levels_of(node: oir.Node, array: npt.NDArray[Any], thresholds: FloatArray, axis: int | None) -> FloatArray:
    """A constant as whole numbers, by the arithmetic of Paddle: float32, ``127 * (1 / t) * x``."""
    spread = [1] * array.ndim
    if thresholds.ndim and axis is not None:
        spread[axis] = -1
        thresholds = thresholds.reshape(spread)
    values = array.astype(np.float32)
    inverse = np.float32(1) / np.where(thresholds > 0, thresholds, np.float32(1))
    if not rounds_away(node):
        return np.clip(np.rint(np.float32(LEVELS) * inverse * values), -LEVELS - 1, LEVELS).astype(np.float32)
    steps = np.float32(LEVELS) * inverse * np.clip(values, -thresholds, thresholds)
    return (np.sign(steps) * np.floor(np.abs(steps.astype(np.float64)) + 0.5)).astype(np.float32)


def _largest(array: npt.NDArray[Any], axis: int | None) -> FloatArray:
    others = None if axis is None else tuple(index for index in range(array.ndim) if index != axis)
    return np.asarray(np.max(np.abs(array), axis=others, initial=0), np.float32)


def _numbers(node: oir.Node, name: str, value: object) -> npt.NDArray[np.float64]:
    """An attribute as numbers, one at least."""
    try:
        numbers = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        numbers = np.zeros(0)
    if not numbers.size:
        what = f"{name} is {value!r}, not a number"
        raise InvalidModel(what, where=_where(node), remedy="export the model again")
    return numbers


def _where(node: oir.Node) -> str:
    return f"{node.op_type} '{node.name}'"
