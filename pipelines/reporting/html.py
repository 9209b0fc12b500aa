"""A report as one HTML file: no network, no script, light and dark, on paper and on a phone."""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jinja2

from qat2int8.pipelines.figures import as_bytes, as_decimal
from qat2int8.pipelines.reporting.document import (
    Drawing,
    Histogram,
    Layer,
    LayerError,
    ReportDocument,
    Speed,
    worst_first,
)

__all__ = ["as_html"]

_BOX_WIDTH, _BOX_HEIGHT, _COLUMN, _ROW, _MARGIN = 132, 24, 152, 44, 12
_SWING = 20
_CHART_WIDTH, _CHART_HEIGHT = 720, 150
_SMALL_WIDTH, _SMALL_HEIGHT = 220, 90
_BEST_DB = 60.0
"""Where the error axis ends: beyond, an INT8 layer is as good as exact."""


def as_html(document: ReportDocument) -> str:
    """The report as the text of an HTML file that needs nothing else."""
    folder = importlib.resources.files("qat2int8.pipelines.reporting")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    signed = partial(as_decimal, signed=True)
    environment.filters.update(number=as_decimal, signed=signed, count=_count, bytes=as_bytes)
    template = environment.from_string((folder / "report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        document=document,
        style=(folder / "report.css").read_text(encoding="utf-8"),
        strip=_strip(document.layers),
        errors=_error_chart(document.layer_errors),
        worst_first=worst_first(document.layer_errors),
        histograms=[_histogram(each) for each in document.histograms],
        spreads=_spreads(document.speed),
        drawings=[_drawing(each) for each in document.drawings],
    )


def _count(number: float) -> str:
    for unit in ("", " k", " M", " G"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} T"


def _strip(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """Layers side by side, as wide as their share of multiply-accumulates, in percent of the whole."""
    total = sum(layer.macs for layer in layers) or 1
    parts, left = [], 0.0
    for layer in layers:
        width = 100.0 * layer.macs / total
        parts.append({"layer": layer, "left": left, "width": width})
        left += width
    return parts


def _error_chart(errors: Sequence[LayerError]) -> dict[str, Any]:
    """One bar a layer in the order of the graph; the shorter, the worse. The three worst are marked."""
    step = _CHART_WIDTH / max(len(errors), 1)
    finite = [_BEST_DB if error.sqnr_db is None else min(max(error.sqnr_db, 0.0), _BEST_DB) for error in errors]
    worst = set(sorted(range(len(errors)), key=lambda index: finite[index])[:3])
    bars = [
        {
            "error": error,
            "x": index * step,
            "width": max(step - 1.0, 0.6),
            "height": _CHART_HEIGHT * finite[index] / _BEST_DB,
            "worst": index in worst and finite[index] < _BEST_DB,
        }
        for index, error in enumerate(errors)
    ]
    lines = [{"db": db, "y": _CHART_HEIGHT * (1.0 - db / _BEST_DB)} for db in (20, 40, 60)]
    return {"width": _CHART_WIDTH, "height": _CHART_HEIGHT, "bars": bars, "lines": lines}


def _histogram(histogram: Histogram) -> dict[str, Any]:
    """Heights on a logarithmic scale: what lies far out is rare, and is what thresholds are about."""
    tallest = math.log1p(max(histogram.counts, default=0)) or 1.0
    step = _SMALL_WIDTH / max(len(histogram.counts), 1)
    bars = [
        {"x": index * step, "width": step, "height": _SMALL_HEIGHT * math.log1p(count) / tallest}
        for index, count in enumerate(histogram.counts)
    ]
    span = (histogram.hi - histogram.lo) or 1.0
    ends = [
        {"value": end, "x": _SMALL_WIDTH * (end - histogram.lo) / span}
        for end in (histogram.grid_lo, histogram.grid_hi)
        if end is not None and histogram.lo <= end <= histogram.hi
    ]
    return {"histogram": histogram, "width": _SMALL_WIDTH, "height": _SMALL_HEIGHT, "bars": bars, "ends": ends}


def _spreads(rows: Sequence[Speed]) -> list[dict[str, float] | None]:
    """Quartiles and median of each row in percent of the slowest one, for the bars in the table."""
    slowest = max((row.p99_ms for row in rows if row.p99_ms is not None), default=0.0)
    spreads: list[dict[str, float] | None] = []
    for row in rows:
        parts = row.lower_quartile_ms, row.median_ms, row.upper_quartile_ms
        if not slowest or any(part is None for part in parts):
            spreads.append(None)
            continue
        low, middle, high = (100.0 * part / slowest for part in parts if part is not None)
        spreads.append({"low": low, "middle": middle, "width": max(high - low, 0.8)})
    return spreads


def _drawing(drawing: Drawing) -> dict[str, Any]:
    """Places in pixels; an edge that skips rows swings out to the right, past the boxes of its column."""
    centre = [
        (_MARGIN + node.column * _COLUMN + _BOX_WIDTH / 2, _MARGIN + node.row * _ROW + _BOX_HEIGHT / 2)
        for node in drawing.nodes
    ]
    boxes = [
        {"node": node, "x": x - _BOX_WIDTH / 2, "y": y - _BOX_HEIGHT / 2}
        for node, (x, y) in zip(drawing.nodes, centre, strict=True)
    ]
    paths = []
    for edge in drawing.edges:
        (x1, y1), (x2, y2) = centre[edge.source], centre[edge.target]
        start, end = y1 + _BOX_HEIGHT / 2, y2 - _BOX_HEIGHT / 2
        rows = drawing.nodes[edge.target].row - drawing.nodes[edge.source].row
        if rows > 1 and x1 == x2:
            x, out = x1 + _BOX_WIDTH / 4, x1 + _BOX_WIDTH / 2 + _SWING
            bend = f"{out:.0f} {start + _SWING:.0f} {out:.0f} {end - _SWING:.0f}"
            path = f"M{x:.0f} {start:.0f} C{bend} {x:.0f} {end:.0f}"
        else:
            middle = (start + end) / 2
            path = f"M{x1:.0f} {start:.0f} C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {end:.0f}"
        paths.append({"d": path, "integer": edge.integer})
    width = max((x for x, _ in centre), default=0.0) + _BOX_WIDTH / 2 + 2 * _MARGIN + 8
    height = max((y for _, y in centre), default=0.0) + _BOX_HEIGHT / 2 + _MARGIN
    size = {"width": width, "height": height, "box": (_BOX_WIDTH, _BOX_HEIGHT)}
    return {"drawing": drawing, "boxes": boxes, "paths": paths, **size}
