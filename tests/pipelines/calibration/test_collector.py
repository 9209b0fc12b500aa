"""Running a model and keeping statistics: the same whatever is run at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from float_networks import convolutions, images
from support import run

from qat2int8.ir import DataError, Model
from qat2int8.pipelines.calibration.collector import Collector, sampling_model
from qat2int8.pipelines.calibration.statistics import Statistics

NAMES = ("image", "relu1", "sum", "flat")


def collector(model: Model | None = None, *, most_bytes: int = 1 << 30, threads: int = 1) -> Collector:
    model = model or Model.from_proto(convolutions())
    values = model.values()
    return Collector(
        model, [values[name] for name in NAMES], histograms=True, threads=threads, most_bytes=most_bytes
    )


def assert_same(one: Statistics, other: Statistics) -> None:
    np.testing.assert_array_equal(one.indices, other.indices)
    for name, tensor in one.tensors.items():
        np.testing.assert_array_equal(tensor.minima, other.tensors[name].minima)
        np.testing.assert_array_equal(tensor.maxima, other.tensors[name].maxima)
        assert tensor.histogram == other.tensors[name].histogram


def test_it_sees_what_the_model_computes() -> None:
    model, data = Model.from_proto(convolutions()), images(3)
    collected = collector(model)
    collected.run({"image": data}, 0)
    values = run(sampling_model(model, NAMES), {"image": data})[1:]
    for name, expected in zip(("relu1", "sum", "flat"), values, strict=True):
        tensor = collected.statistics.tensors[name]
        np.testing.assert_allclose(tensor.maxima, expected.reshape(3, -1).max(1), rtol=1e-5)
        assert tensor.histogram is not None
        assert tensor.histogram.total == expected.size
    np.testing.assert_array_equal(collected.statistics.tensors["image"].minima, data.reshape(3, -1).min(1))


def test_the_model_stays_as_it_is_and_outputs_keep_their_names() -> None:
    model = Model.from_proto(convolutions())
    sampling = sampling_model(model, [*NAMES, "logits"])
    assert [value.name for value in model.graph.outputs] == ["logits"]
    assert [value.name for value in sampling.graph.outputs] == ["logits", "relu1", "sum", "flat"]
    with pytest.raises(DataError, match="tensor 'nothing': is not in the model"):
        sampling_model(model, ["nothing"])


@pytest.mark.parametrize("most_bytes", [1, 2000, 5000])
def test_a_bound_on_memory_changes_no_number(most_bytes: int) -> None:
    data, whole, bounded = images(6), collector(), collector(most_bytes=most_bytes)
    for at in range(6):
        whole.run({"image": data[at : at + 1]}, at)
    bounded.run({"image": data}, 0)
    assert_same(bounded.statistics, whole.statistics)


def test_a_model_of_one_batch_size_is_run_for_a_few_tensors_at_a_time() -> None:
    model, data = Model.from_proto(convolutions(batch=2)), images(2)
    whole, bounded = collector(model), collector(model, most_bytes=1)
    whole.run({"image": data}, 0)
    bounded.run({"image": data}, 0)
    assert_same(bounded.statistics, whole.statistics)


def test_shapes_that_nobody_knows_are_learnt() -> None:
    model = Model.from_proto(convolutions())
    for name in NAMES[1:]:
        model.values()[name].shape = None
    whole, unknown = collector(), collector(model)
    for at in (0, 2):
        whole.run({"image": images(2, seed=at)}, at)
        unknown.run({"image": images(2, seed=at)}, at)
    assert_same(unknown.statistics, whole.statistics)


def test_threads_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat2int8.pipelines.calibration.collector._WORTH_THREADS", 0)
    one, many = collector(), collector(threads=3)
    one.run({"image": images(4)}, 0)
    many.run({"image": images(4)}, 0)
    assert_same(many.statistics, one.statistics)


def test_a_bad_sample_is_named_and_what_was_seen_before_stays() -> None:
    collected, bad = collector(), images(2)
    collected.run({"image": images(2)}, 0)
    bad[1, 0, 0, 0] = 3e38
    with pytest.raises(DataError, match=r"sample 3, tensor 'relu1': the tensor holds a NaN or an infinity"):
        collected.run({"image": bad}, 2)
    assert len(collected.statistics) == 2


def test_an_input_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(DataError, match="cannot run the model on this input"):
        collector().run({"image": np.zeros((1, 3, 8, 8), np.float32)}, 0)


def test_it_goes_on_from_earlier_statistics() -> None:
    model, data = Model.from_proto(convolutions()), images(4)
    first = collector(model)
    first.run({"image": data[:2]}, 0)
    wanted = [model.values()[name] for name in NAMES]
    second = Collector(model, wanted, histograms=True, start=first.statistics)
    second.run({"image": data[2:]}, 2)
    whole = collector(model)
    whole.run({"image": data[:2]}, 0)
    whole.run({"image": data[2:]}, 2)
    assert_same(second.statistics, whole.statistics)
    assert len(first.statistics) == 2


def test_no_file_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    collected = collector()
    collected.run({"image": images(1)}, 0)
    assert list(tmp_path.iterdir()) == []
