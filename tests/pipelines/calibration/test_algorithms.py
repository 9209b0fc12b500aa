"""Which threshold each algorithm chooses: golden values, plain re-derivations, and the laws all obey."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat2int8.ir import DataError, PipelineError
from qat2int8.pipelines.calibration.algorithms import ALGORITHMS, DEFAULT_ALGORITHM, parse_algorithm
from qat2int8.pipelines.calibration.statistics import Statistics, TensorStatistics
from qat2int8.pipelines.calibration.thresholds import divergence_threshold, quantile, regression_threshold

Floats = npt.NDArray[np.float32]


def seen(*batches: npt.ArrayLike) -> TensorStatistics:
    """A tensor's statistics, each of ``batches`` one sample."""
    statistics = Statistics.of(["x"], histograms=True)
    for index, batch in enumerate(batches):
        statistics.add(index, 1, {"x": np.asarray(batch, np.float32).reshape(1, -1)})
    return statistics.tensors["x"]


def threshold(algorithm: str, *batches: npt.ArrayLike) -> float:
    return parse_algorithm(algorithm).span(seen(*batches))[1]


def normal(count: int = 200_000, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=count).astype(np.float32)


def with_outlier() -> list[Floats]:
    values = normal()
    values[1234] = 40.0
    return list(np.split(values, 10))


@pytest.mark.parametrize("algorithm", ["entropy", "percentile", "mse", "hist", "legacy"])
def test_an_outlier_is_clipped_and_the_order_of_batches_makes_no_difference(algorithm: str) -> None:
    batches = with_outlier()
    found = {
        threshold(algorithm, *(batches[i] for i in order))
        for order in (range(10), reversed(range(10)), (5, 0, 9, 1, 8, 2, 7, 3, 6, 4))
    }
    assert len(found) == 1
    (chosen,) = found
    assert 3.5 < chosen < 6.0


GOLDEN = {
    "entropy": [4.7320, 4.7320, 10.5332],
    "entropy-v1": [4.4160, 4.1660, 9.8789],
    "legacy": [3.9023, 3.7666, 9.0156],
    "percentile": [4.4941, 4.1621, 10.8125],
    "mse": [3.9324, 4.0646, 9.6299],
    "hist": [4.4941, 4.1621, 10.8086],
    "minmax": [4.7320, 4.7320, 12.0435],
    "direct": [4.7320, 4.7320, 12.0435],
    "avg": [4.7320, 4.7320, 12.0435],
    "moving-average": [4.7320, 4.7320, 12.0435],
}
"""Of 200,000 values: of a standard normal distribution, the same behind a Relu, of a Laplace distribution."""


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_golden_thresholds(algorithm: str) -> None:
    values = normal()
    laplace = np.random.default_rng(7).laplace(size=200_000)
    found = [threshold(algorithm, array) for array in (values, np.maximum(values, 0.0), laplace)]
    assert found == pytest.approx(GOLDEN[algorithm], abs=1e-3)


def test_all_are_told_of() -> None:
    assert set(GOLDEN) == set(ALGORITHMS)
    assert next(iter(ALGORITHMS)) == DEFAULT_ALGORITHM
    assert all(kind.source and kind.__doc__ for kind in ALGORITHMS.values())


PADDLE = [
    *(0.0158671, 0.026459, 0.0280772, 0.00962479, 0.0131628),
    *(0.016704, 0.00118407, 0.00765726, 0.0123213, 0.00944741),
]
PADDLE_SIGNED = [
    *(-0.0482659, -0.0102493, -0.00794221, -0.00387115, -0.00674586),
    *(-0.0495346, 0.0629528, -0.00531285, -0.0230353, 0.0269089),
]


def test_the_values_of_paddles_own_test() -> None:
    # Its KL gives 0.0899106 for the second, beyond the largest magnitude: measured from the left end. Ten values
    # are no distribution, and are kept whole here.
    assert threshold("direct", PADDLE) == pytest.approx(0.0280772)
    assert threshold("entropy", PADDLE) == pytest.approx(0.0280772)
    assert threshold("entropy", PADDLE_SIGNED) == pytest.approx(0.0629528)
    assert threshold("avg", PADDLE_SIGNED[:5], PADDLE_SIGNED[5:]) == pytest.approx((0.0482659 + 0.0629528) / 2)
    assert parse_algorithm("minmax").span(seen(PADDLE_SIGNED))[0].lo == pytest.approx(-0.0495346)


def divergence_by_hand(counts: npt.NDArray[np.int64], levels: int, lowest: float, *, even: bool) -> int:
    """The candidate with the smallest KL divergence, written down as the paper has it."""
    best, chosen = math.inf, 0
    filled = counts.astype(float)
    filled[0] = filled[1]
    for cut in range(max(levels, math.ceil(lowest)), int(np.flatnonzero(filled)[-1]) + 2):
        p, q = filled[:cut].copy(), np.zeros(cut)
        rest = filled[cut:].sum()
        if not p[-1] and rest:
            continue
        p[-1] += rest
        for level in range(levels):
            start, stop = level * cut // levels, (level + 1) * cut // levels
            if not even:
                start, stop = level * (cut // levels), (level + 1) * (cut // levels)
                stop = cut if level == levels - 1 else stop
            group = filled[start:stop]
            if group.any():
                q[start:stop] = np.where(group > 0, group.sum() / np.count_nonzero(group), 0.0)
        mask = p > 0
        p, q = p[mask] / p.sum(), q[mask] / q.sum()
        divergence = float((p * np.log(p / q)).sum())
        if divergence < best - 1e-12:
            best, chosen = divergence, cut
    return chosen


@pytest.mark.parametrize("kind", ["normal", "laplace", "relu"])
def test_entropy_is_the_divergence_of_the_paper(kind: str) -> None:
    rng = np.random.default_rng(3)
    values = rng.laplace(size=30_000) if kind == "laplace" else rng.normal(size=30_000)
    values = np.maximum(values, 0.0) if kind == "relu" else values
    tensor = seen(values)
    assert tensor.histogram is not None
    histogram, amax, levels = tensor.histogram, tensor.amax, 64 if kind == "relu" else 32
    counts, width, _ = histogram.linear(2.0 ** math.ceil(math.log2(amax)), 512)
    most = quantile(histogram, 0.999, zeros=False)
    for even in (True, False):
        by_hand = min((divergence_by_hand(counts, levels, most / width, even=even) + 0.5) * width, amax)
        assert divergence_threshold(histogram, amax, levels=levels, bins=512, even=even) == pytest.approx(by_hand)


def test_entropy_focuses_on_where_values_are() -> None:
    values = normal()
    values[0] = 1e4
    assert 3.5 < threshold("entropy", values) < 6.0
    # What is spread over the whole range is kept.
    assert threshold("entropy", np.random.default_rng(0).uniform(-1.0, 1.0, 50_000)) > 0.99


def test_entropy_does_not_collapse_where_values_crowd_on_a_few_spots() -> None:
    rng = np.random.default_rng(0)
    spots = np.repeat(rng.uniform(0.01, 0.5, 20), 20_000)
    values = np.concatenate([spots, np.abs(rng.normal(size=40_000)), np.zeros(200_000)])
    for algorithm in ("entropy", "entropy-v1"):
        assert threshold(algorithm, values) > np.quantile(values[values > 0], 0.99)


def test_percentile_is_the_sorted_value() -> None:
    values = normal(100_000)
    ordered = np.sort(np.abs(values))
    for percent in (50.0, 90.0, 99.9):
        expected = ordered[int(percent / 100.0 * 100_000) - 1]
        assert threshold(f"percentile{{percent={percent}}}", values) == pytest.approx(expected, rel=1e-3)


def test_quantiles_can_leave_zeros_out() -> None:
    histogram = seen(np.concatenate([np.zeros(900), np.ones(100)])).histogram
    assert histogram is not None
    assert quantile(histogram, 0.5) < 1e-5
    assert quantile(histogram, 0.5, zeros=False) == pytest.approx(1.0, rel=1e-3)


def test_mse_is_the_smallest_error_of_rounding_and_clipping() -> None:
    values = np.random.default_rng(5).laplace(size=60_000).astype(np.float32)
    chosen = threshold("mse", values)

    def error(limit: float) -> float:
        step = limit / 127
        return float(np.square(np.clip(np.rint(values / step), -127, 127) * step - values).mean())

    candidates = float(np.abs(values).max()) * np.linspace(0.1, 1.0, 200)
    assert error(chosen) == pytest.approx(min(map(error, candidates)), rel=0.01)


def test_averages_weigh_samples() -> None:
    samples = [[-1.0, 2.0], [-4.0, 1.0], [-2.0, 8.0]]
    assert threshold("avg", *samples) == pytest.approx((2.0 + 4.0 + 8.0) / 3)
    span, amax = parse_algorithm("moving-average{rate=0.5}").span(seen(*samples))
    assert span.lo == pytest.approx(-(1.0 * 0.25 + 4.0 * 0.5 + 2.0) / 1.75)
    assert span.hi == amax == pytest.approx((2.0 * 0.25 + 1.0 * 0.5 + 8.0) / 1.75)


def test_moving_averages_follow_the_order_of_the_data_not_of_arrival() -> None:
    arrays = [np.asarray([[float(i), -1.0]], np.float32) for i in range(4)]
    found = set()
    for order in itertools.permutations(range(4)):
        statistics = Statistics.of(["x"], histograms=False)
        for index in order:
            statistics.add(index, 1, {"x": arrays[index]})
        statistics.sort()
        found.add(parse_algorithm("moving-average").span(statistics.tensors["x"]))
    assert len(found) == 1


def test_a_tail_is_followed_to_its_end() -> None:
    # Counts that halve from one bin of 1/32 to the next run out where the last one stands.
    values = np.concatenate([np.full(2 ** (16 - k), 1.0 + k / 32.0 + 1 / 64) for k in range(16)])
    values = np.append(values, 63.0)
    histogram = seen(values).histogram
    assert histogram is not None
    assert regression_threshold(histogram, 63.0, 0.9) == 63.0
    assert threshold("legacy{quantile=1.0 cutoff=0.01}", values) < 10.0
    assert threshold("legacy{quantile=1.0}", values) == pytest.approx(63.0)
    falling = values[:-1]
    short = seen(falling).histogram
    assert short is not None
    assert regression_threshold(short, float(falling.max()), 0.5) == pytest.approx(float(falling.max()), rel=0.02)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(deadline=None)
@given(values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50))
def test_ranges_lie_within_what_was_seen(algorithm: str, values: list[float]) -> None:
    span, amax = parse_algorithm(algorithm).span(seen(values))
    array = np.asarray(values, np.float32)
    assert 0.0 <= amax <= float(np.abs(array).max())
    assert span.lo <= span.hi
    assert -amax <= span.lo
    assert span.hi <= amax


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_constant_tensors_keep_their_value(algorithm: str, value: float) -> None:
    span, amax = parse_algorithm(algorithm).span(seen(np.full(10_000, value)))
    assert amax == pytest.approx(abs(value), rel=1e-3)
    assert span.hi == pytest.approx(value, rel=1e-3) or span.lo == pytest.approx(value, rel=1e-3)


def test_tensors_that_are_never_negative_stay_so() -> None:
    values = np.abs(normal(20_000))
    for algorithm in ALGORITHMS:
        assert parse_algorithm(algorithm).span(seen(values))[0].lo >= 0.0


def test_texts_are_read_and_written() -> None:
    for text in ("entropy", "percentile{percent=99.9}", "legacy{quantile=0.999 cutoff=0.5}"):
        assert str(parse_algorithm(text)) == text
    assert str(parse_algorithm("percentile{percent=99.999}")) == "percentile"
    assert parse_algorithm(parse_algorithm("mse")) == parse_algorithm("mse")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("entropyy", "did you mean 'entropy'"),
        ("KL", "did you mean 'entropy'"),
        ("nothing like it", "expected"),
        ("zzz", "one of entropy"),
        ("percentile{percentage=5}", "it has percent"),
        ("percentile{percent=high}", "expects a number"),
        ("percentile{percent=0}", "a share above 0 and up to 100"),
        ("legacy{cutoff=2.0}", "a share above 0 and up to 1"),
        ("entropy,mse", "not the name of one algorithm"),
    ],
)
def test_others_are_refused(text: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        parse_algorithm(text)


def test_nothing_seen_and_nothing_counted_are_errors() -> None:
    statistics = Statistics.of(["x"], histograms=False)
    with pytest.raises(DataError, match="no value was seen"):
        parse_algorithm("minmax").span(statistics.tensors["x"])
    statistics.add(0, 1, {"x": np.ones((1, 2), np.float32)})
    with pytest.raises(DataError, match="were not counted"):
        parse_algorithm("mse").span(statistics.tensors["x"])
