"""The calibrator in its several shapes, and tables that keep what they were computed from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from float_networks import Array, convolutions, images
from support import REPOSITORY, parse

from qat2int8.ir import DataError, PipelineError, UnsupportedModel
from qat2int8.pipelines.calibration import (
    CachedStream,
    Calibrator,
    DatasetStream,
    calibrate,
    combine,
    statistics_of,
)
from qat2int8.pipelines.data import open_data
from qat2int8.pipelines.tables import CalibrationTable, merge
from qat2int8.pipelines.tables.json_table import read_json, write_json

QAT_MODEL = REPOSITORY / "tools" / "demo_data" / "resnet_trt_qat.onnx"
TENSORS = ("image", "relu1", "relu2", "sum", "mean")


def table(data: Array, algorithm: str = "entropy", **options: object) -> CalibrationTable:
    return calibrate(convolutions(), {"image": data}, algorithm, **options)  # type: ignore[arg-type]


def test_the_tensors_that_kernels_need_are_calibrated() -> None:
    found = table(images(8), "minmax", batch_size=4)
    assert tuple(found.entries) == TENSORS
    assert (found.algorithm, found.samples) == ("minmax", 8)
    assert found.entries["image"].lo == pytest.approx(float(images(8).min()))
    assert found.entries["relu1"].lo == 0.0


def test_the_batch_size_and_the_order_change_nothing() -> None:
    data = images(12)
    expected = table(data)
    for size in (3, 5, 12):
        other = table(data, batch_size=size)
        for name, entry in expected.entries.items():
            assert other.entries[name].hi == pytest.approx(entry.hi, rel=1e-3)
    calibrator = Calibrator(convolutions())
    for index in reversed(range(12)):
        calibrator.observe({"image": data[index : index + 1]}, index)
    assert calibrator.compute() == expected
    assert calibrator.compute("moving-average") == table(data, "moving-average")


@pytest.mark.parametrize("algorithm", ["entropy", "percentile", "moving-average", "avg", "minmax"])
def test_shards_merge_to_the_table_of_one_run(algorithm: str) -> None:
    data = images(10)
    whole = table(data, algorithm, keep_statistics=True)
    parts = []
    for number in (3, 1, 2):
        calibrator = Calibrator(convolutions(), algorithm)
        calibrator.run(open_data({"image": data}, calibrator.inputs, batch_size=1).shard(number, 3))
        parts.append(read_json(write_json(calibrator.compute(keep_statistics=True))))
    assert merge(parts, combine=combine) == whole
    with pytest.raises(DataError, match="was seen already"):
        merge([parts[0], parts[0]], combine=combine)


def test_a_run_goes_on_where_it_was_ended() -> None:
    data = images(9)

    class Ended(Exception):
        pass

    def end(done: int, of: int | None) -> None:
        assert of == 9
        if done == 4:
            raise Ended

    first = Calibrator(convolutions())
    with pytest.raises(Ended):
        first.run({"image": data}, on_batch=end)
    halfway = read_json(write_json(first.compute(keep_statistics=True)))
    assert halfway.samples == 4
    done: list[int] = []
    second = Calibrator(convolutions(), resume=halfway)
    second.run({"image": data}, on_batch=lambda count, of: done.append(count))
    assert second.compute() == table(data)
    assert done[-1] == 9


def test_resuming_needs_the_same_model_and_statistics() -> None:
    halfway = table(images(2), keep_statistics=True)
    with pytest.raises(DataError, match="made for another model"):
        Calibrator(convolutions(seed=5), resume=halfway)
    with pytest.raises(DataError, match="were not kept"):
        Calibrator(convolutions(), resume=table(images(2)))
    with pytest.raises(DataError, match="only one part counted the values"):
        Calibrator(convolutions(), resume=table(images(2), "minmax", keep_statistics=True))


def test_the_sampling_model_can_be_run_elsewhere() -> None:
    data = images(4)
    calibrator = Calibrator(convolutions())
    sampling = calibrator.sampling_model
    onnx.checker.check_model(sampling, full_check=True)
    session = ort.InferenceSession(sampling.SerializeToString(), providers=["CPUExecutionProvider"])
    for index in range(4):
        feeds = {"image": data[index : index + 1]}
        names = [name for name in calibrator.tensors if name not in feeds]
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
        calibrator.record({**feeds, **outputs}, 1)
    assert calibrator.compute() == table(data)


def test_one_run_serves_every_algorithm_that_values_were_counted_for() -> None:
    calibrator = Calibrator(convolutions(), "entropy")
    calibrator.run({"image": images(6)})
    for algorithm in ("minmax", "mse", "percentile{percent=90.0}", "avg"):
        assert calibrator.compute(algorithm) == table(images(6), algorithm)
    ends_only = Calibrator(convolutions(), "minmax")
    ends_only.run({"image": images(1)})
    with pytest.raises(DataError, match="were not counted"):
        ends_only.compute("mse")


# -- streams --------------------------------------------------------------------------------------------------


def stream(count: int = 7, size: int = 2, cache: Path | None = None) -> DatasetStream:
    calibrator = Calibrator(convolutions())
    return DatasetStream(open_data({"image": images(count)}, calibrator.inputs, batch_size=size), cache)


def test_a_stream_gives_full_batches_by_name() -> None:
    calibrator = Calibrator(convolutions())
    calibrator.run_stream(stream())
    assert len(calibrator.statistics) == 6
    expected = table(images(7)[:6], batch_size=2)
    assert calibrator.compute() == expected


def test_a_stream_can_skip_and_begin_again() -> None:
    one = stream(6)
    one.skip(1)
    second = one.get_batch(["image"])
    assert second is not None
    np.testing.assert_array_equal(second["image"], images(6)[2:4])
    one.reset(2)
    third = one.get_batch(["image"])
    assert third is not None
    np.testing.assert_array_equal(third["image"], images(6)[4:])
    assert one.get_batch(["image"]) is None


def test_a_cache_saves_the_run(tmp_path: Path) -> None:
    cache = tmp_path / "calibration.json"
    said: list[str] = []
    first = Calibrator(convolutions()).cached(stream(cache=cache), said.append)
    assert said == []
    assert json.loads(cache.read_text())["samples"] == 6

    class Used(DatasetStream):
        def get_batch(self, names: object) -> None:
            raise AssertionError("the cache was not used")

    dataset = open_data({"image": images(7)}, Calibrator(convolutions()).inputs, batch_size=2)
    again: CachedStream = Used(dataset, cache)
    assert Calibrator(convolutions()).cached(again) == first


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_digest": "0"}, "it was made for another model"),
        ({"algorithm": "mse"}, "it was made by mse, not entropy"),
        (None, "is not JSON or was cut off"),
    ],
)
def test_a_cache_that_does_not_fit_is_made_anew_and_says_why(
    tmp_path: Path, change: dict[str, str] | None, reason: str
) -> None:
    cache, said = tmp_path / "calibration.json", list[str]()
    first = Calibrator(convolutions()).cached(stream(cache=cache))
    text = cache.read_text()
    cache.write_text(text[:100] if change is None else write_json(dataclasses.replace(first, **change)))  # type: ignore[arg-type]
    assert Calibrator(convolutions()).cached(stream(cache=cache), said.append) == first
    assert len(said) == 1
    assert reason in said[0]
    assert cache.read_text() == text


def test_a_batch_of_another_size_is_an_error() -> None:
    class Short:
        def get_batch_size(self) -> int:
            return 4

        def get_batch(self, names: object) -> dict[str, Array]:
            return {"image": images(3)}

    class Nameless(Short):
        def get_batch(self, names: object) -> dict[str, Array]:
            return {"picture": images(4)}

    with pytest.raises(DataError, match="batch 0: input 'image' has 3 samples, the stream said 4"):
        Calibrator(convolutions()).run_stream(Short())
    with pytest.raises(DataError, match="batch 0: has no array for input 'image'"):
        Calibrator(convolutions()).run_stream(Nameless())


# -- what is refused ------------------------------------------------------------------------------------------


def test_no_samples_are_an_error() -> None:
    with pytest.raises(DataError, match="no sample was seen"):
        Calibrator(convolutions()).compute()
    with pytest.raises(DataError, match="no samples"):
        table(images(0))


def test_models_with_fake_quant_or_without_layers_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="has fake quantization"):
        Calibrator(QAT_MODEL)
    proto = parse("g (float[N] x) => (float[N] y) { y = Neg (x) }").to_proto()
    with pytest.raises(UnsupportedModel, match="nothing that ort-x86 computes in integers"):
        Calibrator(proto)


def test_a_pipeline_must_calibrate() -> None:
    with pytest.raises(PipelineError, match="has no gather-calibrated-scales"):
        Calibrator(convolutions(), pipeline="qat-to-fp32")


def test_damaged_statistics_are_an_error() -> None:
    whole = table(images(2), keep_statistics=True)
    entry = whole.entries["image"]
    for damage in ({"minima": "x"}, {"samples": [[0, 5]]}, {"samples": 3}, {"histogram": {"base": 0}}):
        spoilt = dataclasses.replace(entry, statistics={**entry.statistics, **damage})
        broken = dataclasses.replace(whole, entries={**whole.entries, "image": spoilt})
        with pytest.raises(DataError, match=r"damaged|not a histogram"):
            statistics_of(broken)
    other = table(images(3), keep_statistics=True).entries["image"]
    with pytest.raises(DataError, match="of other samples"):
        statistics_of(dataclasses.replace(whole, entries={**whole.entries, "mean": other}))
