"""A graph as boxes in rows: what computes, in the order data flow, with integers and floats told apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import networkx as nx
import onnx_ir as oir

from qat2int8.ir import Model
from qat2int8.pipelines.reporting.document import Drawing, DrawnEdge, DrawnNode

__all__ = ["draw"]

Kind = Literal["integer", "float", "movement"]

_HIDDEN = frozenset({"Constant", "Identity", "QuantizeLinear", "DequantizeLinear", "Cast", "Clip"})
"""Passed through: what matters of them is the kind of their neighbours. A Clip is shown where it is in float."""
_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_MOST = 400
"""Boxes that a page can show and a person can follow."""


def draw(model: Model, title: str, kind: Callable[[oir.Node], Kind], note: Callable[[oir.Node], str]) -> Drawing:
    """The main graph of ``model``, quantizers and constants left out.

    Args:
        kind: whether a node computes on integers, in float, or only moves data.
        note: what to say about a node when it is pointed at; empty for nothing.
    """
    shown = [node for node in model.nodes() if not _is_hidden(model, node, kind)]
    left_out = max(len(shown) - _MOST, 0)
    shown = shown[:_MOST]
    index = {node: number for number, node in enumerate(shown)}
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(len(shown)))
    edges: dict[tuple[int, int], bool] = {}
    for node in shown:
        for value in node.inputs:
            source, integer = _source(model, value, index)
            if source is not None:
                pair = index[source], index[node]
                edges[pair] = edges.get(pair, True) and (integer or kind(source) == kind(node) == "integer")
    graph.add_edges_from(edges)
    rows = {node: row for row, layer in enumerate(nx.topological_generations(graph)) for node in layer}
    columns = _columns(graph, rows)
    nodes = tuple(
        DrawnNode(
            name=node.name or "",
            op_type=node.op_type,
            kind=kind(node),
            column=columns[number],
            row=rows[number],
            note=note(node),
        )
        for number, node in enumerate(shown)
    )
    drawn = tuple(DrawnEdge(source=a, target=b, integer=integer) for (a, b), integer in edges.items())
    return Drawing(title=title, nodes=nodes, edges=drawn, left_out=left_out)


def _is_hidden(model: Model, node: oir.Node, kind: Callable[[oir.Node], Kind]) -> bool:
    if node.op_type == "Clip":
        return kind(node) != "float"
    return node.op_type in _HIDDEN or not any(
        value is not None and model.constant(value) is None for value in node.inputs
    )


def _source(model: Model, value: oir.Value | None, index: dict[oir.Node, int]) -> tuple[oir.Node | None, bool]:
    """The shown node whose data ``value`` carries, and whether a quantizer stands between."""
    integer = False
    while value is not None:
        node = value.producer()
        if node is None or node in index:
            return node, integer
        integer = integer or node.op_type in _QUANTIZERS
        value = next((each for each in node.inputs if each is not None and model.constant(each) is None), None)
    return None, integer


def _columns(graph: nx.DiGraph[int], rows: dict[int, int]) -> dict[int, float]:
    """A place for every node in its row, near the nodes it reads from."""
    columns: dict[int, float] = {}
    layers: dict[int, list[int]] = {}
    for node, row in rows.items():
        layers.setdefault(row, []).append(node)
    for row in sorted(layers):
        wanted = {
            node: sum(columns[above] for above in graph.predecessors(node)) / max(graph.in_degree(node), 1)
            for node in layers[row]
        }
        taken = -1.0
        for node in sorted(layers[row], key=lambda each: (wanted[each], each)):
            columns[node] = max(wanted[node], taken + 1.0)
            taken = columns[node]
    return columns
