"""The graph the passes work on: an onnx_ir model, its scale table and what training said about its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as oir

from qat2int8.ir.quant import FloatArray
from qat2int8.ir.scale_table import ScaleTable


@dataclass(frozen=True, eq=False)
class ChannelMoments:
    """Mean and standard deviation of each channel of a tensor as seen in training; both of shape (C,)."""

    mean: FloatArray
    std: FloatArray
    axis: int
    origin: str


@dataclass(eq=False)
class Model:
    """One ONNX model plus what quantization needs to know about it.

    ``ir`` is the :class:`onnx_ir.Model`; passes use its own ``Graph``, ``Node`` and ``Value`` API, nothing is
    wrapped twice. ``scales`` and ``moments`` are keyed by value identity; :meth:`replace_value` keeps them in
    step when a pass rewires the graph.
    """

    ir: oir.Model
    scales: ScaleTable = field(default_factory=ScaleTable)
    moments: dict[oir.Value, ChannelMoments] = field(default_factory=dict)
    path: Path | None = None
    _names: set[str] | None = field(default=None, init=False, repr=False)

    @property
    def graph(self) -> oir.Graph:
        """The main graph."""
        return self.ir.graph

    @property
    def opset(self) -> int:
        """The version of the default ONNX domain."""
        return self.ir.opset_imports.get("", 1)

    def nodes(self, *op_types: str) -> Iterator[oir.Node]:
        """Nodes of the main graph in order, of the given ONNX op types or all; safe against removal."""
        for node in tuple(self.graph):
            if not op_types or (node.domain == "" and node.op_type in op_types):
                yield node

    def values(self) -> dict[str, oir.Value]:
        """Every named value of the main graph."""
        named: dict[str, oir.Value] = {}
        for value in (*self.graph.inputs, *self.graph.initializers.values()):
            named[value.name or ""] = value
        for node in self.graph:
            named.update({out.name: out for out in node.outputs if out.name})
        return named

    def constant(self, value: oir.Value | None) -> npt.NDArray[np.generic] | None:
        """The array behind an initializer nobody can override from outside, or a Constant node; else None."""
        if value is None or (value.is_graph_input()):
            return None
        tensor = value.const_value
        if tensor is None:
            tensor = oir.convenience.get_const_tensor(value)
        return None if tensor is None else tensor.numpy()

    def add_initializer(self, name: str, array: npt.NDArray[np.generic]) -> oir.Value:
        """A new initializer of the main graph; the name is made unique."""
        tensor = oir.tensor(array, name=self.unique_name(name))
        value = oir.Value(
            name=tensor.name,
            type=oir.TensorType(tensor.dtype),
            shape=oir.Shape(array.shape),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    def insert_before(self, anchor: oir.Node, node: oir.Node) -> oir.Node:
        """Put ``node`` in front of ``anchor``, in whichever graph that is."""
        assert anchor.graph is not None, "anchor was removed"
        anchor.graph.insert_before(anchor, node)
        return node

    def remove(self, node: oir.Node) -> None:
        """Take ``node``, whose outputs nobody reads, out of its graph, with what the tables know of them."""
        for output in node.outputs:
            self.scales.discard(output)
            self.moments.pop(output, None)
        assert node.graph is not None
        node.graph.remove(node, safe=True)

    def replace_value(self, old: oir.Value, new: oir.Value, *, keep_scale: bool = True) -> None:
        """Let every consumer of ``old`` read ``new``.

        ``new`` takes over the name, type and shape of ``old`` (a graph output keeps its name), what it was of the
        source, and with ``keep_scale`` its grid and statistics. Not for a ``new`` that is a graph input or
        initializer while ``old`` is a graph output: such a pair needs an Identity between them, see
        :meth:`bypass`.
        """
        name, shape, type_ = old.name, old.shape, old.type
        oir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name = None
        new.name = name
        if new.shape is None:
            new.shape = shape
        if new.type is None:
            new.type = type_
        if keep_scale:
            self.scales.move(old, new)
            if old in self.moments:
                self.moments[new] = self.moments.pop(old)
        else:
            self.scales.move_trace(old, new)

    def bypass(self, node: oir.Node) -> None:
        """Let the consumers of ``node``'s only output read its first input, and remove it.

        A graph output keeps its name: the input takes it over where it can, else an Identity stays behind.
        """
        source = node.inputs[0]
        assert source is not None
        self.bypass_to(node, source)

    def bypass_to(self, node: oir.Node, source: oir.Value) -> None:
        """Like :meth:`bypass`, for the input ``source`` of ``node``."""
        output, graph = node.outputs[0], node.graph
        assert graph is not None
        if output.is_graph_output():
            fixed = source.is_graph_input() or source.is_initializer() or source.is_graph_output()
            if fixed or source.graph is not graph:
                identity = oir.node("Identity", [source], name=node.name)
                graph.insert_before(node, identity)
                relay = identity.outputs[0]
                relay.type, relay.shape = output.type, output.shape
                name = output.name
                consumers = [use for use in output.uses() if use.node is not identity]
                for use in consumers:
                    use.node.replace_input_with(use.idx, source)
                oir.convenience.replace_all_uses_with(output, relay, replace_graph_outputs=True)
                output.name, relay.name = None, name
            else:
                name = output.name
                oir.convenience.replace_all_uses_with(output, source, replace_graph_outputs=True)
                output.name, source.name = None, name
                source.type = source.type or output.type
                source.shape = output.shape if source.shape is None else source.shape
        else:
            oir.convenience.replace_all_uses_with(output, source)
        graph.remove(node, safe=True)

    def unique_name(self, wanted: str) -> str:
        """``wanted``, or ``wanted_1``, ``wanted_2`` ... when a value or node of the main graph has that name."""
        if self._names is None:
            self._names = {name for name in self.values() if name}
            for node in self.graph.all_nodes():
                self._names.update(out.name for out in node.outputs if out.name)
                self._names.add(node.name or "")
        name, count = wanted, 0
        while name in self._names:
            count += 1
            name = f"{wanted}_{count}"
        self._names.add(name)
        return name

    def forget_names(self) -> None:
        """Let :meth:`unique_name` look at the graph again, after something else than it added names."""
        self._names = None

    def digest(self) -> str:
        """A short hex digest of the serialised model, to bind tables and certificates to it."""
        return hashlib.sha256(self.to_proto().SerializeToString(deterministic=True)).hexdigest()[:16]

    def to_proto(self) -> onnx.ModelProto:
        """The model as protobuf."""
        return oir.to_proto(self.ir)

    @classmethod
    def from_proto(cls, proto: onnx.ModelProto) -> Model:
        """Wrap a protobuf model, which is left as it is."""
        return cls(oir.from_proto(proto))

    def clone(self) -> Model:
        """An independent copy of the graph; weights are shared until replaced, scales and statistics follow."""
        twin = Model(self.ir.clone(), path=self.path)
        here, there = self.values(), twin.values()
        for name, value in here.items():
            if value in self.scales:
                twin.scales.set(there[name], self.scales[value])
            if value in self.moments:
                twin.moments[there[name]] = self.moments[value]
        for value, tensor in self.scales.traces():
            if value.name in there:
                twin.scales.trace(there[value.name], tensor)
        return twin
