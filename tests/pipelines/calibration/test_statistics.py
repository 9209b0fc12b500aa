"""Statistics of several tensors: by sample, merged, and refusing what is not finite."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest

from qat2int8.ir import DataError
from qat2int8.pipelines.calibration.statistics import Statistics

Arrays = dict[str, npt.NDArray[np.float32]]


def batch(first: int, count: int) -> Arrays:
    rng = np.random.default_rng(first)
    return {
        "x": rng.normal(size=(count, 3, 5)).astype(np.float32),
        "y": rng.uniform(size=(count, 7)).astype(np.float32) * (first + 1),
        "shared": np.asarray([float(first), 2.0, -1.0], np.float32),
    }


def seen(*firsts: int, histograms: bool = True) -> Statistics:
    statistics = Statistics.of(["x", "y", "shared"], histograms=histograms)
    for first in firsts:
        statistics.add(first, 2, batch(first, 2))
    return statistics


def assert_equal(one: Statistics, other: Statistics) -> None:
    one.sort()
    other.sort()
    np.testing.assert_array_equal(one.indices, other.indices)
    for name, tensor in one.tensors.items():
        twin = other.tensors[name]
        np.testing.assert_array_equal(tensor.minima, twin.minima)
        np.testing.assert_array_equal(tensor.maxima, twin.maxima)
        assert tensor.histogram == twin.histogram


def test_the_ends_of_each_sample() -> None:
    statistics = seen(0, 2)
    arrays = batch(2, 2)
    assert statistics.tensors["x"].minima[2:].tolist() == arrays["x"].reshape(2, -1).min(1).tolist()
    assert statistics.tensors["y"].maxima[2:].tolist() == arrays["y"].max(1).tolist()
    # Without a batch axis the ends of the batch stand for each of its samples.
    assert statistics.tensors["shared"].maxima.tolist() == [2.0, 2.0, 2.0, 2.0]
    assert statistics.tensors["shared"].lo == -1.0
    assert len(statistics) == 4


def test_shards_merge_to_what_one_run_gives() -> None:
    whole = seen(0, 2, 4, 6)
    for parts in ([(0, 2), (4, 6)], [(6, 0), (4,), (2,)]):
        shards = [seen(*firsts) for firsts in parts]
        merged = shards.pop()
        for shard in shards:
            merged.merge(shard)
        assert_equal(merged, whole)


def test_workers_change_nothing() -> None:
    with ThreadPoolExecutor(3) as pool:
        statistics = Statistics.of(["x", "y", "shared"], histograms=True)
        for first in (0, 2):
            statistics.add(first, 2, batch(first, 2), pool.map)
    assert_equal(statistics, seen(0, 2))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_with_its_place_and_nothing_is_kept(value: float) -> None:
    statistics = seen(0)
    arrays = batch(2, 2)
    arrays["x"][1, 2, 3] = value
    arrays["y"][1, 0] = value
    with pytest.raises(DataError, match="sample 3, tensor 'x': the tensor holds a NaN or an infinity"):
        statistics.add(2, 2, arrays)
    assert_equal(statistics, seen(0))


def test_infinities_of_both_signs_are_found() -> None:
    statistics = Statistics.of(["x"], histograms=False)
    with pytest.raises(DataError, match="sample 5"):
        statistics.add(5, 1, {"x": np.asarray([[np.inf, -np.inf]], np.float32)})


def test_a_sample_counts_once() -> None:
    statistics = seen(0, 2)
    with pytest.raises(DataError, match="sample 2 was seen already"):
        statistics.add(2, 2, batch(2, 2))
    with pytest.raises(DataError, match="sample 2 was seen already"):
        statistics.merge(seen(2, 4))


def test_parts_must_fit_together() -> None:
    with pytest.raises(DataError, match="only one part counted the values of tensor 'x'"):
        seen(0).merge(seen(2, histograms=False))
    other = Statistics.of(["x"], histograms=True)
    with pytest.raises(DataError, match="only one part watched tensor 'shared'"):
        seen(0).merge(other)


def test_a_missing_tensor_is_named() -> None:
    arrays = batch(0, 2)
    del arrays["y"]
    with pytest.raises(DataError, match="tensor 'y': is missing"):
        seen().add(0, 2, arrays)


def test_empty_tensors_say_nothing() -> None:
    statistics = Statistics.of(["x"], histograms=True)
    statistics.add(0, 2, {"x": np.empty((2, 0), np.float32)})
    assert statistics.tensors["x"].lo > statistics.tensors["x"].hi
    statistics.add(2, 2, {"x": np.ones((2, 1), np.float16)})
    tensor = statistics.tensors["x"]
    assert (tensor.lo, tensor.hi, tensor.amax) == (1.0, 1.0, 1.0)
