"""Dynamic ranges as text, a line ``name: amax`` for each tensor, as TensorRT's ``sampleINT8API`` reads them."""

from __future__ import annotations

import math

from qat2int8.ir import DataError
from qat2int8.pipelines.tables.table import CalibrationTable, Entry

__all__ = ["is_dynamic_ranges", "read_dynamic_ranges", "write_dynamic_ranges"]


def is_dynamic_ranges(text: str) -> bool:
    """Whether the first line is one of a tensor and its range."""
    return _split(text.strip().splitlines()[0]) is not None


def read_dynamic_ranges(text: str, *, where: str = "") -> CalibrationTable:
    """Read such a text. The last colon of a line separates.

    Raises:
        DataError: it is none, or cut off; names the line.
    """
    entries: dict[str, Entry] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        place = f"{where}:{number}"
        found = _split(line)
        if found is None:
            raise DataError(
                f"'{line.strip()[:80]}' is not 'name: range'", where=place, remedy="such as conv1: 2.5"
            )
        name, amax = found
        if name in entries:
            raise DataError(f"tensor '{name}' is there twice", where=place)
        if not math.isfinite(amax) or amax < 0:
            raise DataError(f"the range of tensor '{name}' is {amax}", where=place, remedy="a number from 0 on")
        entries[name] = Entry.symmetric(amax)
    if not text.endswith("\n"):
        raise DataError(
            "ends within a line, whose number may be cut off", where=where, remedy="if it is whole, add a line end"
        )
    return CalibrationTable("", 0, "", entries)


def write_dynamic_ranges(table: CalibrationTable) -> str:
    """The table as such a text.

    Raises:
        DataError: a name that no line can hold.
    """
    for name in table.entries:
        if name.splitlines() != [name] or name != name.strip():
            raise DataError(f"the name {name!r} does not fit into a line of its own", where=f"tensor {name!r}")
    return "".join(f"{name}: {entry.amax!r}\n" for name, entry in table.entries.items())


def _split(line: str) -> tuple[str, float] | None:
    name, separator, number = line.strip().rpartition(":")
    try:
        return (name.rstrip(), float(number)) if separator and name.strip() else None
    except ValueError:
        return None
