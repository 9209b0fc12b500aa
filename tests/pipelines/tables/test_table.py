"""Merging tables of shards, and telling two tables apart."""

from __future__ import annotations

import math

import pytest

from qat2int8.ir import DataError
from qat2int8.pipelines.tables import CalibrationTable, Entry, diff, merge


def table(algorithm: str = "minmax", samples: int = 10, model: str = "m", **entries: Entry) -> CalibrationTable:
    return CalibrationTable(algorithm, samples, model, entries)


def test_ranges_of_shards_are_united() -> None:
    one, other = table(a=Entry(-1, 2, 2)), table(samples=5, a=Entry(-4, 1, 4))
    merged = merge([one, other])
    assert merged == merge([other, one])
    assert (merged.samples, merged.entries) == (15, {"a": Entry(-4, 2, 4)})


def test_statistics_are_combined() -> None:
    parts = [table("entropy", a=Entry(-1, 1, 1, count)) for count in (2, 3)]
    merged = merge(parts, combine=lambda algorithm, counts: Entry(0, 1, 1, (algorithm, sum(counts))))
    assert merged.entries["a"].statistics == ("entropy", 5)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (table("entropy", a=Entry(0, 1, 1)), "differ in the algorithm: 'minmax' and 'entropy'"),
        (table(model="n", a=Entry(0, 1, 1)), "differ in the model: 'm' and 'n'"),
        (table(b=Entry(0, 1, 1)), "tensor 'a' is in table 1, not in table 2"),
        (table(a=Entry(0, 1, 1), b=Entry(0, 1, 1)), "tensor 'b' is in table 2, not in table 1"),
    ],
)
def test_what_cannot_be_merged(other: CalibrationTable, says: str) -> None:
    with pytest.raises(DataError, match=says):
        merge([table(a=Entry(0, 1, 1)), other])


def test_ranges_that_are_no_unions_need_their_statistics() -> None:
    with pytest.raises(DataError, match=r"tensor 'a': ranges of the algorithm 'entropy' cannot be merged"):
        merge([table("entropy", a=Entry(0, 1, 1))] * 2)
    with pytest.raises(DataError, match="no tables"):
        merge([])


def test_the_worst_difference_comes_first() -> None:
    left = table(a=Entry(0, 2, 2), b=Entry(-1, 1, 1), c=Entry(0, 1, 1), z=Entry(0, 0, 0))
    right = table(a=Entry(0, 2, 2), b=Entry(-4, 1, 4), d=Entry(0, 1, 1), z=Entry(0, 0, 0))
    found = {one.name: one.relative for one in diff(left, right)}
    assert list(found.items()) == [("c", math.inf), ("d", math.inf), ("b", 0.75), ("a", 0.0), ("z", 0.0)]


@pytest.mark.parametrize("ends", [(1, 0, 1), (0, 1, -1), (0, math.inf, 1), (math.nan, 1, 1)])
def test_what_is_no_range(ends: tuple[float, float, float]) -> None:
    with pytest.raises(DataError):
        Entry(*ends)
