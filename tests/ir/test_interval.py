import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat2int8.ir import UNBOUNDED, Interval

numbers = st.floats(-1e6, 1e6)
intervals = st.tuples(numbers, numbers).map(lambda ends: Interval(min(ends), max(ends)))
fractions = st.floats(0, 1)


def pick(interval: Interval, fraction: float) -> float:
    """A member of the interval."""
    return min(max(interval.lo + fraction * (interval.hi - interval.lo), interval.lo), interval.hi)


@given(intervals, intervals, fractions, fractions)
def test_arithmetic_holds_every_result(a: Interval, b: Interval, u: float, v: float) -> None:
    x, y = pick(a, u), pick(b, v)
    for interval, value in ((a + b, x + y), (a - b, x - y), (a * b, x * y)):
        assert interval.lo <= value <= interval.hi


@given(intervals, intervals)
def test_arithmetic_is_tight(a: Interval, b: Interval) -> None:
    ends = [x * y for x in (a.lo, a.hi) for y in (b.lo, b.hi)]
    assert (a * b) == Interval(min(ends), max(ends))
    assert (a + b) == Interval(a.lo + b.lo, a.hi + b.hi)
    assert (a - b) == Interval(a.lo - b.hi, a.hi - b.lo)


@given(intervals, intervals)
def test_union_and_intersection(a: Interval, b: Interval) -> None:
    assert (a | b).contains(a)
    assert (a | b).contains(b)
    assert a.contains(a & b)
    if max(a.lo, b.lo) <= min(a.hi, b.hi):
        assert b.contains(a & b)


def test_disjoint_intervals_meet_at_the_nearest_end() -> None:
    assert Interval(0, 1) & Interval(2, 3) == Interval(1, 1)
    assert Interval(2, 3) & Interval(0, 1) == Interval(2, 2)


def test_zero_times_unbounded_is_zero() -> None:
    assert Interval(0, 0) * UNBOUNDED == Interval(0, 0)
    assert Interval(0, 1) * Interval(0, math.inf) == Interval(0, math.inf)


@pytest.mark.parametrize(
    ("interval", "clipped"),
    [
        (Interval(-1, 9), Interval(0, 6)),
        (Interval(2, 3), Interval(2, 3)),
        (Interval(7, 9), Interval(6, 6)),
        (Interval(-9, -7), Interval(0, 0)),
        (UNBOUNDED, Interval(0, 6)),
    ],
)
def test_clip_is_the_image_of_clamping(interval: Interval, clipped: Interval) -> None:
    assert interval.clip(0, 6) == clipped


def test_properties() -> None:
    assert Interval(-3, 2).amax == 3
    assert Interval(-3, 4).amax == 4
    assert Interval(0, 1).nonnegative
    assert not Interval(-1e-9, 1).nonnegative
    assert Interval(0, 1).bounded
    assert not Interval(0, math.inf).bounded
    assert not UNBOUNDED.bounded
    assert not Interval(0, 1).contains(Interval(0, 1.5))
    assert str(Interval(-1, 2.5)) == "[-1, 2.5]"
