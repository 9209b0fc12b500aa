"""A drawing of a graph in pixels: boxes with an op and a name, and the lines between them."""

from __future__ import annotations

from typing import Any

from qat2int8.pipelines.reporting.document import Drawing, DrawnNode

__all__ = ["picture"]

_WIDTH, _HEIGHT, _COLUMN, _ROW, _MARGIN = 148, 34, 162, 50, 12
_SWING = 18
_NAME = 24
"""Characters of a name that fit a box."""
_ROWS = 15
"""Rows that fit a sheet of paper."""
_ISLANDS = 12
"""Islands with a link of their own."""


def picture(drawing: Drawing, label: str) -> dict[str, Any]:
    """Places in pixels; an edge that skips rows swings out to the right, past the boxes of its column.

    Args:
        label: tells the places that a page names from those of its other drawings.
    """
    places = [(_MARGIN + node.column * _COLUMN, _MARGIN + node.row * _ROW) for node in drawing.nodes]
    in_float = sum(node.kind == "float" for node in drawing.nodes)
    computing = sum(node.kind in ("float", "integer") for node in drawing.nodes)
    linked = drawing.islands[:_ISLANDS] if in_float < computing else ()
    first = {island[0]: f"island-{label}-{number}" for number, island in enumerate(linked, 1)}
    boxes = [
        {"node": node, "x": x, "y": y, "name": _shortened(node), "id": first.get(index, "")}
        for index, (node, (x, y)) in enumerate(zip(drawing.nodes, places, strict=True))
    ]
    islands = [
        {"id": first[island[0]], "ops": ", ".join(dict.fromkeys(drawing.nodes[one].op_type for one in island))}
        for island in linked
    ]
    height = max((y for _, y in places), default=0) + _HEIGHT + _MARGIN
    return {
        "drawing": drawing,
        "id": f"graph-{label}",
        "boxes": boxes,
        "paths": [
            {"d": _path(drawing, places, edge.source, edge.target), "integer": edge.integer}
            for edge in drawing.edges
        ],
        "islands": islands,
        "more_islands": len(drawing.islands) - len(islands) if islands else 0,
        "in_float": in_float,
        "computing": computing,
        "width": max((x for x, _ in places), default=0) + _WIDTH + _MARGIN + _SWING,
        "height": height,
        "sheets": [
            {"top": top, "height": min(_ROWS * _ROW, height - top)} for top in range(0, height, _ROWS * _ROW)
        ],
        "box": (_WIDTH, _HEIGHT),
    }


def _path(drawing: Drawing, places: list[tuple[float, int]], source: int, target: int) -> str:
    (x1, y1), (x2, y2) = ((x + _WIDTH / 2, y) for x, y in (places[source], places[target]))
    start = y1 + _HEIGHT
    if drawing.nodes[target].row - drawing.nodes[source].row > 1 and x1 == x2:
        x, out = x1 + _WIDTH / 3, x1 + _WIDTH / 2 + 2 * _SWING
        return f"M{x:.0f} {start:.0f} C{out:.0f} {start + _SWING:.0f} {out:.0f} {y2 - _SWING:.0f} {x:.0f} {y2:.0f}"
    middle = (start + y2) / 2
    return f"M{x1:.0f} {start:.0f} C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {y2:.0f}"


def _shortened(node: DrawnNode) -> str:
    """The end of a name, which is what tells nodes apart, without the op that stands above it."""
    whole, _, last = node.name.rpartition("/")
    name = whole if whole and last.split("_")[0] == node.op_type else node.name
    name = name.strip("/")
    return name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"
