"""Read the fake quant of QONNX: Quant and BipolarQuant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as oir
import onnx_ir.passes.common as common

from qat2int8.ir import Code, Diagnostic, InvalidModel, Model, UnsupportedModel
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.fake_quant import drop_unused_initializers
from qat2int8.passes.fake_quant_writer import Grid, NodeWriter, NoGrid, per_axis, require_opset
from qat2int8.passes.registry import register

QONNX_DOMAINS = frozenset({"qonnx.custom_op.general", "finn.custom_op.general", "onnx.brevitas"})

Array = npt.NDArray[Any]


@register
@dataclass(frozen=True)
class ReadQonnxQuant(Pass):
    """Write QONNX's Quant (IntQuant) and BipolarQuant as Quantize, Clip, Dequantize, or as float arithmetic.

    ``Quant(x, s, z, bits)`` is ``(round(clip(x / s + z, low, high)) - z) * s``; with one signed bit, and in
    BipolarQuant, the level is +1 or -1 by the sign. A constant is rounded here, by any rounding mode, into the
    integers of an initializer; one of more than eight bits, as biases are, becomes the float numbers it stands
    for. An activation becomes Quantize and Dequantize when it has up to eight bits, whole zero points and rounds
    half to even; otherwise it stays the same arithmetic in float, which is reported.

    The round to an integer comes before the zero point is added in ONNX and after it here, which differs at exact
    ties for odd zero points.

    Raises:
        UnsupportedModel: another op of QONNX (Trunc, QuantLSTMCell ...), a bit width computed while the model
            runs, or a tensor that is not float32.
        InvalidModel: an input is missing, or a scale is not a positive number.
    """

    name = "read-qonnx-quant"
    numerics = Numerics.CLOSE

    def run(self, model: Model, ctx: Context) -> PassResult:
        notes, parameters = list[Diagnostic](), list[oir.Value]()
        counts = {"quantizers read": 0, "quantizers written in float": 0}
        nodes = [node for node in model.graph.all_nodes() if node.domain in QONNX_DOMAINS]
        for node in nodes:
            if node.op_type not in ("Quant", "IntQuant", "BipolarQuant"):
                raise UnsupportedModel(
                    f"op '{node.op_type}' of domain '{node.domain}' has no counterpart in plain ONNX",
                    where=f"node '{node.name}'",
                    remedy="export the model without it, or as QuantizeLinear and DequantizeLinear (QCDQ)",
                )
            require_opset(model, node)
        for node in nodes:
            parameters += [value for value in node.inputs if value is not None]
            place = {"node": node.name or "", "value": node.outputs[0].name or ""}
            kept = _rewrite(model, node)
            counts["quantizers written in float" if kept else "quantizers read"] += 1
            if kept is not None and kept.reason:
                reason = f"kept in float: {kept.reason}"
                notes.append(self.note(Code.UNSUPPORTED_FAKE_QUANT, reason, remedy=kept.remedy, **place))
        if nodes:
            drop_unused_initializers(model, parameters)
            common.ShapeInferencePass()(model.ir)  # which ends at every op it does not know
        return PassResult(counts, tuple(notes))


@dataclass(frozen=True, eq=False)
class _Quant:
    """One node: its parameters and what lies between the lowest and the highest level.

    ``bipolar`` has two levels, -1 and 1. ``bits`` is the width of the levels, not always a whole number. Without a
    zero point it is a BipolarQuant, which looks at the sign of its input, whatever the scale.
    """

    scale: oir.Value
    zero_point: oir.Value | None
    bits: float
    low: float
    high: float
    rounding: str
    bipolar: bool

    def levels(self, array: Array, scale: Array, zero_point: Array) -> Array:
        """The levels of a constant, in float32 as the framework computes them."""
        steps = array if self.zero_point is None else array / scale + zero_point
        if self.bipolar:
            return np.where(steps >= 0, np.float32(1), np.float32(-1))
        return _ROUNDING[self.rounding](np.clip(steps, np.float32(self.low), np.float32(self.high)))


def _rewrite(model: Model, node: oir.Node) -> NoGrid | None:
    """Put plain ONNX in the place of ``node``; returns why that is float arithmetic, when it is.

    The reason is empty for a bias, of which nobody expects an own grid.
    """
    writer, quant = NodeWriter(model, node), _read(model, node)
    steps = model.constant(quant.scale)
    zeros = np.zeros((), np.float32) if quant.zero_point is None else model.constant(quant.zero_point)
    if steps is None or zeros is None:
        _write_arithmetic(writer, quant)
        return NoGrid("its scale or zero point is computed while the model runs", "freeze it before the export")
    scale, zero_point = steps.astype(np.float32), zeros.astype(np.float32)
    where = f"{node.op_type} '{node.name}' [{quant.scale.name}]"
    if not np.all(np.isfinite(scale) & (scale > 0)):
        raise InvalidModel("a scale is not a positive number", where=where, remedy="export the model again")
    array = model.constant(writer.source)
    levels = None if array is None else quant.levels(array.astype(np.float32), scale, zero_point)
    try:
        grid = _grid(quant, scale, zero_point, writer.source, constant=levels is not None)
    except NoGrid as reason:
        if levels is None:
            _write_arithmetic(writer, quant)
            return reason
        writer.float_constant((levels - zero_point) * scale)
        return NoGrid("", "") if levels.ndim <= 1 and quant.bits > 8 else reason
    if levels is None:
        writer.fake_quant(grid)
    else:
        writer.levels(levels, grid)
    return None


def _read(model: Model, node: oir.Node) -> _Quant:
    wanted = 2 if node.op_type == "BipolarQuant" else 4
    inputs = [value for value in node.inputs if value is not None]
    where = f"{node.op_type} '{node.name}'"
    if len(inputs) < wanted:
        raise InvalidModel(f"has {len(inputs)} inputs where {wanted} are needed", where=where)
    if node.op_type == "BipolarQuant":
        return _Quant(inputs[1], None, 1, -1, 1, "ROUND", bipolar=True)
    width = model.constant(inputs[3])
    if width is None or width.size != 1:
        raise UnsupportedModel(
            "its bit width is not one constant", where=where, remedy="freeze bit widths before the export"
        )
    bits, signed = float(width.item()), bool(node.attributes.get_int("signed", 1))
    narrow = bool(node.attributes.get_int("narrow", 1))
    rounding = node.attributes.get_string("rounding_mode", "ROUND").upper()
    if rounding not in _ROUNDING or not 1 <= bits <= 32:
        raise UnsupportedModel(
            f"rounding mode '{rounding}' or bit width {bits:g} is unknown", where=where, remedy="train with 8 bits"
        )
    if signed and bits == 1:
        return _Quant(inputs[1], inputs[2], bits, -1, 1, rounding, bipolar=True)
    low = narrow - 2.0 ** (bits - 1) if signed else 0.0
    high = 2.0 ** (bits - 1) - 1 if signed else 2.0**bits - 1 - narrow
    return _Quant(inputs[1], inputs[2], bits, low, high, rounding, bipolar=False)


def _grid(quant: _Quant, scale: Array, zero_point: Array, source: oir.Value, *, constant: bool) -> Grid:
    """The grid that Quantize and Dequantize can express.

    Raises:
        NoGrid: they cannot.
    """
    if quant.bits > 8 or not float(quant.bits).is_integer():
        raise NoGrid(f"its levels are {quant.bits:g} bits wide", "train with 8 bits or fewer")
    if not constant and quant.bipolar:
        raise NoGrid("it has two levels, told apart by the sign", "train activations with 2 bits or more")
    if not constant and quant.rounding not in _HALF_EVEN:
        raise NoGrid(f"it rounds by the mode {quant.rounding}", "train with rounding half to even (ROUND)")
    limits = np.iinfo(np.int8 if quant.low < 0 else np.uint8)
    if np.any(zero_point != np.rint(zero_point)):
        raise NoGrid("its zero point is not a whole number", "train with whole zero points")
    if np.any((zero_point < limits.min) | (zero_point > limits.max)):
        raise NoGrid(f"its zero point does not fit {limits.dtype}", "train with a range that holds 0")
    steps, zeros, axis = per_axis(scale, zero_point, source)
    return Grid(steps, zeros.astype(np.int32), int(quant.low), int(quant.high), axis)


def _write_arithmetic(writer: NodeWriter, quant: _Quant) -> None:
    """``(round(clip(x / s + z, low, high)) - z) * s``, one node each."""
    steps = writer.source
    if quant.zero_point is not None:
        steps = writer.add("Div", "steps", steps, quant.scale)
        steps = writer.add("Add", "shifted", steps, quant.zero_point)
    if quant.bipolar:
        positive = writer.add("GreaterOrEqual", "positive", steps, writer.scalar("zero", 0))
        positive.dtype = oir.DataType.BOOL
        levels = writer.add("Where", "levels", positive, writer.scalar("one", 1), writer.scalar("minus_one", -1))
    else:
        low, high = writer.scalar("low", quant.low), writer.scalar("high", quant.high)
        levels = _write_rounding(writer, quant.rounding, writer.add("Clip", "clipped", steps, low, high))
    if quant.zero_point is not None:
        levels = writer.add("Sub", "centred", levels, quant.zero_point)
    writer.finish(writer.add("Mul", "scaled", levels, quant.scale))


def _write_rounding(writer: NodeWriter, mode: str, steps: oir.Value) -> oir.Value:
    if mode in _ONE_NODE:
        return writer.add(_ONE_NODE[mode], "levels", steps)
    size = writer.add("Abs", "size", steps)
    if mode == "HALF_UP":
        size = writer.add("Floor", "rounded", writer.add("Add", "raised", size, writer.scalar("half", 0.5)))
    elif mode == "HALF_DOWN":
        size = writer.add("Ceil", "rounded", writer.add("Sub", "lowered", size, writer.scalar("half", 0.5)))
    else:
        size = writer.add("Ceil" if mode == "UP" else "Floor", "rounded", size)
    return writer.add("Mul", "levels", writer.add("Sign", "sign", steps), size)


_HALF_EVEN = ("ROUND", "HALF_EVEN")

_ONE_NODE = {"ROUND": "Round", "HALF_EVEN": "Round", "CEIL": "Ceil", "FLOOR": "Floor"}

_ROUNDING: dict[str, Callable[[Array], Array]] = {
    "ROUND": np.rint,
    "HALF_EVEN": np.rint,
    "CEIL": np.ceil,
    "FLOOR": np.floor,
    "UP": lambda steps: np.sign(steps) * np.ceil(np.abs(steps)),
    "DOWN": np.trunc,
    "ROUND_TO_ZERO": np.trunc,
    "HALF_UP": lambda steps: np.sign(steps) * np.floor(np.abs(steps) + np.float32(0.5)),
    "HALF_DOWN": lambda steps: np.sign(steps) * np.ceil(np.abs(steps) - np.float32(0.5)),
}
