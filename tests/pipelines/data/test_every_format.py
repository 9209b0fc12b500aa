"""Laws that hold in all formats: what comes out, how much at a time, and what a damaged file leads to."""

from __future__ import annotations

import contextlib
import gzip
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from data_formats import COUNT, GOLDEN, LABELS, Golden, inputs_of, labels_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qat2int8.ir import DataError
from qat2int8.pipelines.data import Batch, InputSpec, open_data

each_format = pytest.mark.parametrize("golden", GOLDEN, ids=str)


@each_format
@pytest.mark.parametrize("size", [1, 2, 5, 10])
def test_all_samples_come_out_in_order_again_and_again(golden: Golden, size: int, tmp_path: Path) -> None:
    source, _ = golden.write(tmp_path)
    data = open_data(source, [golden.spec], batch_size=size)
    assert data.count == COUNT
    for _ in range(2):
        batches = list(data)
        assert [len(batch) for batch in batches] == [size] * (COUNT // size)
        assert [batch.first for batch in batches] == list(range(0, COUNT, size))
        found = inputs_of(batches)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, golden.samples)
        assert labels_of(batches) == LABELS.tolist()


@each_format
def test_batches_that_do_not_come_out_even(golden: Golden, tmp_path: Path) -> None:
    source, _ = golden.write(tmp_path)
    data = open_data(source, [golden.spec], batch_size=4)
    whole = [4, 4] if golden.name == "tensorrt" else [4, 4, 2]
    assert [len(batch) for batch in data] == whole
    assert data.count == sum(whole)
    assert bool(data.notes) == (golden.name == "tensorrt")


@each_format
def test_a_part_is_the_same_part_of_the_whole(golden: Golden, tmp_path: Path) -> None:
    source, _ = golden.write(tmp_path)
    skipping = f"{source}{'&' if '?' in source else '?'}skip=3"
    data = open_data(skipping, [golden.spec], batch_size=2, samples=4)
    batches = list(data)
    assert (data.count, [batch.first for batch in batches]) == (4, [3, 5])
    np.testing.assert_array_equal(inputs_of(batches), golden.samples[3:7])
    assert labels_of(batches) == LABELS[3:7].tolist()


@each_format
@pytest.mark.parametrize("shards", [1, 2, 3, 5])
def test_shards_are_the_whole_in_whole_batches(golden: Golden, shards: int, tmp_path: Path) -> None:
    source, _ = golden.write(tmp_path)
    data = open_data(source, [golden.spec], batch_size=2)
    parts = [list(data.shard(index, shards)) for index in range(1, shards + 1)]
    together = [batch for part in parts for batch in part]
    assert [batch.first for batch in together] == [batch.first for batch in data]
    np.testing.assert_array_equal(inputs_of(together), golden.samples)
    assert [data.shard(index + 1, shards).count for index in range(shards)] == [sum(map(len, p)) for p in parts]


@each_format
def test_a_file_cut_short_anywhere_is_an_error(golden: Golden, tmp_path: Path) -> None:
    source, file = golden.write(tmp_path)
    content = file.read_bytes()
    for length in range(0, len(content), 1 if len(content) < 300 else 7):
        file.write_bytes(content[:length])
        with pytest.raises(DataError) as refused:
            list(open_data(source, [golden.spec]))
        assert file.name in str(refused.value), length


@each_format
def test_a_file_that_goes_on_is_an_error(golden: Golden, tmp_path: Path) -> None:
    source, file = golden.write(tmp_path)
    if file.suffix in (".npz", ".gz"):
        pytest.skip("zip and gzip allow something behind their end")
    with file.open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(DataError, match=file.name):
        list(open_data(source, [golden.spec]))


@each_format
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_damaged_byte_changes_numbers_or_is_an_error(
    golden: Golden, place: float, value: int, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    source, file = golden.write(folder)
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] = value
    file.write_bytes(content)
    with contextlib.suppress(DataError):
        for batch in open_data(source, [golden.spec]):
            assert batch.inputs["x"].shape[1:] == golden.shape
            assert np.isfinite(batch.inputs["x"]).all()


def test_a_header_that_asks_for_more_than_there_is_memory_is_an_error(tmp_path: Path) -> None:
    sizes = struct.pack(">4i", 2051, 1, 2**31 - 1, 2**31 - 1)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(sizes + bytes(100)))
    spec = InputSpec("x", np.dtype(np.float32), (None, 1, None, None))
    with pytest.raises(DataError, match="is cut short: of 1 samples 0 are there"):
        list(open_data(str(path), [spec]))


@each_format
def test_another_shape_is_an_error_that_names_both(golden: Golden, tmp_path: Path) -> None:
    source, _ = golden.write(tmp_path)
    wanted = type(golden.spec)("x", np.dtype(np.float32), (None, *golden.shape[:-1], 99))
    with pytest.raises(DataError) as refused:
        list(open_data(source, [wanted]))
    assert f"[{','.join(map(str, golden.shape))}]" in str(refused.value)
    assert "99]" in str(refused.value)


@each_format
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_an_error_that_names_file_and_sample(
    golden: Golden, value: float, tmp_path: Path
) -> None:
    if not golden.floats:
        pytest.skip("bytes are always finite")
    samples = golden.samples.copy()
    samples[5].flat[1] = value
    source, file = golden.put(tmp_path, samples)
    with pytest.raises(DataError, match=rf"holds {value}.*") as refused:
        list(open_data(source, [golden.spec], batch_size=2))
    assert str(file) in str(refused.value)
    assert "sample 5:" in str(refused.value)


def test_batches_can_be_told_apart() -> None:
    batch = Batch({"x": np.zeros((3, 2))}, None, 7)
    assert (len(batch), batch.first) == (3, 7)
