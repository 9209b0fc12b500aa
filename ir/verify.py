"""Is a model valid? Own invariants first, then onnx's checker on a twin of the model that has no weights."""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Iterable, Iterator, Sequence

import onnx
import onnx_ir as oir

from qat2int8.ir.analysis import find_cycle, subgraphs
from qat2int8.ir.errors import InvalidModel
from qat2int8.ir.model import Model
from qat2int8.ir.substitute import substituted

WEIGHT_BYTES = 1024
"""Tensors above this size are weights, whose values say nothing about whether the graph is valid."""


class VerifyLevel(enum.StrEnum):
    """How closely to look; each level includes the ones before it."""

    NONE = "none"
    STRUCTURE = "structure"
    """Own invariants: names, scopes, order, initializers, the contract of graph inputs and outputs."""
    CHECKER = "checker"
    """onnx's checker with type and shape inference."""
    NUMERIC = "numeric"
    """The outputs are compared as well, by whoever runs the passes; here the same as CHECKER."""


def verify(
    model: Model,
    level: VerifyLevel,
    *,
    graph_inputs: Sequence[str] | None = None,
    graph_outputs: Sequence[str] | None = None,
) -> None:
    """Check ``model`` up to ``level``.

    Args:
        graph_inputs: the names its inputs must have, in order; None: any.
        graph_outputs: likewise for its outputs.

    Raises:
        InvalidModel: naming the node or tensor at fault.
    """
    if level is VerifyLevel.NONE:
        return
    for kind, values, names in (
        ("inputs", model.graph.inputs, graph_inputs),
        ("outputs", model.graph.outputs, graph_outputs),
    ):
        present = [value.name for value in values]
        if names is not None and present != list(names):
            raise InvalidModel(f"the graph's {kind} were {list(names)} and are now {present}")
    known: set[oir.Value] = set()
    _check_graph(model.graph, known)
    for value in (*model.scales, *model.moments):
        if value not in known:
            raise InvalidModel(f"tensor '{value.name}' has a grid or statistics but is no longer in the graph")
    if level is not VerifyLevel.STRUCTURE:
        check(weightless(model.ir))


def check(proto: onnx.ModelProto) -> None:
    """onnx's checker on ``proto``, its verdict in one sentence.

    Raises:
        InvalidModel: naming node or tensor where the checker does.
    """
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # besides its own errors it leaks UnicodeDecodeError, ValueError and RuntimeError
        raise _verdict(str(error)) from error


def weightless(ir: oir.Model) -> onnx.ModelProto:
    """``ir`` as protobuf, with every large tensor turned into a graph input of its type; nothing is copied."""
    with substituted(ir, _stub):
        proto = oir.to_proto(ir)
    _hoist_weights(proto)
    return proto


def weightless_file(proto: onnx.ModelProto) -> onnx.ModelProto:
    """As :func:`weightless`, for a file as it was read: what onnx_ir would not keep is still there to check."""
    twin = onnx.ModelProto()
    for field, content in proto.ListFields():
        if field.name != "graph":
            _copy_field(twin, field.name, content)
    for field, content in proto.graph.ListFields():
        if field.name != "initializer":
            _copy_field(twin.graph, field.name, content)
    for tensor in proto.graph.initializer:
        stub = twin.graph.initializer.add()
        if _is_weight(tensor):
            stub.name, stub.data_type, stub.data_location = (
                tensor.name,
                tensor.data_type,
                onnx.TensorProto.EXTERNAL,
            )
            stub.dims.extend(tensor.dims)
        else:
            stub.CopyFrom(tensor)
    _hoist_weights(twin)
    return twin


def nbytes(tensor: onnx.TensorProto) -> int:
    """Bytes the elements of ``tensor`` take by its dims and type; 0 for a type of no fixed width.

    Raises:
        ValueError: onnx knows no such element type.
    """
    try:
        bits = oir.DataType(tensor.data_type).bitwidth
    except TypeError:
        return 0
    return int(-(-math.prod(tensor.dims) * bits // 8))


def _copy_field(message: onnx.ModelProto | onnx.GraphProto, name: str, content: object) -> None:
    if isinstance(content, str | int):
        setattr(message, name, content)
    else:
        getattr(message, name).MergeFrom(content)


def _stub(tensor: oir.TensorProtocol) -> oir.TensorProtocol:
    if tensor.nbytes <= WEIGHT_BYTES and not isinstance(tensor, oir.ExternalTensor):
        return tensor
    shape = oir.Shape(tensor.shape.numpy())
    return oir.ExternalTensor("", None, None, tensor.dtype, shape=shape, name=tensor.name or "")


def _is_weight(tensor: onnx.TensorProto) -> bool:
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return True
    try:
        return nbytes(tensor) > WEIGHT_BYTES
    except ValueError:
        return False


def _hoist_weights(proto: onnx.ModelProto) -> None:
    """Turn each large tensor into an input of the main graph, and inside a subgraph into an Identity of it.

    An initializer cannot just lose its data, the checker counts the bytes; an input of the same type is what
    type and shape inference sees of it anyway.
    """
    main = proto.graph
    present = {info.name for info in main.input}
    for tensor in _take_weights(main):
        if tensor.name not in present:
            _add_input(main, tensor.name, tensor)
    for graph in _nested(main):
        hoisted = _take_weights(graph) if graph is not main else []
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type != onnx.AttributeProto.TENSOR or not _is_weight(attribute.t):
                    continue
                if (node.domain, node.op_type) == ("", "Constant"):
                    name = _add_input(main, f"/weight/{len(main.input)}", attribute.t)
                    node.op_type, node.input[:] = "Identity", [name]
                    node.ClearField("attribute")
                    break
                attribute.t.CopyFrom(onnx.TensorProto(data_type=attribute.t.data_type, dims=[0]))
        for tensor in hoisted:
            name = _add_input(main, f"/weight/{len(main.input)}", tensor)
            graph.node.insert(0, onnx.NodeProto(op_type="Identity", input=[name], output=[tensor.name]))


def _take_weights(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    tensors = list(graph.initializer)
    weights = [tensor for tensor in tensors if _is_weight(tensor)]
    if weights:
        small = onnx.GraphProto(initializer=[tensor for tensor in tensors if not _is_weight(tensor)])
        graph.ClearField("initializer")
        graph.initializer.MergeFrom(small.initializer)
    return weights


def _add_input(graph: onnx.GraphProto, name: str, tensor: onnx.TensorProto) -> str:
    graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
    return name


def _nested(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nested(attribute.g)
            elif attribute.type == onnx.AttributeProto.GRAPHS:
                for inner in attribute.graphs:
                    yield from _nested(inner)


def _check_graph(graph: oir.Graph, known: set[oir.Value]) -> list[oir.Value]:
    """The invariants of one scope. ``known`` holds the values of those around; its own are added and returned."""
    names: set[str] = set()
    own: list[oir.Value] = []

    def define(values: Iterable[oir.Value], where: str) -> None:
        for value in values:
            if not value.name:
                if value.uses() or value.is_graph_output():
                    raise InvalidModel("a tensor that is read has no name", where=where)
                continue
            if value.name in names:
                raise InvalidModel(f"two tensors are called '{value.name}'", where=where)
            names.add(value.name)
            known.add(value)
            own.append(value)

    define(graph.inputs, "the graph's inputs")
    inputs = set(graph.inputs)
    for name, value in graph.initializers.items():
        if value.const_value is None:
            raise InvalidModel(f"initializer '{name}' has no value")
        if value.name != name:
            raise InvalidModel(f"initializer '{value.name}' is registered as '{name}'")
        if value not in inputs:
            define((value,), "the graph's initializers")
    for node in graph:
        for read in node.inputs:
            if read is not None and read not in known:
                raise _undefined(node, read, graph)
        for inner in subgraphs(node):
            known.difference_update(_check_graph(inner, known))
        define(node.outputs, label(node))
    for value in graph.outputs:
        if value not in known:
            raise InvalidModel(f"nothing computes graph output '{value.name}'")
    return own


def _undefined(node: oir.Node, value: oir.Value, graph: oir.Graph) -> InvalidModel:
    producer = value.producer()
    if producer is None or producer.graph is None:
        return InvalidModel(f"input '{value.name}' is defined nowhere", where=label(node))
    if cycle := find_cycle(graph):
        return InvalidModel(f"the graph has a cycle: {path_of(cycle)}")
    return InvalidModel(f"input '{value.name}' is computed later, by {label(producer)}", where=label(node))


def label(node: oir.Node) -> str:
    """How messages speak of a node: its name, else its first output, and its op type."""
    named = f"node '{node.name}'" if node.name else f"the node of '{node.outputs[0].name if node.outputs else ''}'"
    return f"{named} ({node.op_type})"


def path_of(cycle: Sequence[oir.Node]) -> str:
    """A cycle as one line, cut where it gets long."""
    shown = [node.name or node.outputs[0].name or node.op_type for node in cycle]
    if len(shown) > _SHOWN_NODES:
        shown = [*shown[: _SHOWN_NODES - 1], "..."]
    return " -> ".join(f"'{name}'" for name in (*shown, shown[0]))


_SHOWN_NODES = 6
_SHOWN_CHARACTERS = 240
_NODE = re.compile(r"\(op_type:\s*(?P<op>\w+)(?:, node name: (?P<name>[^)]*))?\)")
_CONTEXT = re.compile(r"Bad node spec for node\. Name: (?P<name>.*?) OpType: (?P<op>\w+)")
_UNSORTED = re.compile(
    r"however input '(?P<value>[^']*)' of node:\s*name: (?P<name>.*?) OpType: (?P<op>\w+)", re.DOTALL
)
_NOISE = re.compile(r"\[(ShapeInferenceError|TypeInferenceError)\]|Inference error\(s\):", re.DOTALL)


def _verdict(message: str) -> InvalidModel:
    """The checker's message cut down to its first finding and the node it speaks of."""
    if found := _UNSORTED.search(message):
        return InvalidModel(
            f"input '{found['value']}' is not defined before it is read",
            where=f"node '{found['name'].strip()}' ({found['op']})",
        )
    found = _NODE.search(message) or _CONTEXT.search(message)
    where = f"node '{(found['name'] or '').strip()}' ({found['op']})" if found else ""
    what = _NODE.sub("", message.split("==> Context:")[0]).splitlines()
    lines = (_NOISE.sub("", line).strip(" :,") for line in what)
    first = next((line for line in lines if line), "")
    return InvalidModel(
        f"not valid ONNX: {first[:_SHOWN_CHARACTERS] or 'the checker gives no reason'}", where=where
    )
