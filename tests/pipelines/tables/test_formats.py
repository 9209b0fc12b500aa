"""The formats of tables: what is written and read, what is lost, and what damaged files lead to."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnxruntime.quantization import calibrate, quant_utils

from qat2int8.ir import DataError, OutputError
from qat2int8.pipelines.tables import FORMATS, CalibrationTable, Entry, read_table, write_table
from qat2int8.pipelines.tables.files import losses, parse_table, recognise
from qat2int8.pipelines.tables.tensorrt_cache import write_tensorrt

EXAMPLE = """TRT-7000-EntropyCalibration2
data: 3c008912
conv1: 3c88edfc
pool1: 3c88edfc
conv2: 3ddc858b
pool2: 3ddc858b
ip1: 3db6bd6e
ip2: 3e691968
prob: 3c010a14
"""
"""The table in the documentation of TensorRT's sampleINT8."""

AMAX = {
    "data": 0.996338,
    "conv1": 2.122810,
    "pool1": 2.122810,
    "conv2": 13.674927,
    "pool2": 13.674927,
    "ip1": 11.332019,
    "ip2": 28.909769,
    "prob": 1.000244,
}

TABLE = CalibrationTable(
    "percentile{percent=99.9}",
    500,
    "0123456789abcdef",
    {
        "input:0": Entry(-1.5, 2.25, 2.25),
        "(Unnamed Layer* 4) [Fully Connected]_output": Entry(0.0, 3.0, 3.0, {"histogram": [1, 2]}),
        "größe": Entry(-4.0, 4.0, 4.0),
        "none": Entry(0.0, 0.0, 0.0),
    },
)

NAMES = st.lists(st.text("ab:/*é0", min_size=1, max_size=5), min_size=1, max_size=3).map(" ".join)
FLOATS = st.floats(0, 2.0**100, width=32)


def refused(text: str) -> str:
    with pytest.raises(DataError) as error:
        parse_table(text, where="T")
    return str(error.value)


# -- TensorRT -------------------------------------------------------------------------------------------------


def test_the_example_of_the_documentation_goes_round_byte_for_byte(tmp_path: Path) -> None:
    table = parse_table(EXAMPLE)
    assert {name: round(entry.amax, 6) for name, entry in table.entries.items()} == AMAX
    assert (table.algorithm, table.origin) == ("entropy", "TRT-7000-EntropyCalibration2")
    assert all((entry.lo, entry.hi) == (-entry.amax, entry.amax) for entry in table.entries.values())
    assert write_tensorrt(table) == EXAMPLE
    write_table(table, tmp_path / "t.json")
    write_table(read_table(tmp_path / "t.json"), tmp_path / "cache", "tensorrt")
    assert (tmp_path / "cache").read_bytes() == EXAMPLE.encode()


@pytest.mark.parametrize(
    ("header", "algorithm"),
    [
        ("TRT-8501-EntropyCalibration2", "entropy"),
        ("TRT-100300-MinMaxCalibration", "minmax"),
        ("TRT-XXXX-EntropyCalibration", "entropy-v1"),
        ("TRT-8.6.1-LegacyCalibration", "legacy"),
        ("TRT-7000-SomethingElse", ""),
    ],
)
def test_headers_of_any_version(header: str, algorithm: str) -> None:
    text = f"{header}\nx: 3f800000\n"
    table = parse_table(text)
    assert table.algorithm == algorithm
    assert write_tensorrt(table) == text
    assert write_tensorrt(table, "9999").startswith("TRT-9999-")


def test_the_header_follows_the_algorithm() -> None:
    def header(algorithm: str, origin: str = "") -> str:
        return write_tensorrt(CalibrationTable(algorithm, 0, "", {"x": Entry(0, 1, 1)}, origin)).splitlines()[0]

    assert header("minmax") == "TRT-7000-MinMaxCalibration"
    assert header("mse") == "TRT-7000-EntropyCalibration2"
    assert header("minmax", "TRT-8501-EntropyCalibration2") == "TRT-8501-MinMaxCalibration"
    with pytest.raises(DataError, match="'8 5' is not a version of TensorRT"):
        write_tensorrt(TABLE, "8 5")


def test_names_with_colons_and_spaces_and_numbers_without_zeros_in_front() -> None:
    text = (
        "TRT-7000-EntropyCalibration2\n(Unnamed Layer* 4) [Fully Connected]_output: 3dc6a9ed\na: b:0: 0\nc: 1F\r\n"
    )
    entries = parse_table(text).entries
    assert list(entries) == ["(Unnamed Layer* 4) [Fully Connected]_output", "a: b:0", "c"]
    assert entries["a: b:0"].amax == 0.0
    assert entries["c"].amax == 127 * float(np.uint32(0x1F).view(np.float32))


@given(st.dictionaries(NAMES, FLOATS, min_size=1))
def test_any_scale_and_name_comes_back(scales: dict[str, float]) -> None:
    lines = [f"{name}: {struct.pack('>f', scale).hex()}\n" for name, scale in scales.items()]
    text = "".join(["TRT-8601-MinMaxCalibration\n", *lines])
    assert write_tensorrt(parse_table(text)) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("TRT-7000\nx: 0\n", "T:1: 'TRT-7000' is not the header of a calibration cache (such as TRT-7000-"),
        ("TRT-7000-EntropyCalibration2\n", "T: names no tensors (it may be cut off"),
        ("TRT-7000-EntropyCalibration2\nx: 3f80000g\n", "T:2: 'x: 3f80000g' is not 'name: 8 hexadecimal digits'"),
        ("TRT-7000-EntropyCalibration2\nx: 03f800000\n", "T:2: 'x: 03f800000' is not"),
        ("TRT-7000-EntropyCalibration2\nx\n", "T:2: 'x' is not 'name: 8 hexadecimal digits'"),
        ("TRT-7000-EntropyCalibration2\nx: 3f8", "T:2: is cut off within the scale of tensor 'x'"),
        ("TRT-7000-EntropyCalibration2\nx: 0\ny: 0\nx: 0\n", "T:4: tensor 'x' is there twice"),
        ("TRT-7000-EntropyCalibration2\nx: 7fc00000\n", "T:2: the scale of tensor 'x' is nan"),
        ("TRT-7000-EntropyCalibration2\nx: bf800000\n", "T:2: the scale of tensor 'x' is -1.0"),
    ],
)
def test_caches_that_are_none(text: str, says: str) -> None:
    assert says in refused(text)


# -- dynamic ranges -------------------------------------------------------------------------------------------


def test_dynamic_ranges_as_text(tmp_path: Path) -> None:
    text = "gpu_0/data_0: 1.00024\nTensor (1): out:3.5\n\nzero: 0\n"
    table = parse_table(text)
    assert {name: entry.amax for name, entry in table.entries.items()} == {
        "gpu_0/data_0": 1.00024,
        "Tensor (1): out": 3.5,
        "zero": 0.0,
    }
    write_table(table, tmp_path / "t.txt", "dynamic-range")
    assert read_table(tmp_path / "t.txt") == table
    assert (tmp_path / "t.txt").read_text() == "gpu_0/data_0: 1.00024\nTensor (1): out: 3.5\nzero: 0.0\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x: 1\ny: one\n", "T:2: 'y: one' is not 'name: range'"),
        ("x: 1\n: 1\n", "T:2: ': 1' is not 'name: range'"),
        ("x: nan\n", "T:1: the range of tensor 'x' is nan"),
        ("x: -1\n", "T:1: the range of tensor 'x' is -1.0"),
        ("x: 1\nx: 2\n", "T:2: tensor 'x' is there twice"),
        ("x: 1\ny: 1.2", "T: ends within a line, whose number may be cut off"),
    ],
)
def test_texts_that_are_no_ranges(text: str, says: str) -> None:
    assert says in refused(text)


# -- onnxruntime ----------------------------------------------------------------------------------------------


def ort_table() -> Any:
    def number(value: Any) -> Any:
        return np.asarray(value, np.float32)

    data = {
        "x": calibrate.TensorData(lowest=number(-1.5), highest=number(2.25)),
        "y": calibrate.TensorData(
            lowest=number([0.0]), highest=number([3.0]), hist=np.arange(3), hist_edges=number([0, 1, 2, 3])
        ),
        "z": calibrate.TensorData(lowest=number(-4), highest=number(0.5)),
    }
    return calibrate.TensorsData(calibrate.CalibrationMethod.Entropy, data)


RANGES = {"x": Entry(-1.5, 2.25, 2.25), "y": Entry(0, 3, 3), "z": Entry(-4, 0.5, 4)}


def test_what_onnxruntime_caches_is_read(tmp_path: Path) -> None:
    calibrate.save_tensors_data(ort_table(), tmp_path / "cache.json")
    table = read_table(tmp_path / "cache.json")
    assert (table.algorithm, table.entries) == ("entropy", RANGES)


def test_of_a_range_a_channel_the_whole_is_taken(tmp_path: Path) -> None:
    ends = (np.array([[-1.0], [-4.0]], np.float32), np.array([[0.5], [0.25]], np.float32))
    rows = {"z": calibrate.TensorData(lowest=ends[0], highest=ends[1])}
    tensors = calibrate.TensorsData(calibrate.CalibrationMethod.MinMax, rows)
    calibrate.save_tensors_data(tensors, tmp_path / "cache.json")
    assert read_table(tmp_path / "cache.json").entries == {"z": Entry(-4, 0.5, 4)}


@pytest.mark.parametrize("frame", [True, False])
def test_what_onnxruntime_writes_as_table_is_read(tmp_path: Path, frame: bool) -> None:
    pytest.importorskip("flatbuffers")
    quant_utils.write_calibration_table(ort_table() if frame else ort_table().data, str(tmp_path))
    assert read_table(tmp_path / "calibration.json").entries == RANGES


def test_what_is_written_for_onnxruntime_is_read_by_it(tmp_path: Path) -> None:
    write_table(CalibrationTable("entropy", 1, "", RANGES), tmp_path / "c.json", "onnxruntime")
    back = calibrate.load_tensors_data(tmp_path / "c.json")
    assert back.calibration_method is calibrate.CalibrationMethod.Entropy
    for name, entry in RANGES.items():
        lowest, highest = back[name].range_value
        assert (lowest.dtype, lowest.shape, float(lowest), float(highest)) == (np.float32, (), entry.lo, entry.hi)
    write_table(CalibrationTable("mse", 1, "", RANGES), tmp_path / "c.json", "onnxruntime")
    assert calibrate.load_tensors_data(tmp_path / "c.json").calibration_method.name == "MinMax"


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"x": {"CLS": "TensorData", "lowest": 0.0}}, "T: tensor 'x': its entry is not a range: 'highest'"),
        ({"x": {"CLS": "TensorData", "lowest": 1.0, "highest": 0.0}}, "T: tensor 'x': 1.0 to 0.0"),
        ({"x": {"CLS": "TensorData", "lowest": [], "highest": [1]}}, "T: tensor 'x': its entry is not a range"),
        ({"CLS": "TensorsData", "data": 3}, "T: the key 'data' holds no tensors"),
        ({"x": 3}, "T: is JSON, but neither a table of qat2int8 nor one of onnxruntime"),
        ({}, "T: is JSON, but neither"),
    ],
)
def test_documents_that_are_no_tables_of_onnxruntime(document: Any, says: str) -> None:
    assert says in refused(json.dumps(document))


# -- our own --------------------------------------------------------------------------------------------------


def test_our_own_keeps_everything(tmp_path: Path) -> None:
    write_table(TABLE, tmp_path / "t.json")
    assert read_table(tmp_path / "t.json") == TABLE
    write_table(CalibrationTable("minmax", 0, ""), tmp_path / "t.json")
    assert read_table(tmp_path / "t.json") == CalibrationTable("minmax", 0, "")


def changed(**changes: Any) -> str:
    document = {
        "format": "qat2int8-calibration-1",
        "algorithm": "minmax",
        "samples": 1,
        "model": "m",
        "tensors": {"x": {"lo": 0, "hi": 1, "amax": 1}},
    }
    return json.dumps({key: value for key, value in {**document, **changes}.items() if value is not None})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (changed(format="qat2int8-calibration-9"), "T: is not a calibration table (qat2int8-calibration-1)"),
        (changed(samples=None), "T: lacks or misspells 'samples'"),
        (changed(samples="many"), "T: lacks or misspells 'samples'"),
        (changed(tensors=[]), "T: lacks or misspells 'tensors'"),
        (changed(tensors={"x": {"lo": 0, "hi": 1}}), "T: tensor 'x': lacks or misspells 'amax'"),
        (
            changed(tensors={"x": {"lo": 2, "hi": 1, "amax": 1}}),
            "T: tensor 'x': 2.0 to 1.0 (amax 1.0) is not a range",
        ),
        (changed(tensors={"x": 3}), "T: tensor 'x': lacks or misspells"),
        (changed(tensors={"x": {"lo": float("nan"), "hi": 1, "amax": 1}}), "is not finite"),
        (changed().replace('"samples"', '"format"'), "the key 'format' is given twice"),
        (changed()[:-5], "T: is not JSON or was cut off"),
    ],
)
def test_documents_that_are_no_tables(text: str, says: str) -> None:
    assert says in refused(text)


# -- all of them ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_the_format_is_seen_from_the_content(format: str, tmp_path: Path) -> None:
    write_table(TABLE, tmp_path / "table", format)
    text = (tmp_path / "table").read_text(encoding="utf-8")
    assert recognise(text) == format
    assert recognise(f"\ufeff{text}".removeprefix("\ufeff")) == format
    back = read_table(tmp_path / "table")
    assert list(back.entries) == list(TABLE.entries)
    for name, entry in TABLE.entries.items():
        assert back.entries[name].amax == pytest.approx(entry.amax, rel=1e-7)


@pytest.mark.parametrize("format", FORMATS)
def test_a_table_cut_off_anywhere_is_an_error_or_its_first_lines(format: str, tmp_path: Path) -> None:
    write_table(TABLE, tmp_path / "table", format)
    content = (tmp_path / "table").read_bytes()
    whole = list(read_table(tmp_path / "table").entries.items())
    for length in range(len(content)):
        (tmp_path / "table").write_bytes(content[:length])
        with contextlib.suppress(DataError):
            cut = list(read_table(tmp_path / "table").entries.items())
            assert cut == whole[: len(cut)], length


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is an empty file (calibrate again)"),
        (b"\n  \n", "is an empty file"),
        (b"\x00\xff\xfe", "is not text, so it is no calibration table"),
        (b"hello", "is not a calibration table (known are qat2int8 (JSON of qat2int8), tensorrt"),
        (b"[1]", "is not a calibration table"),
    ],
)
def test_files_that_are_no_tables(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(DataError) as error:
        read_table(tmp_path / "t")
    assert str(error.value).startswith(f"{tmp_path / 't'}: ")
    assert says in str(error.value)


def test_places_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_table(tmp_path / "none")
    with pytest.raises(DataError, match="is a folder"):
        read_table(tmp_path)
    with pytest.raises(OutputError, match="does not exist"):
        write_table(TABLE, tmp_path / "none" / "t.json")
    with pytest.raises(DataError, match=r"no format of tables is called 'tensort' \(did you mean 'tensorrt'\?\)"):
        write_table(TABLE, tmp_path / "t", "tensort")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["tensorrt", "dynamic-range"])
@pytest.mark.parametrize("name", ["a\nb", " a", "a\u2028b"])
def test_names_that_no_line_can_hold(tmp_path: Path, format: str, name: str) -> None:
    with pytest.raises(DataError, match="does not fit into a line of its own"):
        write_table(CalibrationTable("", 0, "", {name: Entry(0, 1, 1)}), tmp_path / "t", format)
    assert not list(tmp_path.iterdir())


def test_a_range_beyond_float32(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tensor 'x': its range of 1e\\+60 does not fit"):
        write_tensorrt(CalibrationTable("", 0, "", {"x": Entry(0, 1e60, 1e60)}))


def test_what_is_lost_is_told() -> None:
    assert losses(TABLE, "qat2int8") == []
    assert losses(TABLE, "tensorrt") == [
        "2 of 4 ranges are not symmetric: -amax to amax is kept of them",
        "the algorithm 'percentile{percent=99.9}' is not told",
        "the model it is of is not told",
        "the number of samples, 500, is not told",
        "the statistics are lost: it cannot be merged any more",
    ]
    assert [line.split()[1] for line in losses(TABLE, "onnxruntime")] == ["model", "number", "statistics"]
    clipped = CalibrationTable("entropy", 0, "", {"x": Entry(0, 1, 2)})
    assert losses(clipped, "onnxruntime") == ["1 of 1 symmetric ends that differ from the range are lost"]
    assert losses(parse_table(EXAMPLE), "tensorrt") == []
