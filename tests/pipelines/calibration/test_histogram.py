"""The histogram: exact bins, the same counts in every order, merged or not."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat2int8.ir import DataError
from qat2int8.pipelines.calibration.histogram import Histogram

FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)
BATCHES = st.lists(st.lists(FLOATS, min_size=1, max_size=40), min_size=1, max_size=6)


def histogram_of(*batches: object) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        values = np.asarray(batch, np.float32)
        histogram.add(values, float(np.abs(values).max()))
    return histogram


@settings(deadline=None)
@given(BATCHES, st.randoms(use_true_random=False))
def test_neither_order_nor_cuts_of_batches_change_a_count(batches: list[list[float]], random: object) -> None:
    once = histogram_of([value for batch in batches for value in batch])
    shuffled = list(batches)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert histogram_of(*batches) == histogram_of(*shuffled) == once


@settings(deadline=None)
@given(BATCHES, BATCHES)
def test_merged_parts_are_the_whole(left: list[list[float]], right: list[list[float]]) -> None:
    one, other = histogram_of(*left), histogram_of(*right)
    one.merge(other)
    swapped = histogram_of(*right)
    swapped.merge(histogram_of(*left))
    assert one == swapped == histogram_of(*left, *right)
    assert one.total == sum(map(len, (*left, *right)))


@settings(deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=60))
def test_every_value_lies_between_the_edges_of_its_bin(values: list[float]) -> None:
    magnitudes = np.abs(np.asarray(values, np.float32)).astype(np.float64)
    histogram = histogram_of(values)
    edges = histogram.edges()
    expected, _ = np.histogram(magnitudes, edges)
    # numpy closes the last bin on the right; no magnitude reaches that edge.
    np.testing.assert_array_equal(histogram.counts[1:], expected[1:])
    assert histogram.counts[0] == len(values) - expected[1:].sum()


def test_bins_are_a_two_thousandth_of_their_octave() -> None:
    histogram = histogram_of([1.0, 1.0 + 2**-11, 1.0 + 2**-12, 3.0])
    edges = histogram.edges()
    filled = np.flatnonzero(histogram.counts)
    assert edges[filled].tolist() == [1.0, 1.0 + 2**-11, 3.0]
    assert histogram.counts[filled].tolist() == [2, 1, 1]


def test_what_is_a_millionth_of_the_largest_counts_as_zero() -> None:
    histogram = histogram_of([1.5], [0.0, 2.0**-18], [2.0**20 * 0.9])
    assert histogram.counts[0] == 2
    assert histogram.total == 4
    assert histogram.edges()[-1] == 2.0**20


def test_signs_fall_out() -> None:
    assert histogram_of([-1.5, 1.5, -0.0]) == histogram_of([1.5, 1.5, 0.0])


@pytest.mark.parametrize(("top", "bins"), [(4.0, 4096), (4.0, 16), (1.0, 4096), (64.0, 2048)])
def test_equal_bins_are_exact(top: float, bins: int) -> None:
    values = np.random.default_rng(0).normal(0.0, 1.0, 5000).astype(np.float32)
    counts, width, beyond = histogram_of(values).linear(top, bins)
    magnitudes = np.abs(values).astype(np.float64)
    expected, _ = np.histogram(magnitudes, np.arange(bins + 1) * width)
    np.testing.assert_array_equal(counts[1:], expected[1:])
    assert width == top / bins
    assert beyond == np.count_nonzero(magnitudes >= top)
    assert counts.sum() + beyond == 5000


def test_large_arrays_are_counted_in_pieces() -> None:
    values = np.random.default_rng(1).normal(0.0, 1.0, 300_001).astype(np.float32)
    whole = histogram_of(values)
    assert whole.total == 300_001
    assert whole == histogram_of(values[:7], values[7:200_000], values[200_000:])


def test_it_survives_json() -> None:
    histogram = histogram_of([0.0, 1.0, 1.0, 1e30], [2.0])
    assert Histogram.from_dict(json.loads(json.dumps(histogram.as_dict()))) == histogram
    assert Histogram.from_dict(Histogram().as_dict()) == Histogram()


@pytest.mark.parametrize(
    "document",
    [
        None,
        {},
        {"base": 1, "counts": 5},
        {"base": 0, "counts": "!!"},
        {"base": "x", "counts": ""},
        {"base": 0, "counts": "AAAA"},
    ],
)
def test_anything_else_is_refused(document: object) -> None:
    with pytest.raises(DataError, match="not a histogram"):
        Histogram.from_dict(document)
