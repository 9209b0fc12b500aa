"""Views of a graph as networkx sees it, built on demand and thrown away."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import networkx as nx
import onnx_ir as oir

from qat2int8.ir.model import Model


def reads(node: oir.Node) -> Iterator[oir.Value]:
    """Every value ``node`` reads, those its subgraphs capture included."""
    for value in node.inputs:
        if value is not None:
            yield value
    for graph in subgraphs(node):
        for inner in graph:
            yield from reads(inner)
        yield from graph.outputs


def subgraphs(node: oir.Node) -> Iterator[oir.Graph]:
    """The graphs among ``node``'s attributes."""
    for attribute in node.attributes.values():
        if attribute.type is oir.AttributeType.GRAPH and not attribute.is_ref():
            yield attribute.as_graph()
        elif attribute.type is oir.AttributeType.GRAPHS and not attribute.is_ref():
            yield from attribute.as_graphs()


def dataflow(graph: oir.Graph) -> nx.DiGraph:
    """The nodes of one graph, an edge from each producer to each consumer.

    A node with subgraphs consumes what they capture; the nodes inside are not part of the view.
    """
    view = nx.DiGraph()
    view.add_nodes_from(graph)
    for node in graph:
        for value in reads(node):
            producer = value.producer()
            if producer is not None and producer.graph is graph:
                view.add_edge(producer, node)
    return view


def find_cycle(graph: oir.Graph) -> list[oir.Node]:
    """The nodes of one cycle in order, empty when there is none."""
    try:
        return [edge[0] for edge in nx.find_cycle(dataflow(graph))]
    except nx.NetworkXNoCycle:
        return []


def integer_islands(model: Model, is_integer: Callable[[oir.Node], bool]) -> list[set[oir.Node]]:
    """The connected groups of nodes for which ``is_integer`` holds, in order of their first node."""
    view = dataflow(model.graph)
    place = {node: index for index, node in enumerate(view)}
    islands = nx.weakly_connected_components(view.subgraph([node for node in view if is_integer(node)]))
    return sorted((set(island) for island in islands), key=lambda island: min(place[node] for node in island))
