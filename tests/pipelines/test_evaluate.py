"""Evaluation of several models: turns, timing apart from warm-up, what fails is kept apart."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from support import parse

from qat2int8.ir import DataError
from qat2int8.ir.io import save_model
from qat2int8.pipelines.data import Batch
from qat2int8.pipelines.evaluation.evaluate import Evaluation, ModelScore, Timing, evaluate
from qat2int8.pipelines.evaluation.metrics import METRICS
from qat2int8.pipelines.evaluation.verdict import MaxDrop

RIGHT = "g (float[N,3] x) => (float[N,3] y) { y = Identity (x) }"
WRONG = "g (float[N,3] x) => (float[N,3] y) { y = Neg (x) }"
PICKY = "g (float[2,3] x) => (float[2,3] y) { y = Identity (x) }"
IN_GRAPH = """g (float[N,3] x) => (float[N,3] y, float accuracy, float mean_loss)
              <float half = {0.5}, float loss = {2}> {
                y = Identity (x)  accuracy = Identity (half)  mean_loss = Identity (loss) }"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.onnx"
    save_model(parse(text), path)
    return path


def batches(*sizes: int) -> list[Batch]:
    """Samples whose class is the largest input."""
    made, first = [], 0
    for size in sizes:
        labels = np.arange(first, first + size) % 3
        made.append(Batch({"x": np.eye(3, dtype=np.float32)[labels]}, labels, first))
        first += size
    return made


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    return {"right": write(tmp_path, "right", RIGHT), "wrong": write(tmp_path, "wrong", WRONG)}


def test_every_model_answers_every_sample(models: dict[str, Path]) -> None:
    result = evaluate(models, batches(2, 2, 1), METRICS["topk"])
    assert [(score.model, score.samples) for score in result.scores] == [("right", 5), ("wrong", 5)]
    assert result.of("right", 1).metrics["top-1"] == 100.0
    assert result.of("wrong", 1).metrics["top-1"] == 0.0
    assert result.of("right", 1).timing.samples == (2, 2, 1)
    assert result.failures == ()


def test_skipped_batches_are_judged_but_not_timed(models: dict[str, Path]) -> None:
    score = evaluate(models, batches(1, 1, 1, 1), METRICS["topk"], skip_batches=3).of("right", 1)
    assert score.samples == 4
    assert len(score.timing.seconds) == 4
    assert score.warm.batches == (3,)
    assert score.warm.seconds == score.timing.seconds[3:]


def test_iterations_end_the_run(models: dict[str, Path]) -> None:
    score = evaluate(models, batches(1, 1, 1, 1), METRICS["topk"], iterations=3).of("wrong", 1)
    assert score.timing.batches == (0, 1, 2)


def test_models_are_judged_once_however_many_threads(models: dict[str, Path]) -> None:
    result = evaluate(models, batches(2), METRICS["topk"], threads=(1, 2))
    assert [(score.model, score.threads) for score in result.scores] == [
        ("right", 1),
        ("wrong", 1),
        ("right", 2),
        ("wrong", 2),
    ]
    assert result.of("right", 2).metrics == {}
    assert len(result.of("right", 2).timing.seconds) == 1


def test_a_batch_that_fails_one_model_is_told_and_the_rest_is_kept(tmp_path: Path) -> None:
    models = {"any": write(tmp_path, "any", RIGHT), "picky": write(tmp_path, "picky", PICKY)}
    result = evaluate(models, batches(2, 1, 2), METRICS["topk"])
    assert result.of("any", 1).samples == 5
    assert result.of("picky", 1).samples == 4
    (failure,) = result.failures
    assert (failure.model, failure.first, failure.samples) == ("picky", 2, 1)
    assert str(failure).startswith("picky: sample 2: onnxruntime cannot run the model")
    # Compared on the batches that both ran.
    assert not math.isnan(result.speedup("picky", "any", 1))


def test_labels_out_of_range_are_told_and_the_rest_is_kept(models: dict[str, Path]) -> None:
    bad = batches(1, 1, 1)
    bad[1] = Batch(bad[1].inputs, np.array([7]), 1)
    result = evaluate(models, bad, METRICS["topk"])
    assert [failure.model for failure in result.failures] == ["right", "wrong"]
    assert "sample 1" in str(result.failures[0])
    assert result.of("right", 1).samples == 2
    assert result.of("right", 1).metrics["top-1"] == 100.0


def test_accuracy_and_loss_can_come_out_of_the_graph(tmp_path: Path) -> None:
    models = {"m": write(tmp_path, "m", IN_GRAPH)}
    score = evaluate(models, batches(2, 1), METRICS["topk"], accuracy_output="accuracy").of("m", 1)
    assert score.metrics == {"accuracy": 50.0}
    assert score.loss == 2.0
    with pytest.raises(DataError, match="no output 'nothing'"):
        evaluate(models, batches(1), METRICS["topk"], loss_output="nothing")


def test_speed_alone_needs_no_labels(models: dict[str, Path]) -> None:
    unlabelled = [Batch(batch.inputs, None, batch.first) for batch in batches(1, 1)]
    result = evaluate(models, unlabelled, None)
    assert result.failures == ()
    assert result.of("right", 1).metrics == {}
    assert result.of("right", 1).timing.throughput > 0.0


def test_every_batch_is_reported_with_the_figures_so_far(models: dict[str, Path]) -> None:
    seen: list[tuple[int, float]] = []
    evaluate(
        models,
        batches(1, 1),
        METRICS["topk"],
        on_batch=lambda done, figures: seen.append((done, figures["right"]["top-1"])),
    )
    assert seen == [(1, 100.0), (2, 100.0)]


@pytest.mark.parametrize(
    ("sizes", "iterations", "skip", "message"),
    [((), 0, 0, "no samples"), ((1, 1), 0, 2, "2 of them to be skipped"), ((1, 1), 2, 2, "leave none")],
)
def test_runs_that_leave_nothing_to_time_are_errors(
    models: dict[str, Path], sizes: tuple[int, ...], iterations: int, skip: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        evaluate(models, batches(*sizes), METRICS["topk"], iterations=iterations, skip_batches=skip)


def test_timing_by_hand() -> None:
    timing = Timing((0, 1, 2), (1.0, 0.1, 0.3), (4, 4, 2))
    assert timing.throughput == pytest.approx(10 / 1.4)
    warm = timing.without(1)
    assert warm.throughput == pytest.approx(15.0)
    assert warm.median_ms == pytest.approx(200.0)
    assert warm.p99_ms == pytest.approx(298.0)
    assert math.isnan(timing.without(3).throughput)


def scored(*values: float) -> Evaluation:
    empty = Timing((), (), ())
    return Evaluation(
        tuple(
            ModelScore(f"m{index}", 1, 10, {"top-1": value, "top-5": 0.0}, "%", None, empty, empty)
            for index, value in enumerate(values)
        ),
        (),
        0,
    )


@pytest.mark.parametrize(
    ("drop", "passed"),
    [
        ("1%", [True, False]),
        ("0.5%", [False, False]),
        ("0.5", [False, False]),
        ("1.0", [True, False]),
        ("2", [True, True]),
    ],
)
def test_a_drop_is_relative_with_a_percent_sign_and_else_in_points(drop: str, passed: list[bool]) -> None:
    # 1 % of 80 is 0.8 points.
    verdicts = MaxDrop.parse(drop).judge(scored(80.0, 79.3, 78.9))
    assert [verdict.passed for verdict in verdicts] == passed


def test_a_drop_of_exactly_the_limit_passes_and_no_number_fails() -> None:
    assert MaxDrop.parse("0.3").judge(scored(0.4, 0.1))[0].passed
    assert not MaxDrop.parse("100").judge(scored(50.0, math.nan))[0].passed
    assert str(MaxDrop.parse("1").judge(scored(50.0, 50.0))[0]).startswith("PASSED")


@pytest.mark.parametrize("text", ["", "-1", "1 point", "%", "1e3", "nan"])
def test_what_is_no_drop_is_an_error(text: str) -> None:
    with pytest.raises(DataError, match="is no drop"):
        MaxDrop.parse(text)
