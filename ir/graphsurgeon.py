"""To onnx-graphsurgeon and back, without losing what it does not know of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as oir
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from qat2int8.ir.analysis import find_cycle, subgraphs
from qat2int8.ir.errors import InvalidModel, UnsupportedModel
from qat2int8.ir.model import Model
from qat2int8.ir.substitute import substitute, substituted
from qat2int8.ir.verify import VerifyLevel, label, path_of, verify


def to_gs(model: Model) -> gs.Graph:
    """``model`` as a GraphSurgeon graph to edit freely; the model is neither changed nor shared.

    Weights are not copied until their ``values`` are read.

    Raises:
        UnsupportedModel: naming the node or tensor GraphSurgeon cannot hold.
    """
    _refuse(model)
    weights: dict[str, oir.TensorProtocol] = {}

    def stub(tensor: oir.TensorProtocol) -> oir.TensorProtocol:
        key = str(len(weights))
        weights[key] = tensor
        return _stub(key, tensor)

    with substituted(model.ir, stub):
        proto = model.to_proto()
    del proto.functions[:]
    with _quiet():
        graph = gs.import_onnx(proto)
    for constant in _constants(graph):
        constant._values = _Weight(weights[_key(constant._values.tensor)])
        constant.data_location = None
    sources = model.values()
    for tensor in graph.tensors().values():
        setattr(tensor, _SOURCE, sources.get(tensor.name))
    return graph


def from_gs(graph: gs.Graph, *, like: Model) -> Model:
    """The model that ``graph``, which :func:`to_gs` made of ``like``, has become.

    Nodes are sorted. Everything GraphSurgeon does not know comes from ``like``: versions, metadata and
    functions of the model, documentation and metadata of each node and tensor that still has its name,
    initializers that are also graph inputs. Initializers nothing reads are gone. Grids and statistics stay with
    the tensor they were of, renamed or not; for tensors that were made anew the name decides.

    Raises:
        UnsupportedModel: the graph uses something that would not survive.
        InvalidModel: the graph is not valid.
    """
    sources = _sources(graph, like)
    weights: dict[str, oir.TensorProtocol] = {}
    ir = oir.from_proto(_export(graph, like, weights))
    substitute(
        ir, lambda tensor: weights[str(tensor.location)] if isinstance(tensor, oir.ExternalTensor) else tensor
    )
    _restore_model(ir, like)
    model = Model(ir, path=like.path)
    _restore_inputs(model, like)
    try:
        ir.graph.sort()
    except ValueError:
        raise InvalidModel(f"the graph has a cycle: {path_of(find_cycle(ir.graph))}") from None
    _restore_values(model, like, sources)
    _restore_nodes(ir.graph, like.graph)
    verify(model, VerifyLevel.CHECKER)
    return model


_SOURCE = "_qat2int8_source"
"""The attribute by which a GraphSurgeon tensor remembers the value it was made from, through renames."""

_LOST_ATTRIBUTES = {
    oir.AttributeType.GRAPHS,
    oir.AttributeType.TENSORS,
    oir.AttributeType.TYPE_PROTO,
    oir.AttributeType.TYPE_PROTOS,
    oir.AttributeType.SPARSE_TENSOR,
    oir.AttributeType.SPARSE_TENSORS,
}


class _Weight(LazyValues):  # type: ignore[misc]
    """A constant's values, still in the tensor they came from; ``key`` while it is exported as a stub."""

    def __init__(self, source: oir.TensorProtocol) -> None:
        self.source = source
        self.key: str | None = ""
        super().__init__(None)
        self.key = None

    @property
    def tensor(self) -> onnx.TensorProto:
        if self.key is not None:
            return oir.serde.serialize_tensor(_stub(self.key, self.source))
        if isinstance(self.source, oir.ExternalTensor):
            held = oir.Tensor(self.source.numpy(), dtype=self.source.dtype, name=self.source.name)
            return oir.serde.serialize_tensor(held)
        return oir.serde.serialize_tensor(self.source)

    @tensor.setter
    def tensor(self, _: onnx.TensorProto) -> None:
        """The base class wants to keep one; here it is made when asked for."""

    def load(self) -> npt.NDArray[np.generic]:
        """A copy of the values, which may be changed in place."""
        return np.array(self.source.numpy())


def _quiet() -> AbstractContextManager[object]:
    """GraphSurgeon prints what it then raises; only the raise is wanted."""
    suppressed: AbstractContextManager[object] = G_LOGGER.suppress(G_LOGGER.CRITICAL + 1)
    return suppressed


def _stub(key: str, tensor: oir.TensorProtocol) -> oir.ExternalTensor:
    shape = oir.Shape(tensor.shape.numpy())
    return oir.ExternalTensor(key, None, None, tensor.dtype, shape=shape, name=tensor.name or "")


def _key(proto: onnx.TensorProto) -> str:
    return str(next(entry.value for entry in proto.external_data if entry.key == "location"))


def _refuse(model: Model) -> None:
    for graph in model.ir.graphs():
        for node in graph:
            if node.overload:
                raise UnsupportedModel(
                    "calls an overloaded function", where=label(node), remedy="inline functions"
                )
            for attribute in node.attributes.values():
                if attribute.is_ref():
                    continue
                empty = attribute.type in _LISTS and not attribute.value
                if attribute.type in _LOST_ATTRIBUTES or empty:
                    kind = f"{'empty ' if empty else ''}{attribute.type.name}"
                    raise UnsupportedModel(
                        f"GraphSurgeon cannot hold attribute '{attribute.name}' of type {kind}",
                        where=label(node),
                        remedy="use a pass written on onnx_ir",
                    )
            for value in node.outputs:
                _refuse_type(value)
        for value in (*graph.inputs, *graph.outputs):
            _refuse_type(value)


_LISTS = {
    oir.AttributeType.FLOATS,
    oir.AttributeType.INTS,
    oir.AttributeType.STRINGS,
}


def _refuse_type(value: oir.Value) -> None:
    if value.type is not None and not isinstance(value.type, oir.TensorType | oir.SequenceType):
        raise UnsupportedModel(
            f"GraphSurgeon cannot hold a value of type {value.type}",
            where=f"tensor '{value.name}'",
            remedy="use a pass written on onnx_ir",
        )


def _nested(graph: gs.Graph) -> Iterator[gs.Graph]:
    yield graph
    for node in graph.nodes:
        for attribute in node.attrs.values():
            if isinstance(attribute, gs.Graph):
                yield from _nested(attribute)


def _constants(graph: gs.Graph) -> Iterator[gs.Constant]:
    """Every constant once: those nodes read or the graphs return, and those in attributes."""
    seen: set[int] = set()
    for scope in _nested(graph):
        held = [value for node in scope.nodes for value in (*node.inputs, *node.outputs, *node.attrs.values())]
        for tensor in (*held, *scope.inputs, *scope.outputs):
            if isinstance(tensor, gs.Constant) and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def _sources(graph: gs.Graph, like: Model) -> dict[str, oir.Value]:
    """Which value of ``like`` each tensor of the edited graph is, by name of the latter."""
    before: dict[str, oir.Value] = like.values()
    tensors: dict[str, gs.Tensor] = {}
    for node in graph.nodes:
        for tensor in (*node.inputs, *node.outputs):
            if not tensor.is_empty() and tensors.setdefault(tensor.name, tensor) is not tensor:
                raise InvalidModel(
                    f"two tensors are called '{tensor.name}'", where=f"node '{node.name}' ({node.op})"
                )
    for tensor in (*graph.inputs, *graph.outputs):
        if tensors.setdefault(tensor.name, tensor) is not tensor:
            raise InvalidModel(f"two tensors are called '{tensor.name}'", where="the graph's inputs and outputs")
    sources: dict[str, oir.Value] = {}
    for name, tensor in tensors.items():
        source: oir.Value | None = getattr(tensor, _SOURCE, None)
        if source is not None and before.get(source.name or "") is source:
            sources[name] = source
    claimed = set(sources.values())
    for name in tensors.keys() - sources.keys():
        if name in before and before[name] not in claimed:
            sources[name] = before[name]
    return sources


def _export(graph: gs.Graph, like: Model, weights: dict[str, oir.TensorProtocol]) -> onnx.ModelProto:
    """``graph`` as protobuf with stubs for weights, which are put into ``weights`` by their stub's location."""
    if graph.functions:
        raise UnsupportedModel("functions cannot be added in GraphSurgeon", remedy="inline what they do")
    stubs: list[tuple[gs.Constant, object]] = []
    try:
        for constant in _constants(graph):
            held = constant._values
            stubs.append((constant, held))
            if isinstance(held, np.ndarray):
                source = _tensor(constant)
            elif isinstance(held, _Weight):
                source = held.source
            else:
                raise UnsupportedModel(
                    "a constant that is neither an array nor came with the model",
                    where=f"tensor '{constant.name}'",
                    remedy="give it as a numpy array",
                )
            stub = _Weight(source)
            stub.key = str(len(weights))
            weights[stub.key] = source
            constant._values = stub
        with _quiet():
            proto: onnx.ModelProto = gs.export_onnx(graph)
    except (UnsupportedModel, InvalidModel):
        raise
    except Exception as error:  # GraphSurgeon raises its own, TypeError, ValueError, UnboundLocalError ...
        raise InvalidModel(f"GraphSurgeon cannot export the graph: {error}") from error
    finally:
        for constant, held in stubs:
            constant._values = held
    _undo_capture_copies(proto.graph, set(like.graph.initializers))
    return proto


def _tensor(constant: gs.Constant) -> oir.TensorProtocol:
    values = constant._values
    if constant.export_dtype != values.dtype:
        raise UnsupportedModel(
            f"export_dtype {constant.export_dtype} differs from the type of the values",
            where=f"tensor '{constant.name}'",
            remedy="convert the values with ml_dtypes",
        )
    if values.dtype.kind in "OSU":
        encoded = [item if isinstance(item, bytes) else str(item).encode() for item in values.reshape(-1)]
        return oir.StringTensor(encoded, shape=oir.Shape(values.shape), name=constant.name)
    return oir.tensor(values, name=constant.name)


def _undo_capture_copies(graph: onnx.GraphProto, outer: set[str]) -> None:
    """GraphSurgeon exports an outer initializer into every subgraph that reads it; leave it where it was."""
    names = outer | {tensor.name for tensor in graph.initializer}
    present = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type != onnx.AttributeProto.GRAPH:
                continue
            _undo_capture_copies(attribute.g, names)
            own = []
            for tensor in attribute.g.initializer:
                if tensor.name not in names:
                    own.append(tensor)
                elif tensor.name not in present:
                    present.add(tensor.name)
                    graph.initializer.append(tensor)
            kept = onnx.GraphProto(initializer=own)
            attribute.g.ClearField("initializer")
            attribute.g.initializer.MergeFrom(kept.initializer)


def _restore_model(ir: oir.Model, like: Model) -> None:
    source = like.ir
    for field in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(ir, field, getattr(source, field))
    ir.device_configurations = source.device_configurations
    ir.metadata_props.update(source.metadata_props)
    ir.meta.update(source.meta)
    ir.functions.update(source.functions)
    ir.graph.opset_imports.update(source.graph.opset_imports)
    ir.graph.metadata_props.update(source.graph.metadata_props)


def _restore_inputs(model: Model, like: Model) -> None:
    """Initializers a caller may override become graph inputs again, and all get back into their order."""
    for index, before in enumerate(like.graph.inputs):
        name = before.name or ""
        if name not in like.graph.initializers or any(value.name == name for value in model.graph.inputs):
            continue
        value = model.graph.initializers.get(name)
        if value is None:
            value = oir.Value(name=name, type=before.type, shape=before.shape, const_value=before.const_value)
            model.graph.register_initializer(value)
        model.graph.inputs.insert(index, value)
    place = {name: index for index, name in enumerate(like.graph.initializers)}
    initializers = sorted(
        model.graph.initializers.values(), key=lambda value: place.get(value.name or "", len(place))
    )
    model.graph.initializers.clear()
    for value in initializers:
        model.graph.register_initializer(value)


def _restore_values(model: Model, like: Model, sources: dict[str, oir.Value]) -> None:
    for name, value in model.values().items():
        source = sources.get(name)
        if source is None:
            continue
        if value.name == source.name:
            value.metadata_props.update(source.metadata_props)
            value.meta.update(source.meta)
            value.doc_string = source.doc_string
        if not isinstance(source.type, oir.TensorType):
            value.type, value.shape = source.type, source.shape
        elif value.type == source.type and value.shape == source.shape:
            value.type, value.shape = source.type, source.shape  # with their denotations
        if source in like.scales:
            model.scales.set(value, like.scales[source])
        if source in like.moments:
            model.moments[value] = like.moments[source]


def _restore_nodes(graph: oir.Graph, like: oir.Graph) -> None:
    """Documentation, metadata and placement of each node that still stands, told by its name or first output."""
    by_key = {key: node for node in reversed(like) for key in _node_keys(node)}
    for node in graph:
        before = next((by_key[key] for key in _node_keys(node) if key in by_key), None)
        if before is None:
            continue
        node.doc_string = before.doc_string
        node.metadata_props.update(before.metadata_props)
        node.meta.update(before.meta)
        node.device_configurations = before.device_configurations
        for inner, inner_before in zip(subgraphs(node), subgraphs(before), strict=False):
            _restore_nodes(inner, inner_before)


def _node_keys(node: oir.Node) -> Iterator[tuple[str, str, str]]:
    if node.name:
        yield "name", node.op_type, node.name
    if node.outputs and node.outputs[0].name:
        yield "output", node.op_type, node.outputs[0].name
