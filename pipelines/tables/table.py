"""What calibration found out: the range of every tensor, for one model and by one algorithm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from qat2int8.ir import DataError

__all__ = ["CalibrationTable", "Combine", "Difference", "Entry", "algorithm_name", "diff", "merge"]


@dataclass(frozen=True)
class Entry:
    """The range of one tensor.

    Attributes:
        lo, hi: the lowest and highest value that the algorithm wants to be told apart.
        amax: where a grid that is symmetric about zero ends.
        statistics: what the range was computed from, ready for JSON, so that tables of shards can be merged;
            None when it was not kept.
    """

    lo: float
    hi: float
    amax: float
    statistics: Any = None

    def __post_init__(self) -> None:
        """
        Raises:
            DataError: not a range.
        """
        if not all(map(math.isfinite, (self.lo, self.hi, self.amax))):
            raise DataError(f"a range of {self.lo} to {self.hi} (amax {self.amax}) is not finite")
        if self.lo > self.hi or self.amax < 0:
            raise DataError(f"{self.lo} to {self.hi} (amax {self.amax}) is not a range")

    @classmethod
    def symmetric(cls, amax: float) -> Entry:
        """The range of a format that knows ``amax`` only."""
        return cls(-amax, amax, amax)


@dataclass(frozen=True)
class CalibrationTable:
    """Ranges by tensor name.

    Attributes:
        algorithm: by which the ranges were chosen; empty when the format it came in does not say.
        samples: how many were looked at; 0 when that is not known.
        model_digest: :meth:`qat2int8.ir.Model.digest` of the model; empty when that is not known.
        entries: by tensor name, in the order of the graph or of the file.
        origin: what a foreign format says of itself, such as ``TRT-7000-EntropyCalibration2``, so that it can be
            written again as it was.
    """

    algorithm: str
    samples: int
    model_digest: str
    entries: dict[str, Entry] = field(default_factory=dict)
    origin: str = ""


def algorithm_name(text: str) -> str:
    """The algorithm without its options: ``percentile`` of ``percentile{percent=99.9}``."""
    return text.partition("{")[0]


Combine: TypeAlias = Callable[[str, Sequence[Any]], Entry]
"""From an algorithm and the statistics of one tensor in each table to the entry of all together."""

_UNIONS = ("minmax", "direct")
"""The range of the whole is the union of the ranges of its parts: no statistics are needed."""


def merge(
    tables: Sequence[CalibrationTable], *, combine: Combine | None = None, names: Sequence[str] = ()
) -> CalibrationTable:
    """The table of all samples, from tables of disjoint parts of them; the order makes no difference.

    Args:
        names: what the tables are called in errors; their numbers if not given.
        combine: merges statistics; without it only algorithms whose ranges are unions can be merged.

    Raises:
        DataError: no tables, tables of different models, algorithms or tensors, or without statistics.
    """
    if not tables:
        raise DataError("there are no tables to merge")
    first = tables[0]
    names = names or [f"table {number}" for number in range(1, len(tables) + 1)]
    for index, table in enumerate(tables[1:], 1):
        for what, one, other in (
            ("algorithm", first.algorithm, table.algorithm),
            ("model", first.model_digest, table.model_digest),
        ):
            if one != other:
                raise DataError(
                    f"{names[0]} and {names[index]} differ in the {what}: '{one}' and '{other}'",
                    remedy="merge tables of one model and one algorithm",
                )
        odd = sorted(first.entries.keys() ^ table.entries.keys())
        if odd:
            holder, other_name = names[0], names[index]
            if odd[0] in table.entries:
                holder, other_name = other_name, holder
            raise DataError(
                f"tensor '{odd[0]}' is in {holder}, not in {other_name}",
                remedy="merge tables of the same tensors",
            )
    entries = {}
    for name in first.entries:
        parts = [table.entries[name] for table in tables]
        entries[name] = _merged(name, first.algorithm, parts, combine)
    origins = {table.origin for table in tables}
    return CalibrationTable(
        first.algorithm,
        sum(table.samples for table in tables),
        first.model_digest,
        entries,
        origins.pop() if len(origins) == 1 else "",
    )


def _merged(name: str, algorithm: str, parts: Sequence[Entry], combine: Combine | None) -> Entry:
    if len(parts) == 1:
        return parts[0]
    if combine is not None and all(part.statistics is not None for part in parts):
        return combine(algorithm, [part.statistics for part in parts])
    if algorithm_name(algorithm) in _UNIONS and all(part.statistics is None for part in parts):
        return Entry(
            min(part.lo for part in parts), max(part.hi for part in parts), max(part.amax for part in parts)
        )
    raise DataError(
        f"ranges of the algorithm '{algorithm}' cannot be merged without the statistics they were computed from",
        where=f"tensor '{name}'",
        remedy="calibrate again and keep the statistics, or use minmax",
    )


@dataclass(frozen=True)
class Difference:
    """One tensor in two tables; an entry is None where a table lacks the tensor.

    ``relative`` is the largest distance of the ends (``lo``, ``hi``, ``amax``) over their largest magnitude: 0 for
    equal ranges, infinite where one is missing.
    """

    name: str
    left: Entry | None
    right: Entry | None
    relative: float


def diff(left: CalibrationTable, right: CalibrationTable) -> list[Difference]:
    """All tensors of both tables, the worst relative differences first, equal ones in order of name."""
    names: Mapping[str, None] = dict.fromkeys((*left.entries, *right.entries))
    found = [_difference(name, left.entries.get(name), right.entries.get(name)) for name in names]
    return sorted(found, key=lambda one: (-one.relative, one.name))


def _difference(name: str, left: Entry | None, right: Entry | None) -> Difference:
    if left is None or right is None:
        return Difference(name, left, right, math.inf)
    distance = max(abs(left.lo - right.lo), abs(left.hi - right.hi), abs(left.amax - right.amax))
    size = max(left.amax, right.amax, abs(left.lo), abs(left.hi), abs(right.lo), abs(right.hi))
    return Difference(name, left, right, distance / size if size else 0.0)
