"""Which layers of a candidate compute which tensors of its reference, found out from the two files alone."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as oir

from qat2int8.ir import DataError, Model, QuantDType, QuantParams, TrainedTensor
from qat2int8.passes.qoperators import qoperator_of
from qat2int8.pipelines.convert import TENSORS_KEY
from qat2int8.pipelines.evaluation.counterpart import Counterpart
from qat2int8.pipelines.evaluation.read_reference import ReadReference
from qat2int8.pipelines.levels import CARRIES, Meaning, Pair, meanings

__all__ = ["Matching", "match_layers"]

_NO_LAYERS = CARRIES | frozenset(
    {
        "ArgMax",
        "ArgMin",
        "Cast",
        "Constant",
        "ConstantOfShape",
        "DequantizeLinear",
        "Dropout",
        "DynamicQuantizeLinear",
    }
    | {
        "Equal",
        "Expand",
        "EyeLike",
        "Greater",
        "GreaterOrEqual",
        "If",
        "Less",
        "LessOrEqual",
        "Loop",
        "NonZero",
        "Not",
        "Range",
    }
    | {"QuantizeLinear", "Relu", "Scan", "Shape", "Size", "Tile", "TopK"}
)
"""Ops that compute no values of their own: they move, name and bound what others computed."""

_ABSORBED = frozenset({"Clip", "Identity", "QuantizeLinear", "Relu"})
"""What a layer's values go through before other layers read them."""

_FOLDED = frozenset({"BatchNormalization", "Clip", "Relu"})
"""What the candidate may have folded into the layer in front, whose name stayed."""

_RESHAPES = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})
"""What gives back the shape that a layer has in the reference, where the candidate computes it in another one."""

_ACCUMULATES = frozenset({"ConvInteger", "MatMulInteger"})
"""Layers whose sums become real numbers in nodes of their own: by a Cast, a Mul and an Add of the bias."""

_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Layers that conversion folds what stands behind them into."""

_SUFFIX = re.compile(r"(_quantized|_clipped|_dequantized|_(De)?[Qq]uantizeLinear_(In|Out)put)(_\d+)?$")
"""What this project, and onnxruntime's quantizer, put behind the name of a float tensor to name its integers."""


@dataclass(frozen=True, eq=False)
class Matching:
    """The layers of a candidate.

    Attributes:
        layers: those whose tensor the reference has too, in graph order.
        alone: names of the others.
    """

    layers: tuple[Counterpart, ...]
    alone: tuple[str, ...]


def match_layers(reference: ReadReference, candidate: Model) -> Matching:
    """Find the tensor of ``reference`` that each layer of ``candidate`` computes.

    A layer's tensor is what others read of it: behind the activation it absorbed, and on integers where they read
    integers. Its counterpart is what ``convert`` recorded, else the tensor of the same name, or of the name
    without what quantizers put behind it.

    Raises:
        DataError: the record in the candidate cannot be read.
    """
    known, names = _Reference(reference), _Names(candidate)
    ours = TENSORS_KEY in candidate.ir.metadata_props
    fixed = _parameters(candidate)
    layers: dict[str, Counterpart] = {}
    alone = []
    taken: set[oir.Value] = set()
    for node in _layers(candidate, fixed):
        if node.outputs[0] in taken:
            continue
        chain = list(_chain(node, fixed))
        taken.update(chain)
        found = known.counterpart(chain, names)
        for reshaped in () if found else _reshaped(chain[-1]):
            found = known.counterpart(reshaped, names)
            if found:
                chain = reshaped
                break
        tensor = chain[-1]
        meant = list(meanings(candidate, tensor)) if _is_integer(chain) else []
        label = node.name or node.outputs[0].name or ""
        if not found or not tensor.name or tensor.name in layers or (_is_integer(chain) and not meant):
            alone.append(label)
            continue
        operator = qoperator_of(node)
        op_type = operator.float_op if operator is not None else node.op_type
        pair, grid = known.paired(found, tensor.name, meant, names.recorded.get(tensor.name) == found)
        dtype = tensor.dtype if pair is None else oir.DataType.from_numpy(pair.dtype)
        # Our passes keep the names of layers through what they fuse, and know them by those.
        source = label if ours else known.layer(found) or label
        layers[tensor.name] = Counterpart(
            label, op_type, tensor.name, found, source, dtype or oir.DataType.FLOAT, pair, grid
        )
    return Matching(tuple(layers.values()), tuple(alone))


class _Names:
    """What the tensors of a candidate may be called in its reference."""

    def __init__(self, candidate: Model) -> None:
        self.recorded = _record(candidate)
        self.claimed = {name for value in candidate.values().values() for name in self.of(value)}

    def of(self, value: oir.Value) -> Iterator[str]:
        """Surest first."""
        name = value.name or ""
        if name in self.recorded:
            yield self.recorded[name]
        yield name
        while (shorter := _SUFFIX.sub("", name)) != name:
            name = shorter
            yield name


def _record(candidate: Model) -> dict[str, str]:
    """What ``convert`` wrote into the file: source tensor by integer tensor."""
    text = candidate.ir.metadata_props.get(TENSORS_KEY)
    if text is None:
        return {}
    try:
        record = json.loads(text)
    except json.JSONDecodeError:
        record = None
    if not isinstance(record, dict) or not all(isinstance(name, str) for name in record.values()):
        raise DataError(f"its metadata entry '{TENSORS_KEY}' is no record of tensors", remedy="convert it again")
    return record


class _Reference:
    """The tensors of the reference, and the grids they are read on."""

    def __init__(self, reference: ReadReference) -> None:
        self.model, self._grids = reference.model, reference.grids()
        self.values = {value.name: value for node in self.model.graph for value in node.outputs if value.name}

    def counterpart(self, chain: list[oir.Value], names: _Names) -> str | None:
        """The tensor of the reference that the last of ``chain`` is, by the last of them that is known there."""
        for value in reversed(chain):
            for name in names.of(value):
                if name in self.values:
                    return self._behind_activation(name, names)
        return None

    def layer(self, name: str) -> str:
        """The name of the node that computes tensor ``name``, or that conversion folds what computes it into."""
        value = self.values[name]
        while (maker := value.producer()) is not None:
            above = next((one for one in maker.inputs if one is not None and one.producer() is not None), None)
            before = None if above is None else above.producer()
            folded = maker.op_type in ("Add", "BatchNormalization") and (
                before is not None
                and before.op_type in _WEIGHTED
                and sum(one is not None and one.producer() is not None for one in maker.inputs) == 1
            )
            if above is None or not (maker.op_type in _ABSORBED or folded or maker.op_type == "DequantizeLinear"):
                return maker.name or ""
            value = above
        return ""

    def _behind_activation(self, name: str, names: _Names) -> str:
        """Behind what the candidate folded into the layer: it has no tensor that could be the result of that."""
        while True:
            value = self.values[name]
            readers = [use.node for use in value.uses() if use.idx == 0]
            if len(readers) != 1 or len(list(value.uses())) != 1 or value.is_graph_output():
                return name
            result = readers[0].outputs[0].name
            if readers[0].op_type not in _FOLDED or not result or result in names.claimed:
                return name
            name = result

    def paired(
        self, name: str, integers: str, meant: list[Meaning], recorded: bool
    ) -> tuple[Pair | None, QuantParams | None]:
        """How integers are compared with tensor ``name``, and the grid on which that is read or lies."""
        grids = self._grids.get(name) or list(self._own_grid(name))
        if not recorded:
            # Only our own passes let steps per channel go and keep their levels.
            grids = [grid for grid in grids if not grid.per_channel]
        if not meant:
            own = self._grids.get(name) is None
            return None, grids[0] if own and grids else None
        for grid in grids:
            for one in meant:
                pair = Pair(TrainedTensor(name, name, grid), integers, one.dtype, one.scale, one.zero_point)
                if pair.same_grid:
                    return pair, grid
        one = meant[0]
        dtype = QuantDType.of_storage(oir.DataType.from_numpy(one.dtype))
        assert dtype is not None, "a Quantize writes a type that holds a grid"
        own_grid = QuantParams.make(one.scale, one.zero_point, dtype)
        pair = Pair(TrainedTensor(name, name, own_grid), integers, one.dtype, one.scale, one.zero_point)
        return pair, grids[0] if grids else None

    def _own_grid(self, name: str) -> Iterator[QuantParams]:
        """The grid of integers that the reference itself computes; nothing for floats."""
        if not _is_integer([self.values[name]]):
            return
        for one in meanings(self.model, self.values[name]):
            dtype = QuantDType.of_storage(oir.DataType.from_numpy(one.dtype))
            if dtype is not None:
                yield QuantParams.make(one.scale, one.zero_point, dtype)


def _parameters(model: Model) -> set[oir.Value]:
    """What does not depend on the model's input, and the grids that are made for it on the way."""
    found = {value for value in model.graph.initializers.values() if not value.is_graph_input()}
    for node in model.graph:
        if node.op_type == "DynamicQuantizeLinear":
            found.update(node.outputs[1:])
        elif all(value is None or value in found for value in node.inputs):
            found.update(node.outputs)
    return found


def _layers(model: Model, fixed: set[oir.Value]) -> Iterable[oir.Node]:
    """The nodes of the main graph that compute values from the model's input."""
    return (node for node in model.graph if node.op_type not in _NO_LAYERS and not fixed.issuperset(node.outputs))


def _chain(node: oir.Node, fixed: set[oir.Value]) -> Iterator[oir.Value]:
    """What ``node`` writes, then what it becomes up to the first other layer that reads it."""
    value: oir.Value = node.outputs[0]
    if node.op_type in _ACCUMULATES:
        while (scaled := _scaled(value, fixed)) is not None:
            yield value
            value = scaled
    yield from _absorbed(value)


def _absorbed(value: oir.Value) -> Iterator[oir.Value]:
    """``value``, and what activations and quantizers make of it."""
    yield value
    while (read := _read_by(value, _ABSORBED)) is not None:
        value = read
        yield value


def _reshaped(value: oir.Value) -> Iterator[list[oir.Value]]:
    """The same behind each Reshape that gives ``value`` another shape."""
    while (read := _read_by(value, _RESHAPES)) is not None:
        behind = list(_absorbed(read))
        yield behind
        value = behind[-1]


def _read_by(value: oir.Value, ops: frozenset[str]) -> oir.Value | None:
    """What a node of ``ops`` makes of ``value``, where nothing else reads that."""
    uses = list(value.uses())
    readers = [use.node for use in uses]
    quantized = readers and all(node.op_type == "QuantizeLinear" for node in readers)
    if value.is_graph_output() or not (quantized or len(readers) == 1):
        return None
    return readers[0].outputs[0] if readers[0].op_type in ops and uses[0].idx == 0 else None


def _scaled(value: oir.Value, fixed: set[oir.Value]) -> oir.Value | None:
    """What a node makes of sums on the way to real numbers, where nothing else reads them."""
    readers = [use.node for use in value.uses()]
    if value.is_graph_output() or len(readers) != 1 or readers[0].op_type not in ("Add", "Cast", "Mul"):
        return None
    others = [one for one in readers[0].inputs if one is not value]
    return readers[0].outputs[0] if all(one in fixed for one in others) else None


def _is_integer(chain: list[oir.Value]) -> bool:
    """Whether the last of a chain is levels: a Quantize or an operator with a grid for its result wrote them."""
    waiting = deque(chain[-1:])
    while waiting:
        value = waiting.popleft()
        maker = value.producer()
        if maker is None:
            return value.dtype in (oir.DataType.INT8, oir.DataType.UINT8)
        operator = qoperator_of(maker)
        if operator is not None:
            place = operator.result
            return place is not None and place[0] < len(maker.inputs) and maker.inputs[place[0]] is not None
        if maker.op_type == "QuantizeLinear":
            return True
        if maker.op_type in CARRIES and maker.inputs[0] is not None:
            waiting.append(maker.inputs[0])
    return False
