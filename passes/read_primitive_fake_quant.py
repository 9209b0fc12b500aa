"""Rewrite fake quantization spelt in float arithmetic into QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import Code, Diagnostic, Fact, FloatArray, InvalidModel, Model, QuantDType, QuantParams, Severity
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.clamp import CLAMP_OPS, read_clamp
from qat2int8.passes.fake_quant import drop_unused_initializers
from qat2int8.passes.registry import register

_OLDEST_OPSET = 13
"""The first with per-channel QuantizeLinear; Clip of integers is older."""

_SAME_STEP = 4 * float(np.finfo(np.float32).eps)
"""How far ``x * (1 / s)`` and ``x / s`` may take their step from different roundings of ``s``."""


@register
@dataclass(frozen=True)
class ReadPrimitiveFakeQuant(Pass):
    """Recognise ``x / s [+ z] -> round -> clamp [- z] -> * s`` and write it as Quantize, [Clip], Dequantize.

    ``Div`` and ``Mul`` by a reciprocal are the same, so are ``Round`` and ``Floor(v + 0.5)``, and ``Clip``,
    ``Max``, ``Min`` and ``Relu``; the clamp may stand before the rounding, and the zero point on either side of
    both. All constants are scalars or have one element per channel. The clamp's bounds decide the integer type;
    they must be those of a grid of at most 8 bits.

    A constant is rounded here, by the arithmetic of the source, so it keeps its integers. An activation is rounded
    half to even from now on; where the source rounds ties otherwise, that is reported. Integer weights behind
    ``Cast -> [Sub] -> Mul`` become integers behind a DequantizeLinear.

    What computes such a chain but cannot be rewritten stays and is reported.
    """

    name = "read-primitive-fake-quant"
    requires = frozenset({Fact.CONSTANTS_LIFTED})
    numerics = Numerics.QUANTIZING

    def run(self, model: Model, ctx: Context) -> PassResult:
        counts = {"fake quants read": 0, "integer weights read": 0}
        notes: list[Diagnostic] = []
        freed: dict[oir.Value, None] = {}
        for node in model.nodes("Round", "Floor", "Cast"):
            try:
                if node.op_type == "Cast":
                    counts["integer weights read"] += _read_integer_weight(model, node, freed)
                    continue
                chain = _chain(model, node)
                if chain is not None:
                    note = self._rewrite(model, chain, freed)
                    counts["fake quants read"] += 1
                    notes += [] if note is None else [note]
            except _Unsupported as refused:
                notes.append(
                    self.note(
                        Code.UNSUPPORTED_FAKE_QUANT,
                        f"fake quant in float arithmetic is left as it is: {refused.reason}",
                        node=node.name or "",
                        value=node.outputs[0].name or "",
                        remedy=refused.remedy,
                    )
                )
        drop_unused_initializers(model, freed)
        return PassResult(counts, tuple(notes))

    def _rewrite(self, model: Model, chain: _Chain, freed: dict[oir.Value, None]) -> Diagnostic | None:
        if model.opset < _OLDEST_OPSET:
            raise _Unsupported(f"opset {model.opset} has no quantizer for it", "raise the opset first")
        params, shift = _grid(chain)
        array = model.constant(chain.source)
        if array is None:
            nodes = _quantizer(model, chain.source, params)
            note = self._about_ties(chain, params)
        else:
            levels = _levels(chain, array, shift).astype(params.dtype.numpy)
            nodes = [_dequantizer(model, model.add_initializer(f"{chain.source.name}_quantized", levels), params)]
            note = None
        _replace(model, chain.nodes, nodes, freed)
        return note

    def _about_ties(self, chain: _Chain, params: QuantParams) -> Diagnostic | None:
        odd = chain.offset_before_rounding % 2 == 1
        if not chain.floors and not np.any(odd):
            return None
        habit = "half up" if chain.floors else "half to even after adding an odd zero point"
        return self.note(
            Code.GRID_REQUANTIZED,
            f"values halfway between two levels were rounded {habit}, {params} rounds them half to even",
            severity=Severity.NOTE,
            node=chain.nodes[-1].name or "",
            value=chain.source.name or "",
            remedy="round half to even in training",
        )


class _Unsupported(Exception):
    """Why a chain stays as it is; never leaves this module."""

    def __init__(self, reason: str, remedy: str) -> None:
        self.reason, self.remedy = reason, remedy
        super().__init__(reason)


class _Kind(enum.Enum):
    MULTIPLY = enum.auto()
    DIVIDE = enum.auto()
    ADD = enum.auto()
    SUBTRACT = enum.auto()
    CLAMP = enum.auto()
    ROUND = enum.auto()
    FLOOR = enum.auto()


_BY_CONSTANT = {"Mul": _Kind.MULTIPLY, "Div": _Kind.DIVIDE, "Add": _Kind.ADD, "Sub": _Kind.SUBTRACT}
_SCALES = (_Kind.MULTIPLY, _Kind.DIVIDE)


@dataclass(frozen=True, eq=False)
class _Step:
    """One node as a function of one tensor.

    ``operand`` is the constant of an arithmetic node, or the lower and upper bound of a clamp; empty for the
    roundings.
    """

    node: oir.Node
    kind: _Kind
    source: oir.Value
    operand: FloatArray

    def apply(self, values: FloatArray) -> FloatArray:
        """What the node computes, in float32 as a runtime does."""
        result: FloatArray
        match self.kind:
            case _Kind.MULTIPLY:
                result = values * self.operand
            case _Kind.DIVIDE:
                result = values / self.operand
            case _Kind.ADD:
                result = values + self.operand
            case _Kind.SUBTRACT:
                result = values - self.operand
            case _Kind.CLAMP:
                result = np.clip(values, self.operand[0], self.operand[1])
            case _Kind.ROUND:
                result = np.rint(values)
            case _Kind.FLOOR:
                result = np.floor(values)
        return result

    @property
    def offset(self) -> FloatArray | float:
        """What an addition or subtraction adds."""
        match self.kind:
            case _Kind.ADD:
                return self.operand
            case _Kind.SUBTRACT:
                return -self.operand
        return 0.0


@dataclass(frozen=True, eq=False)
class _Chain:
    """The steps from the one that divides by the step of the grid to the one that multiplies by it.

    ``steps[rounding]`` rounds; ``last`` is the position of the last step that rounds or clamps: behind it the
    values are levels of the grid, and only the zero point is left to take away.
    """

    steps: tuple[_Step, ...]
    rounding: int
    last: int

    @property
    def source(self) -> oir.Value:
        return self.steps[0].source

    @property
    def nodes(self) -> tuple[oir.Node, ...]:
        return tuple(step.node for step in self.steps)

    @property
    def floors(self) -> bool:
        return self.steps[self.rounding].kind is _Kind.FLOOR

    @property
    def offset_before_rounding(self) -> FloatArray:
        """The zero point added before rounding, without the half that makes a Floor round."""
        return self.offset(1, self.rounding) - np.float32(0.5 if self.floors else 0.0)

    def offset(self, start: int, stop: int) -> FloatArray:
        """The sum of what the steps of a range add."""
        return np.asarray(sum((step.offset for step in self.steps[start:stop]), np.float32(0.0)), np.float32)


def _chain(model: Model, rounding: oir.Node) -> _Chain | None:
    """The chain around a Round or Floor, or None where the node is no part of a fake quant.

    Raises:
        _Unsupported: it is one by its ends, but somebody reads what lies between.
    """
    source = rounding.inputs[0]
    if source is None:
        return None
    kind = _Kind.ROUND if rounding.op_type == "Round" else _Kind.FLOOR
    middle = _Step(rounding, kind, source, np.empty(0, np.float32))
    above: list[_Step] = []
    while not above or above[-1].kind not in _SCALES:
        producer = source.producer()
        step = None if producer is None else _step(model, producer)
        if step is None:
            return None
        above.append(step)
        source = step.source
    below = _below(model, rounding.outputs[0])
    if not below:
        return None
    steps = (*reversed(above), middle, *below)
    position = len(above)
    last = max(i for i, step in enumerate(steps) if step.kind is _Kind.CLAMP or i == position)
    chain = _Chain(steps, position, last)
    if not _is_inverse(chain):
        return None
    for step in steps[:-1]:
        output = step.node.outputs[0]
        if len(output.uses()) != 1 or output.is_graph_output():
            raise _Unsupported(f"'{output.name}' is read elsewhere too", "export plain fake quantization")
    return chain


def _below(model: Model, value: oir.Value) -> list[_Step]:
    """The steps behind ``value`` up to the one that multiplies by a step, or none.

    Of several readers the first that is a step is followed.
    """
    below: list[_Step] = []
    while not below or below[-1].kind not in _SCALES:
        readers = [step for use in value.uses() if (step := _step(model, use.node, value)) is not None]
        if not readers:
            return []
        below.append(readers[0])
        value = readers[0].node.outputs[0]
    return below


def _step(model: Model, node: oir.Node, source: oir.Value | None = None) -> _Step | None:
    """A node as a step: arithmetic with a constant, or a clamp to constants.

    ``source`` is what the node does it to; not given, it is found: of two constants the larger one.
    """
    if node.domain != "" or node.graph is not model.graph:
        return None
    if node.op_type in CLAMP_OPS:
        clamp = read_clamp(model, node)
        if clamp is None or source not in (None, clamp.source):
            return None
        bounds = np.asarray([clamp.span.lo, clamp.span.hi], np.float32)
        return _Step(node, _Kind.CLAMP, clamp.source, bounds)
    kind = _BY_CONSTANT.get(node.op_type)
    if kind is None:
        return None
    ways = [(node.inputs[0], node.inputs[1])]
    if kind in (_Kind.MULTIPLY, _Kind.ADD):
        ways.append((node.inputs[1], node.inputs[0]))
    found = [
        _Step(node, kind, tensor, operand)
        for tensor, constant in ways
        if tensor is not None and source in (None, tensor) and (operand := _operand(model, constant)) is not None
    ]
    return min(found, key=lambda step: step.operand.size, default=None)


def _operand(model: Model, value: oir.Value | None) -> FloatArray | None:
    """A float32 constant, also one that is cast from a constant."""
    array = model.constant(value)
    producer = None if value is None else value.producer()
    if array is None and producer is not None and _casts_to_float(producer):
        array = model.constant(producer.inputs[0])
    elif array is not None and array.dtype != np.float32:
        return None
    return None if array is None or not array.size else np.asarray(array, np.float32)


def _casts_to_float(node: oir.Node) -> bool:
    return (
        node.domain == ""
        and node.op_type == "Cast"
        and node.attributes.get_int("to", 0) == oir.DataType.FLOAT
        and len(node.inputs) == 1
    )


def _is_inverse(chain: _Chain) -> bool:
    """Whether the last step multiplies by what the first divided by."""
    first, second = _divisor(chain.steps[0]).reshape(-1), _factor(chain.steps[-1]).reshape(-1)
    if first.size != second.size and 1 not in (first.size, second.size):
        return False
    return bool(np.allclose(first, second, rtol=_SAME_STEP, atol=0.0))


def _divisor(step: _Step) -> FloatArray:
    return step.operand if step.kind is _Kind.DIVIDE else _reciprocal(step.operand)


def _factor(step: _Step) -> FloatArray:
    return step.operand if step.kind is _Kind.MULTIPLY else _reciprocal(step.operand)


def _reciprocal(operand: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore"):
        return np.asarray(np.float32(1.0) / operand, np.float32)


def _grid(chain: _Chain) -> tuple[QuantParams, int]:
    """The grid of a chain, and what to add to its levels to get those of the grid.

    Raises:
        _Unsupported: the bounds, the zero point or the step are those of no grid.
    """
    zero = chain.offset_before_rounding + chain.offset(chain.rounding, chain.last)
    if np.any(chain.offset_before_rounding != np.rint(chain.offset_before_rounding)):
        how = "rounds down" if chain.floors else "adds a fraction before it rounds"
        raise _Unsupported(f"it {how}", "round to the nearest level")
    behind = chain.offset(chain.last, len(chain.steps))
    if not np.array_equal(
        np.broadcast_to(zero, np.broadcast_shapes(zero.shape, behind.shape)), -behind + 0.0 * zero
    ):
        raise _Unsupported("the zero point taken away is not the one added", "use one zero point")
    low, high = _bounds(chain)
    dtype, shift = _dtype(low, high, zero)
    step, middle = _factor(chain.steps[-1]), chain.nodes[chain.rounding]
    try:
        origin = f"{middle.op_type} '{middle.name}'"
        params = _grid_of(chain.source, step, zero + np.float32(shift), dtype, origin=origin)
    except InvalidModel as error:
        raise _Unsupported(error.what, "use a positive step and a zero point within the bounds") from error
    return params, shift


def _bounds(chain: _Chain) -> tuple[float, float]:
    """The lowest and highest level: the clamps, carried through the steps behind them up to the last.

    All of these steps are monotone, so a bound takes the way the values take.
    """
    low, high = -np.inf, np.inf
    for index, step in enumerate(chain.steps[: chain.last + 1]):
        if step.kind is not _Kind.CLAMP:
            continue
        ends = step.operand
        for later in chain.steps[index + 1 : chain.last + 1]:
            if later.kind is not _Kind.CLAMP:
                if later.operand.size > 1:
                    raise _Unsupported("its bounds differ from channel to channel", "clamp around one zero point")
                ends = later.apply(ends) if later.operand.size == 0 else later.apply(ends.reshape(-1)).reshape(-1)
        low, high = max(low, float(ends[0])), min(high, float(ends[1]))
    return low, high


def _dtype(low: float, high: float, zero: FloatArray) -> tuple[QuantDType, int]:
    """The integer type of levels from ``low`` to ``high``, and the shift that takes them there.

    Levels are kept as they are where a type has them; levels counted from the zero point are moved up to start
    at 0.
    """
    remedy = "clamp to the range of an integer type of at most 8 bits"
    if not np.isfinite(low) or not np.isfinite(high):
        raise _Unsupported("nothing clamps it on both sides", remedy)
    if low != round(low) or high != round(high) or not low < high:
        raise _Unsupported(f"its bounds {low:g} and {high:g} are no levels", remedy)
    if np.any(zero < low) or np.any(zero > high):
        raise _Unsupported(f"zero point {zero.reshape(-1)[0]:g} lies outside {low:g} to {high:g}", remedy)
    for shift in (0, -round(low)):
        dtype = _of_levels(round(low) + shift, round(high) + shift)
        if dtype is not None:
            return dtype, shift
    raise _Unsupported(f"its levels {low:g} to {high:g} are those of no grid", remedy)


def _of_levels(low: int, high: int) -> QuantDType | None:
    candidates = (
        QuantDType(max(high.bit_length(), 1), signed=False),
        QuantDType(high.bit_length() + 1, signed=True),
        QuantDType(high.bit_length() + 1, signed=True, narrow_range=True),
    )
    for dtype in candidates if high > 0 else ():
        if (dtype.qmin, dtype.qmax) == (low, high) and dtype.bits <= 8:
            return dtype
    return None


def _grid_of(
    tensor: oir.Value, step: FloatArray, zero: FloatArray, dtype: QuantDType, *, origin: str
) -> QuantParams:
    """The grid of ``tensor`` from its broadcast step and zero point."""
    axes = {axis for array in (step, zero) if (axis := _axis(tensor, array)) is not None}
    if len(axes) > 1:
        raise _Unsupported("its scale and zero point run along different axes", "use one channel axis")
    if not axes:
        return QuantParams.make(step.reshape(()), zero.reshape(()), dtype, origin=origin)
    channels = max(step.size, zero.size)
    steps, zeros = (np.broadcast_to(array.reshape(-1), (channels,)) for array in (step, zero))
    return QuantParams.make(steps, zeros, dtype, axis=axes.pop(), origin=origin)


def _axis(tensor: oir.Value, parameter: npt.NDArray[Any]) -> int | None:
    """The axis of ``tensor`` a broadcast parameter runs along; None for a scalar."""
    if parameter.ndim == 0:
        return None
    rank = None if tensor.shape is None else tensor.shape.rank()
    if rank is None or tensor.shape is None or parameter.ndim > rank:
        raise _Unsupported("a parameter might give it more dimensions", "use scalars, or run shape inference")
    long = [axis for axis, size in enumerate(parameter.shape, rank - parameter.ndim) if size != 1]
    if not long:
        return None
    channels = tensor.shape[long[0]]
    if len(long) > 1 or channels != parameter.size:
        raise _Unsupported(
            f"a parameter of shape {list(parameter.shape)} is not one number a channel", "use one a channel"
        )
    return long[0]


def _levels(chain: _Chain, array: npt.NDArray[Any], shift: int) -> FloatArray:
    """The levels of a constant, computed as the source does."""
    values = array.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for step in chain.steps[: chain.last + 1]:
            values = step.apply(values)
    if np.any(np.isnan(values)):
        raise _Unsupported("the constant holds NaN", "look for NaN in the weights")
    return np.asarray(values + np.float32(shift), np.float32)


def _quantizer(model: Model, source: oir.Value, params: QuantParams) -> list[oir.Node]:
    """``Quantize -> [Clip] -> Dequantize`` of ``source``."""
    dtype = params.dtype
    parameters = _parameters(model, source, params)
    axis = {} if params.axis is None else {"axis": params.axis}
    nodes = [_node(model, "QuantizeLinear", [source, *parameters], axis)]
    storage = np.iinfo(dtype.numpy)
    if (dtype.qmin, dtype.qmax) != (storage.min, storage.max):
        bounds = [
            model.add_initializer(f"{source.name}_{role}", np.asarray(level, dtype.numpy))
            for role, level in (("lowest", dtype.qmin), ("highest", dtype.qmax))
        ]
        nodes.append(_node(model, "Clip", [nodes[-1].outputs[0], *bounds], {}))
    for node in nodes:
        integers = node.outputs[0]
        integers.name = model.unique_name(f"{source.name}_{node.op_type}")
        integers.type = oir.TensorType(dtype.storage)
        integers.shape = None if source.shape is None else source.shape.copy()
    return [*nodes, _node(model, "DequantizeLinear", [nodes[-1].outputs[0], *parameters], axis)]


def _dequantizer(model: Model, integers: oir.Value, params: QuantParams) -> oir.Node:
    axis = {} if params.axis is None else {"axis": params.axis}
    return _node(model, "DequantizeLinear", [integers, *_parameters(model, integers, params)], axis)


def _parameters(model: Model, tensor: oir.Value, params: QuantParams) -> tuple[oir.Value, oir.Value]:
    """New initializers for the scale and the zero point."""
    scale = model.add_initializer(f"{tensor.name}_scale", params.scale)
    return scale, model.add_initializer(f"{tensor.name}_zero_point", params.zero_point.astype(params.dtype.numpy))


def _node(model: Model, op_type: str, inputs: Sequence[oir.Value], attributes: dict[str, int]) -> oir.Node:
    return oir.node(op_type, inputs, attributes, name=model.unique_name(f"{inputs[0].name}_{op_type}_node"))


def _replace(model: Model, old: Sequence[oir.Node], new: Iterable[oir.Node], freed: dict[oir.Value, None]) -> None:
    """Put ``new`` in the place of ``old``, both in order, and note what ``old`` read."""
    last = None
    for last in new:
        model.insert_before(old[-1], last)
    assert last is not None
    model.replace_value(old[-1].outputs[0], last.outputs[0])
    for node in reversed(old):
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if value is not None and producer is None:
                freed[value] = None
            elif producer is not None and _casts_to_float(producer) and len(producer.outputs[0].uses()) == 1:
                node.replace_input_with(node.inputs.index(value), producer.inputs[0])
                freed.update(dict.fromkeys(value for value in producer.inputs if value is not None))
                if producer not in old:
                    model.remove(producer)
        model.remove(node)


def _integer_chain(model: Model, cast: oir.Node) -> list[_Step] | None:
    """The steps from a Cast of integers to the one that multiplies, none of which anybody else reads."""
    steps = _below(model, cast.outputs[0])
    if not steps or any(step.kind is _Kind.CLAMP for step in steps):
        return None
    between = [cast.outputs[0], *(step.node.outputs[0] for step in steps[:-1])]
    return steps if all(len(v.uses()) == 1 and not v.is_graph_output() for v in between) else None


def _read_integer_weight(model: Model, cast: oir.Node, freed: dict[oir.Value, None]) -> bool:
    """Rewrite ``integers -> Cast -> [Sub zero point] -> Mul scale``; returns whether that is what stands there."""
    if cast.graph is not model.graph or not _casts_to_float(cast) or model.opset < _OLDEST_OPSET:
        return False
    integers = cast.inputs[0]
    array = model.constant(integers)
    if integers is None or array is None or array.dtype not in (np.int8, np.uint8):
        return False
    chain = _integer_chain(model, cast)
    dtype = QuantDType.of_storage(oir.DataType.from_numpy(array.dtype))
    if chain is None or dtype is None:
        return False
    zero = -np.asarray(sum((step.offset for step in chain), np.float32(0.0)), np.float32)
    if np.any(zero != np.rint(zero)):
        return False
    try:
        params = _grid_of(integers, _factor(chain[-1]), zero, dtype, origin=f"Cast '{cast.name}'")
    except (InvalidModel, _Unsupported):
        return False  # constant folding computes it, as any other arithmetic on constants
    nodes = [cast, *(step.node for step in chain)]
    _replace(model, nodes, [_dequantizer(model, integers, params)], freed)
    return True
