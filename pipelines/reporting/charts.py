"""The charts of a report as positions in percent, so that they take whatever width a page has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from qat2int8.pipelines.reporting.document import Histogram, Layer, LayerError, Speed, decibels

__all__ = ["error_chart", "histogram_chart", "spreads", "strip"]

_BEST_DB = 60.0
"""Where the error axis ends: beyond, an INT8 layer is as good as exact."""
_WORST = 3
_NARROWEST = 0.8


def strip(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """Layers side by side, as wide as their share of multiply-accumulates."""
    total = sum(layer.macs for layer in layers) or 1
    return [{"layer": layer, "width": 100.0 * layer.macs / total} for layer in layers]


def error_chart(errors: Sequence[LayerError]) -> dict[str, Any]:
    """One bar a layer in the order of the graph; the shorter, the worse; the worst are marked."""
    levels = [decibels(error) for error in errors]
    order = sorted((index for index in range(len(errors)) if levels[index] < _BEST_DB), key=levels.__getitem__)
    worst = order[:_WORST]
    bars = [
        {
            "error": error,
            "x": index + 0.06,
            "height": 100.0 * min(max(levels[index], 0.0), _BEST_DB) / _BEST_DB,
            "worst": index in worst,
        }
        for index, error in enumerate(errors)
    ]
    lines = [{"db": db, "top": 100.0 * (1.0 - db / _BEST_DB)} for db in (60, 40, 20, 0)]
    return {"count": len(errors), "bars": bars, "lines": lines, "worst": [errors[index] for index in worst]}


def histogram_chart(histogram: Histogram) -> dict[str, Any]:
    """Bars over the values and the whole of the grid, as high as the logarithm of the counts.

    What lies far out is rare, and is what thresholds are about.
    """
    grid = [end for end in (histogram.grid_lo, histogram.grid_hi) if end is not None]
    left, right = min(histogram.lo, *grid), max(histogram.hi, *grid)
    span = (right - left) or 1.0
    step = (histogram.hi - histogram.lo) / max(len(histogram.counts), 1)
    tallest = math.log1p(max(histogram.counts, default=0)) or 1.0
    bars = []
    for index, count in enumerate(histogram.counts):
        start = histogram.lo + index * step
        middle = start + step / 2
        bars.append(
            {
                "x": 100.0 * (start - left) / span,
                "width": max(100.0 * step / span, _NARROWEST),
                "height": 100.0 * math.log1p(count) / tallest,
                "beyond": bool(grid) and not min(grid) <= middle <= max(grid),
            }
        )
    total = sum(histogram.counts)
    return {
        "histogram": histogram,
        "bars": [bar for bar in bars if bar["height"]],
        "ends": [100.0 * (end - left) / span for end in grid],
        "left": left,
        "right": right,
        "saturated": 100.0 * histogram.saturated / total if total else 0.0,
    }


def spreads(rows: Sequence[Speed]) -> list[dict[str, float] | None]:
    """Quartiles and median of each row on one axis that ends at the slowest of them."""
    slowest = max((row.upper_quartile_ms for row in rows if row.upper_quartile_ms is not None), default=0.0)
    found: list[dict[str, float] | None] = []
    for row in rows:
        parts = row.lower_quartile_ms, row.median_ms, row.upper_quartile_ms
        if not slowest or any(part is None for part in parts):
            found.append(None)
            continue
        low, middle, high = (100.0 * part / slowest for part in parts if part is not None)
        found.append({"low": low, "middle": middle, "width": max(high - low, _NARROWEST)})
    return found
