"""Ranges go through pools and data movement, both ways, and past nothing that changes numbers."""

from __future__ import annotations

from support import parse

from qat2int8.pipelines.tables import CalibrationTable, Entry
from qat2int8.pipelines.tables.spreading import spread

MODEL = """
g (float[1,2,4,4] x) => (float[1,32] z) {
  a = Relu (x)
  b = MaxPool <kernel_shape = [1, 1]> (a)
  c = Flatten (b)
  d = Neg (c)
  e = Identity (d)
  z = Flatten (e)
}
"""
ONE, TWO = Entry(0, 1, 1), Entry(-2, 2, 2)


def test_ranges_reach_what_has_the_same_numbers() -> None:
    table = CalibrationTable("entropy", 3, "m", {"c": ONE, "e": TWO})
    found = spread(table, parse(MODEL))
    assert found.entries == {"a": ONE, "b": ONE, "c": ONE, "d": TWO, "e": TWO, "z": TWO}
    assert (found.algorithm, found.samples, found.model_digest) == ("entropy", 3, "m")
    assert set(table.entries) == {"c", "e"}


def test_a_range_of_its_own_stays() -> None:
    found = spread(CalibrationTable("", 0, "", {"a": TWO, "c": ONE}), parse(MODEL))
    assert found.entries["a"] == TWO
    assert found.entries["c"] == found.entries["b"] == ONE
