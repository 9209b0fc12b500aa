"""A graph as boxes in rows: what computes, in the order data flow, with integers and floats told apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import networkx as nx
import onnx_ir as oir

from qat2int8.ir import Model
from qat2int8.pipelines.dialects import is_foreign
from qat2int8.pipelines.reporting.document import Drawing, DrawnEdge, DrawnNode

__all__ = ["draw"]

Kind = Literal["integer", "float", "movement"]

_HIDDEN = frozenset({"Constant", "Identity", "QuantizeLinear", "DequantizeLinear", "Cast", "Clip"})
"""Passed through: what matters of them is the kind of their neighbours. A Clip is shown where it is in float."""
_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_MOST = 400
"""Boxes that a page can show and a person can follow."""


def draw(model: Model, title: str, kind: Callable[[oir.Node], Kind], note: Callable[[oir.Node], str]) -> Drawing:
    """The main graph of ``model`` from its inputs to its outputs, quantizers and constants left out.

    Args:
        kind: whether a node computes on integers, in float, or only moves data.
        note: what to say about a node when it is pointed at; empty for nothing.
    """
    live = _live(model)
    shown = [node for node in model.nodes() if not _is_hidden(node, live, kind)]
    left_out = max(len(shown) - _MOST, 0)
    shown = shown[:_MOST]
    inputs = [value for value in model.graph.inputs if value.uses() and model.constant(value) is None]
    outputs = [] if left_out else list(model.graph.outputs)
    boxes: list[oir.Node | oir.Value] = [*inputs, *shown]
    index = {box: number for number, box in enumerate(boxes)}
    kinds = {index[node]: kind(node) for node in shown}
    edges: dict[tuple[int, int], bool] = {}
    read = [(value, index[node]) for node in shown for value in node.inputs]
    for value, target in [*read, *((value, len(boxes) + number) for number, value in enumerate(outputs))]:
        source, integer = _source(value, live, index)
        if source is not None:
            pair = source, target
            both = kinds.get(source) == kinds.get(target) == "integer"
            edges[pair] = edges.get(pair, True) and (integer or both)
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(len(boxes) + len(outputs)))
    graph.add_edges_from(edges)
    rows = {node: row for row, layer in enumerate(nx.topological_generations(graph)) for node in layer}
    columns = _columns(graph, rows)
    nodes = tuple(
        DrawnNode(
            name=box.name or "",
            op_type=box.op_type if isinstance(box, oir.Node) else "input" if number < len(inputs) else "output",
            kind=kinds.get(number, "end"),
            column=columns[number],
            row=rows[number],
            note=note(box) if isinstance(box, oir.Node) else "",
        )
        for number, box in enumerate([*boxes, *outputs])
    )
    drawn = tuple(DrawnEdge(source=a, target=b, integer=integer) for (a, b), integer in edges.items())
    return Drawing(title=title, nodes=nodes, edges=drawn, islands=_islands(graph, kinds), left_out=left_out)


def _islands(graph: nx.DiGraph[int], kinds: dict[int, Kind]) -> tuple[tuple[int, ...], ...]:
    """Nodes in float that feed each other, be it through data movement; in the order of the graph."""
    not_integer = graph.subgraph(number for number, kind in kinds.items() if kind != "integer")
    found = (
        tuple(sorted(number for number in part if kinds[number] == "float"))
        for part in nx.weakly_connected_components(not_integer)
    )
    return tuple(sorted(island for island in found if island))


def _live(model: Model) -> set[oir.Value]:
    """What depends on the inputs of the graph; all else is constant, however it is computed."""
    live = {value for value in model.graph.inputs if model.constant(value) is None}
    for node in model.nodes():
        if not live.isdisjoint(node.inputs):
            live.update(node.outputs)
    return live


def _is_hidden(node: oir.Node, live: set[oir.Value], kind: Callable[[oir.Node], Kind]) -> bool:
    if node.op_type == "Clip" and kind(node) == "float":
        return live.isdisjoint(node.outputs)
    return node.op_type in _HIDDEN or is_foreign(node) or live.isdisjoint(node.outputs)


def _source(
    value: oir.Value | None, live: set[oir.Value], index: dict[oir.Node | oir.Value, int]
) -> tuple[int | None, bool]:
    """The box whose data ``value`` carries, by its index, and whether a quantizer stands between."""
    integer = False
    while value in live:
        node = value.producer()
        box = value if node is None else node
        if node is None or node in index:
            return index.get(box), integer
        integer = integer or node.op_type in _QUANTIZERS or is_foreign(node)
        value = next((each for each in node.inputs if each in live), None)
    return None, integer


def _columns(graph: nx.DiGraph[int], rows: dict[int, int]) -> dict[int, float]:
    """A place for every node in its row: below what it reads, the longest way through the graph to the left."""
    ahead: dict[int, int] = {}
    for node in reversed(list(nx.topological_sort(graph))):
        ahead[node] = 1 + max((ahead[reader] for reader in graph.successors(node)), default=0)
    columns: dict[int, float] = {}
    layers: dict[int, list[int]] = {}
    for node, row in rows.items():
        layers.setdefault(row, []).append(node)
    for row in sorted(layers):
        wanted = {
            node: min((columns[above] for above in graph.predecessors(node)), default=0.0) for node in layers[row]
        }
        taken = -1.0
        for node in sorted(layers[row], key=lambda each: (wanted[each], -ahead[each], each)):
            columns[node] = max(wanted[node], taken + 1.0)
            taken = columns[node]
    return columns
