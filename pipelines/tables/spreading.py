"""Ranges that follow from those of a table: tensors with the same numbers have the same range."""

from __future__ import annotations

from dataclasses import replace

from qat2int8.ir import Model
from qat2int8.passes.scale_groups import is_movement, moved
from qat2int8.pipelines.tables.table import CalibrationTable

__all__ = ["spread"]


def spread(table: CalibrationTable, model: Model) -> CalibrationTable:
    """The table with a range also for what pools and data movement read and write.

    Training puts its quantizers in front of layers, behind pools and reshapes; calibration asks for what is in
    front of those. A tensor in the table keeps its own range.
    """
    entries = dict(table.entries)
    pairs = [
        (node.inputs[0].name or "", output.name or "")
        for node in model.graph
        if is_movement(model, node) and node.inputs[0] is not None
        for output in moved(node)
    ]
    for source, output in reversed(pairs):
        if source and output in entries:
            entries.setdefault(source, entries[output])
    for source, output in pairs:
        if output and source in entries:
            entries.setdefault(output, entries[source])
    return replace(table, entries=entries)
