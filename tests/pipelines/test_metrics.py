"""Metrics: against plain definitions, batch by batch or at once, and on labels that are wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qat2int8.ir import DataError
from qat2int8.pipelines.evaluation.metrics import METRICS, Metric, metric_factory

RNG = np.random.default_rng(3)


def score(name: str, *batches: tuple[np.ndarray, np.ndarray | None]) -> dict[str, float]:
    metric = metric_factory(name)()
    first = 0
    for output, labels in batches:
        metric.update([output], labels, first)
        first += len(output)
    return metric.result()


def logits(samples: int, classes: int) -> np.ndarray:
    return RNG.normal(size=(samples, classes)).astype(np.float32)


def test_top1_and_top5_are_shares_of_samples() -> None:
    output, labels = logits(200, 10), RNG.integers(0, 10, 200)
    order = np.argsort(-output, axis=1)
    expected = {
        "top-1": 100.0 * float(np.mean(order[:, 0] == labels)),
        "top-5": 100.0 * float(np.mean((order[:, :5] == labels[:, None]).any(1))),
    }
    assert score("topk", (output, labels)) == expected
    assert score("topk", (output[:7], labels[:7]), (output[7:], labels[7:])) == expected


def test_batches_of_different_sizes_weigh_by_their_samples() -> None:
    right, wrong = np.eye(10, dtype=np.float32)[[1] * 9], np.eye(10, dtype=np.float32)[[2]]
    assert score("topk", (right, np.full(9, 1)), (wrong, np.array([1])))["top-1"] == 90.0


def test_of_equal_scores_the_first_counts_and_nan_never_does() -> None:
    tied = np.zeros((2, 3), np.float32)
    assert score("topk", (tied, np.array([0, 1])))["top-1"] == 50.0
    broken = np.full((2, 3), np.nan, np.float32)
    assert score("topk", (broken, np.array([0, 1]))) == {"top-1": 0.0, "top-5": 0.0}


def test_classes_may_stand_behind_dimensions_of_one_and_labels_in_a_column() -> None:
    output, labels = logits(20, 10), RNG.integers(0, 10, 20)
    plain = score("topk", (output, labels))
    assert score("topk", (output[:, :, None, None], labels[:, None])) == plain


@pytest.mark.parametrize("bad", [10, -1, 2.5])
def test_a_label_out_of_range_is_named_with_its_sample(bad: float) -> None:
    labels = np.array([1, 2, bad, 3])
    metric = metric_factory("topk")()
    metric.update([logits(4, 10)], np.zeros(4, np.int64), 0)
    with pytest.raises(DataError, match=r"sample 6: label .* is none of the model's 10 classes"):
        metric.update([logits(4, 10)], labels, 4)


@pytest.mark.parametrize("name", METRICS)
def test_missing_labels_are_an_error(name: str) -> None:
    with pytest.raises(DataError, match="no labels"):
        score(name, (logits(2, 3), None))


def test_fewer_labels_than_samples_are_an_error() -> None:
    with pytest.raises(DataError, match="2 labels for 3 samples"):
        score("topk", (logits(3, 4), np.array([0, 1])))


def test_mean_iou_averages_the_classes_that_occur() -> None:
    predicted = np.array([[[0, 0], [1, 1]]])
    truth = np.array([[[0, 1], [1, 255]]])
    # Class 0: 1 of 2, class 1: 1 of 2; the pixel labelled 255 does not count.
    assert score("mean-iou", (predicted, truth)) == {"mean-iou": 50.0}
    scores = np.moveaxis(np.eye(3, dtype=np.float32)[predicted], -1, 1)
    assert score("mean-iou", (scores, truth)) == {"mean-iou": 50.0}


def test_mean_iou_is_that_of_all_pixels_not_of_batches() -> None:
    predicted, truth = RNG.integers(0, 4, (6, 5, 5)), RNG.integers(0, 4, (6, 5, 5))
    at_once = score("mean-iou", (predicted, truth))
    split = score("mean-iou", (predicted[:1], truth[:1]), (predicted[1:], truth[1:]))
    by_hand = [((predicted == c) & (truth == c)).sum() / ((predicted == c) | (truth == c)).sum() for c in range(4)]
    assert at_once == split
    assert at_once["mean-iou"] == pytest.approx(100.0 * np.mean(by_hand))


def test_psnr_by_its_definition() -> None:
    truth = np.zeros((2, 1, 4, 4), np.float32)
    output = truth + np.float32(0.1)
    assert score("psnr", (output, truth))["psnr"] == pytest.approx(20.0, abs=1e-4)
    assert score("psnr", (truth, truth))["psnr"] == 100.0
    pixels = np.zeros((1, 1, 4, 4), np.uint8)
    assert score("psnr", (pixels + 255.0, pixels))["psnr"] == 0.0


def test_spearman_ranks_ties_by_their_mean() -> None:
    # By hand: ranks 0.5 0.5 2 3 against 0 1 2 3.
    value = score("spearman", (np.array([[1.0], [1.0], [2.0], [9.0]]), np.array([1, 2, 3, 4])))["spearman"]
    assert value == pytest.approx(0.9486832980505138)
    assert score("spearman", (np.array([[1.0], [2.0]]), np.array([5, 4])))["spearman"] == pytest.approx(-1.0)
    assert math.isnan(score("spearman", (np.ones((3, 1)), np.arange(3)))["spearman"])


def test_f1_of_two_classes_is_that_of_class_one() -> None:
    found = np.eye(2, dtype=np.float32)[[1, 1, 0, 0, 1]]
    # Two hits, three predicted, three true.
    assert score("f1", (found, np.array([1, 0, 1, 0, 1])))["f1"] == pytest.approx(200.0 / 3.0)


def test_f1_of_more_classes_is_averaged_over_those_that_occur() -> None:
    found = np.eye(4, dtype=np.float32)[[0, 1, 1]]
    assert score("f1", (found, np.array([0, 1, 2])))["f1"] == pytest.approx(100.0 * (1.0 + 2.0 / 3.0 + 0.0) / 3.0)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "own_metrics_for_test.py"


def test_a_function_of_the_callers_is_averaged_over_samples(module: Path) -> None:
    module.write_text("def size(outputs, labels):\n    return len(labels)\n")
    result = score("own_metrics_for_test:size", (logits(3, 2), np.zeros(3)), (logits(1, 2), np.zeros(1)))
    assert result == {"size": (3 * 3 + 1 * 1) / 4}


def test_what_a_function_raises_is_told_with_the_samples() -> None:
    metric = metric_factory("operator:truediv")()
    with pytest.raises(DataError, match=r"samples 4 to 6: the metric 'operator:truediv' raised ValueError"):
        metric.update([logits(3, 2)], np.zeros(3), 4)


@pytest.mark.parametrize("name", ["topp", "no_such_module_here:f", "math:no_such_function", "math:pi"])
def test_what_is_no_metric_is_an_error(name: str) -> None:
    with pytest.raises(DataError, match=name.partition(":")[0]):
        metric_factory(name)


@pytest.mark.parametrize("make", METRICS.values(), ids=METRICS)
def test_before_the_first_sample_nothing_is_claimed(make: Callable[[], Metric]) -> None:
    assert all(math.isnan(value) for value in make().result().values())


@pytest.mark.parametrize("name", METRICS)
def test_what_is_no_array_of_numbers_is_not_judged(name: str) -> None:
    for output in ([{"a": 1.0}], np.array([["a"]])):
        with pytest.raises(DataError, match="first output, which is judged, holds no numbers"):
            metric_factory(name)().update([output], np.array([0]), 0)  # type: ignore[list-item]


def test_pixels_of_no_class_of_the_model_are_named_with_their_sample() -> None:
    labels = np.zeros((2, 1, 2), np.int64)
    labels[1, 0, 1] = 3
    with pytest.raises(DataError, match=r"sample 5: label 3 is none of the model's 3 classes"):
        metric_factory("mean-iou")().update([np.zeros((2, 3, 1, 2), np.float32)], labels, 4)
    with pytest.raises(DataError, match=r"the output holds classes from 0\.0 to 1000000\.0"):
        metric_factory("mean-iou")().update([np.array([[[0.0, 1e6]]])], labels[:1], 4)
