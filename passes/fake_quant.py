"""Recognise fake quantization: the nodes that put a float tensor on an integer grid and back.

Not a pass. The forms read here are those of ONNX QuantizeLinear and DequantizeLinear (versions 10 to 25, and the
same two ops of the ``com.microsoft`` domain); another dialect is either rewritten to them before, or gets one more
branch in :func:`recognise`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import INT8, INT32, InvalidModel, Model, QuantDType, QuantParams

_DOMAINS = ("", "com.microsoft")
_DEFAULT_AXIS = 1
_WIDE = 16


@dataclass(frozen=True, eq=False)
class FakeQuant:
    """One fake quantization.

    Attributes:
        source: what is quantized: a float tensor, or the integer initializer of a weight stored quantized. Where
            the caller hands in integers there is no float tensor before them, and it is ``output`` itself.
        output: the float tensor on the grid.
        nodes: from the first node after ``source`` to the DequantizeLinear.
        params: the grid.
        constant: whether ``source`` depends on no graph input: the fake quant belongs to a weight or a bias.
    """

    source: oir.Value
    output: oir.Value
    nodes: tuple[oir.Node, ...]
    params: QuantParams
    constant: bool

    @property
    def is_bias(self) -> bool:
        """Whether this is a bias in more bits than kernels compute with: a constant, not a grid of its own."""
        return self.params.dtype == INT32 or (self.params.dtype.bits > INT8.bits and _is_read_as_bias(self.output))

    @property
    def is_given(self) -> bool:
        """Whether the integers are a graph input: there is a grid to gather and nothing to remove."""
        return self.source is self.output


@dataclass(frozen=True, eq=False)
class Refusal:
    """A DequantizeLinear that is no fake quant we can carry; it stays in the graph and computes what it did.

    ``where`` is what a diagnostic needs to name the place: ``node``, ``value`` and ``remedy``.
    """

    output: oir.Value
    reason: str
    constant: bool
    where: dict[str, str] = field(default_factory=dict)


class _Unsupported(Exception):
    """Why one DequantizeLinear is refused; never leaves this module."""

    def __init__(self, reason: str, remedy: str) -> None:
        self.reason, self.remedy = reason, remedy
        super().__init__(reason)


def fake_quants(model: Model, *, widest: int = 8, per_channel: bool = False) -> Iterator[FakeQuant | Refusal]:
    """Every DequantizeLinear of the main graph, read as a fake quant or refused, in graph order.

    The graph is read as the iteration goes on, so a pass may remove what it was given before it asks for the next.

    Args:
        widest: how many bits a grid may have; kernels compute with 8.
        per_channel: whether an activation may have one step per channel; no kernel takes such a one.

    Raises:
        InvalidModel: a scale, zero point or axis is wrong.
    """
    constants: set[oir.Value] = set()
    for node in model.nodes():
        if _depends_on_constants_only(node, constants):
            constants.update(node.outputs)
        if _is(node, "DequantizeLinear"):
            constant = node.outputs[0] in constants
            yield recognise(model, node, constant=constant, widest=widest, per_channel=per_channel)


def recognise(
    model: Model, dequantize: oir.Node, *, constant: bool, widest: int = 8, per_channel: bool = False
) -> FakeQuant | Refusal:
    """Read ``source -> [QuantizeLinear] -> [Clip | Cast]* -> DequantizeLinear``, or say why that is not there.

    Raises:
        InvalidModel: a scale is not a positive number, or scale, zero point and axis do not fit the tensor.
    """
    try:
        return _read(model, dequantize, constant, widest, per_channel)
    except _Unsupported as refused:
        output = dequantize.outputs[0]
        where = {"node": dequantize.name or "", "value": output.name or "", "remedy": refused.remedy}
        return Refusal(output, f"left as it is: {refused.reason}", constant, where)


def remove(model: Model, fake: FakeQuant, stand_in: oir.Value) -> list[oir.Value]:
    """Let the consumers of ``fake`` read ``stand_in``, and remove those of its nodes nobody reads any more.

    A graph output keeps its name (see :meth:`Model.bypass`); a quantizer whose integers are read elsewhere stays.
    Returns what the nodes read, for :func:`drop_unused_initializers` when all are removed: scales are often shared
    by the whole graph, so looking at their readers after every node would take quadratic time.
    """
    *upstream, dequantize = fake.nodes
    parameters = [value for node in fake.nodes for value in node.inputs if value is not None]
    dequantize.replace_input_with(0, stand_in)
    model.bypass(dequantize)
    for node in reversed(upstream):
        integers = node.outputs[0]
        if integers.uses() or integers.is_graph_output():
            break
        model.graph.remove(node, safe=True)
    return parameters


def drop_unused_initializers(model: Model, values: Iterable[oir.Value]) -> None:
    """Remove those of ``values`` from the initializers of the main graph that nothing reads."""
    for value in dict.fromkeys(values):
        if (
            value.is_initializer()
            and value.graph is model.graph
            and not value.is_graph_output()
            and not value.uses()
        ):
            assert value.name is not None
            model.graph.initializers.pop(value.name)
            model.scales.discard(value)


def _is(node: oir.Node | None, op_type: str) -> bool:
    return node is not None and node.domain in _DOMAINS and node.op_type == op_type


def _is_constant(value: oir.Value) -> bool:
    return value.const_value is not None and not value.is_graph_input()


def _depends_on_constants_only(node: oir.Node, constants: set[oir.Value]) -> bool:
    inputs = [value for value in node.inputs if value is not None]
    if not inputs or any(attr.type is oir.AttributeType.GRAPH for attr in node.attributes.values()):
        return False
    return all(value in constants or _is_constant(value) for value in inputs)


def _read(model: Model, dequantize: oir.Node, constant: bool, widest: int, per_channel: bool) -> FakeQuant:
    links, integers = _links(dequantize)
    quantize = integers.producer()
    ends: tuple[oir.Node, ...] = (dequantize,)
    if quantize is not None and _is(quantize, "QuantizeLinear"):
        source, storage = _quantized(quantize), stored_by(quantize)
        ends = (quantize, dequantize)
    elif quantize is None and _is_constant(integers):
        source, storage = integers, integers.dtype
    elif quantize is None and not links:
        source, storage = dequantize.outputs[0], integers.dtype
    else:
        made = f"come from {quantize.op_type} '{quantize.name}'" if quantize is not None else "are a graph input"
        raise _Unsupported(f"its integers {made}, not from a QuantizeLinear", "export plain fake quantization")
    if dequantize.attributes.get_int("output_dtype", 0) not in (0, oir.DataType.FLOAT):
        raise _Unsupported("its output is not float32", "convert the model to float32")
    full = None if storage is None else QuantDType.of_storage(storage)
    if full is None:
        raise _Unsupported(f"its integers are of type {storage or 'unknown'}", "train with an 8-bit grid")
    stored_bias = source is integers and _is_read_as_bias(dequantize.outputs[0])
    if full.bits > widest and not stored_bias and not (full == INT32 and source is integers):
        remedy = "train with an 8-bit grid"
        if full.bits == _WIDE:
            remedy = "train with an 8-bit grid, or requantize it to one with --narrow-16-bit"
        raise _Unsupported(f"its grid is {full}, which no integer kernel computes", remedy)
    shape = _shape(source)
    if shape is None:
        shape = _shape(dequantize.outputs[0])
    params = _agreed(model, ends, full, shape)
    if params.per_channel and not (constant or per_channel):
        raise _Unsupported(
            f"an activation has one scale per channel ({params.scale.size} on axis {params.axis})",
            "train activations per tensor",
        )
    if full == INT32 and not params.symmetric and not stored_bias:
        raise _Unsupported("an int32 tensor has a zero point", "give biases zero point 0")
    nodes = (*ends[:-1], *links, dequantize)
    return FakeQuant(source, dequantize.outputs[0], nodes, _narrowed(model, params, links), constant)


def _is_read_as_bias(value: oir.Value) -> bool:
    """Whether layers add ``value`` to what they compute, and nothing else reads it."""
    uses = [(use.node.domain, use.node.op_type, use.idx) for use in value.uses()]
    return bool(uses) and set(uses) <= _BIASES and not value.is_graph_output()


_BIASES = {("", op_type, 2) for op_type in ("Conv", "ConvTranspose", "Gemm")}


def _links(dequantize: oir.Node) -> tuple[tuple[oir.Node, ...], oir.Value]:
    """The Clip and Cast nodes above a DequantizeLinear, top down, and the integers they start from."""
    links: list[oir.Node] = []
    value = _required(dequantize, 0)
    while (node := value.producer()) is not None and node.domain == "" and node.op_type in ("Clip", "Cast"):
        links.append(node)
        value = _required(node, 0)
    return tuple(reversed(links)), value


def _required(node: oir.Node, index: int) -> oir.Value:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise InvalidModel(f"input {index} is missing", where=f"{node.op_type} '{node.name}'")
    return value


def _quantized(quantize: oir.Node) -> oir.Value:
    source = _required(quantize, 0)
    if source.dtype not in (None, oir.DataType.FLOAT):
        raise _Unsupported(f"it quantizes a {source.dtype} tensor", "convert the model to float32")
    if quantize.attributes.get_int("precision", 0) not in (0, oir.DataType.FLOAT):
        raise _Unsupported("it divides in another precision than float32", "convert the model to float32")
    return source


def stored_by(quantize: oir.Node) -> oir.DataType | None:
    """The integer type a QuantizeLinear writes."""
    if len(quantize.inputs) > 2 and quantize.inputs[2] is not None:
        return quantize.inputs[2].dtype
    return oir.DataType(quantize.attributes.get_int("output_dtype", 0) or oir.DataType.UINT8)


def _shape(value: oir.Value) -> Sequence[object] | None:
    """The dimensions of a tensor, an int where it is known; None where not even the rank is."""
    return None if value.shape is None else tuple(value.shape)


def _agreed(
    model: Model, ends: Sequence[oir.Node], dtype: QuantDType, shape: Sequence[object] | None
) -> QuantParams:
    """The grid of a QuantizeLinear and its DequantizeLinear, which must be one and the same."""
    first, *others = (_grid(model, node, dtype, shape) for node in ends)
    for other in others:
        if not first.same_grid(other):
            raise _Unsupported(
                f"{first.origin} and {other.origin} disagree: {first} against {other}",
                "give both the same scale and zero point",
            )
    return first


def _grid(model: Model, node: oir.Node, dtype: QuantDType, shape: Sequence[object] | None) -> QuantParams:
    """The scale, zero point and axis of one QuantizeLinear or DequantizeLinear."""
    scale = _parameter(model, node, 1)
    zero_point = _parameter(model, node, 2) if len(node.inputs) > 2 and node.inputs[2] is not None else np.int32(0)
    if scale.dtype != np.float32:
        raise _Unsupported(f"its scale is {scale.dtype}, not float32", "convert the model to float32")
    if node.attributes.get_int("block_size", 0):
        raise _Unsupported("it has one scale per block", "train with one scale per tensor or channel")
    where = f"{node.op_type} '{node.name}' [{_required(node, 1).name}]"
    if scale.size == 0:
        raise InvalidModel("the scale is empty", where=where, remedy="export the model again")
    axis = None if scale.size == 1 else _axis(node, scale, shape, where)
    try:
        return QuantParams.make(scale, zero_point, dtype, axis=axis, origin=f"{node.op_type} '{node.name}'")
    except InvalidModel as error:
        raise InvalidModel(error.what, where=where, remedy="export the model again") from error


def _parameter(model: Model, node: oir.Node, index: int) -> npt.NDArray[Any]:
    value = _required(node, index)
    array = model.constant(value)
    if array is None:
        raise _Unsupported(
            f"'{value.name}' of {node.op_type} '{node.name}' is computed while the model runs",
            "freeze scales and zero points before the export",
        )
    return array


def _axis(node: oir.Node, scale: npt.NDArray[Any], shape: Sequence[object] | None, where: str) -> int:
    """The channel axis, counted from the front and checked against the shape as far as that is known.

    A tensor of rank 1 has only one axis, so the attribute (1 by default) does not matter for it.
    """
    axis = node.attributes.get_int("axis", _DEFAULT_AXIS)
    if scale.ndim != 1:
        raise InvalidModel(f"the scale has shape {scale.shape}", where=where, remedy="give it one dimension")
    if shape is None:
        if axis < 0:
            raise _Unsupported("its axis counts from the back of an unknown shape", "run shape inference first")
        return axis
    rank = len(shape)
    if rank == 1:
        axis = 0
    if not -rank <= axis < rank:
        raise InvalidModel(f"axis {axis} is out of range for rank {rank}", where=where, remedy="correct the axis")
    axis %= rank
    channels = shape[axis]
    if isinstance(channels, int) and channels != scale.size:
        raise InvalidModel(
            f"{scale.size} scales for {channels} channels on axis {axis}",
            where=where,
            remedy="give one scale per channel",
        )
    return axis


def _narrowed(model: Model, params: QuantParams, links: tuple[oir.Node, ...]) -> QuantParams:
    """What the Clip and Cast nodes between Quantize and Dequantize leave of a grid."""
    low, high = params.dtype.qmin, params.dtype.qmax
    for node in links:
        if node.op_type == "Clip":
            low, high = max(low, _bound(model, node, 1, low)), min(high, _bound(model, node, 2, high))
        else:
            kept = QuantDType.of_storage(oir.DataType(node.attributes.get_int("to", 0)))
            if kept is None or low < kept.qmin or high > kept.qmax:
                raise _Unsupported(f"Cast '{node.name}' changes its integers", "keep the integer type")
    dtype = QuantDType(max(high.bit_length(), 1), signed=False)
    if low:
        dtype = QuantDType(high.bit_length() + 1, signed=True, narrow_range=low == -high)
    if (dtype.qmin, dtype.qmax) != (low, high):
        raise _Unsupported(
            f"its integers run from {low} to {high}, which is no grid of a whole number of bits",
            "clip to the range of a grid",
        )
    zeros = params.zero_point
    if np.any(zeros < low) or np.any(zeros > high):
        raise _Unsupported(
            f"zero point {zeros.reshape(-1)[0]} is clipped away by {dtype}",
            "clip to a range that holds the zero point",
        )
    return params.with_(dtype=dtype)


def _bound(model: Model, clip: oir.Node, index: int, default: int) -> int:
    if index >= len(clip.inputs) or clip.inputs[index] is None:
        return default
    return int(_parameter(model, clip, index).item())
