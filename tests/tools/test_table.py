"""``qat2int8 table``: what each command writes and tells, and what it says to a mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper
from support import REPOSITORY, parse
from typer.testing import CliRunner, Result

from qat2int8.pipelines.tables import CalibrationTable, Entry, read_table, write_table
from qat2int8.tools.cli import app

QAT = """
g (float[N,4] x) => (float[N,4] y)
<float xs = {0.5}, int8 z = {0}, float ws = {0.25}, float[4,4] w = {1,2,3,4,1,2,3,4,1,2,3,4,1,2,3,4},
 float rs = {0.125}, uint8 rz = {0}> {
  [xq] q = QuantizeLinear (x, xs, z)
  [xd] d = DequantizeLinear (q, xs, z)
  [wq] wi = QuantizeLinear (w, ws, z)
  [wd] wf = DequantizeLinear (wi, ws, z)
  [mul] m = MatMul (d, wf)
  [relu] r = Relu (m)
  [rq] ri = QuantizeLinear (r, rs, rz)
  [rd] y = DequantizeLinear (ri, rs, rz)
}
"""


FLOAT = """
g (float[N,4] image) => (float[N,4] out) <float[4,4] w = {1,2,3,4,1,2,3,4,1,2,3,4,1,2,3,4}> {
  [mul] m = MatMul (image, w)
  [relu] out = Relu (m)
}
"""


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, ["table", *map(str, words)])


def done(*words: object) -> str:
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def document(*words: object) -> Any:
    return json.loads(done(*words, "--json"))


def refused(*words: object) -> str:
    result = invoke(*words)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return str(line)


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """Two shards of one calibration, and a third of another model."""
    for name, model, lo, hi in (("a", "m", -1.0, 2.0), ("b", "m", -3.0, 1.0), ("c", "n", 0.0, 1.0)):
        entries = {"x": Entry(lo, hi, max(-lo, hi)), "y": Entry(0.0, 8.0, 8.0)}
        write_table(CalibrationTable("minmax", 10, model, entries), tmp_path / f"{name}.json")
    return tmp_path


def test_without_an_action_the_actions_are_listed() -> None:
    result = invoke()
    assert all(action in result.output for action in ("show", "convert", "diff", "merge", "extract"))


def test_show(tables: Path) -> None:
    shown = done("show", tables / "a.json").splitlines()
    assert shown[:4] == [
        "format       qat2int8, JSON of qat2int8",
        "algorithm    minmax",
        "samples      10",
        "model        m",
    ]
    assert [line.split() for line in shown if line.startswith("x")] == [["x", "-1", "2", "2"]]
    told = document("show", tables / "a.json")
    assert told["tensors"]["x"] == {"lo": -1.0, "hi": 2.0, "amax": 2.0}
    assert (told["format"], told["samples"], told["digest"]) == ("qat2int8", 10, "m")


def test_convert_there_and_back(tables: Path) -> None:
    told = done("convert", tables / "a.json", "--to", "tensorrt", "--trt-version", "8601", "-o", tables / "cache")
    assert f"written      {tables / 'cache'}: 2 tensors, tensorrt" in told
    assert "lost         2 of 2 ranges are not symmetric: -amax to amax is kept of them" in told
    assert (tables / "cache").read_text().startswith("TRT-8601-MinMaxCalibration\nx: 3c")
    back = document("convert", tables / "cache", "--to", "dynamic-range", "-o", tables / "t.txt")
    assert back["tensors"]["x"]["amax"] == pytest.approx(2.0)
    assert back["lost"] == ["the algorithm 'minmax' is not told"]
    assert read_table(tables / "t.txt").entries["y"].amax == pytest.approx(8.0)


def test_diff(tables: Path) -> None:
    told = done("diff", tables / "a.json", tables / "b.json")
    assert "tensors      2, 1 equal" in told
    assert "66.7 %" in told
    rows = document("diff", tables / "a.json", tables / "c.json")["differences"]
    assert [(row["tensor"], row["relative"]) for row in rows] == [("x", 0.5), ("y", 0.0)]
    assert "model        m and n" in done("diff", tables / "a.json", tables / "c.json")
    assert invoke("diff", tables / "a.json", tables / "b.json", "--tolerance", "0.7").exit_code == 0
    result = invoke("diff", tables / "a.json", tables / "b.json", "--tolerance", "0.6")
    assert result.exit_code == 1
    assert result.stderr == "requirement not met: tensor 'x' differs by 66.7 %\n"


def test_a_tensor_that_is_missing_is_the_worst_difference(tables: Path) -> None:
    write_table(CalibrationTable("minmax", 10, "m", {"y": Entry(0, 8, 8)}), tables / "less.json")
    assert "missing" in done("diff", tables / "a.json", tables / "less.json")
    (worst, _) = document("diff", tables / "a.json", tables / "less.json")["differences"]
    assert worst == {"tensor": "x", "relative": None, "left": {"lo": -1.0, "hi": 2.0, "amax": 2.0}, "right": None}
    assert invoke("diff", tables / "a.json", tables / "less.json", "--tolerance", "1e9").exit_code == 1


def test_merge(tables: Path) -> None:
    told = document("merge", tables / "a.json", tables / "b.json", "-o", tables / "all.json")
    assert (told["samples"], told["tensors"]["x"]) == (20, {"lo": -3.0, "hi": 2.0, "amax": 3.0})
    assert read_table(tables / "all.json").entries["x"] == Entry(-3.0, 2.0, 3.0)


def test_extract(tables: Path) -> None:
    onnx.save(parse(QAT).to_proto(), tables / "qat.onnx")
    told = document("extract", tables / "qat.onnx", "-o", tables / "t.json")
    assert list(told["tensors"]) == ["x", "r"]
    assert told["tensors"]["x"] == {"lo": -64.0, "hi": 63.5, "amax": 63.5}
    assert told["tensors"]["r"] == {"lo": 0.0, "hi": 31.875, "amax": 31.875}
    assert told["algorithm"] == "trained"
    done("extract", tables / "qat.onnx", "-o", tables / "cache", "--to", "tensorrt")
    assert (tables / "cache").read_text().splitlines()[1] == "x: 3f000000"


def test_apply(tables: Path) -> None:
    """The table of the QAT model, through TensorRT's format, on the float model of the same network."""
    demo = REPOSITORY / "tools" / "demo_data"
    done("extract", demo / "resnet_trt_qat.onnx", "--to", "tensorrt", "-o", tables / "cache")
    words = ("apply", tables / "cache", demo / "resnet_trt_fp32.onnx", "-o", tables / "int8.onnx")
    told = document(*words)
    assert told["tensors"] == {"table": 10, "model": 10}
    assert told["same_model"] is False
    assert told["certificate"]["integer_macs_percent"] > 60
    model = onnx.load(tables / "int8.onnx")
    scales = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    (first,) = (node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "image")
    assert scales[first.input[1]] == pytest.approx(1 / 127, rel=0.01)
    assert "10 of 10 tensors are in the model" in done(*words)
    assert "tensors are matched by name alone" in done(*words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("apply", "a.json", "m.onnx", "-o", "out"), "m.onnx: has nothing that ort-x86 computes in integers"),
        (("apply", "half.json", "m.onnx", "-o", "out"), "half.json: is not JSON or was cut off"),
        (("apply", "a.json", "m.onnx", "-o", "m.onnx"), "m.onnx: is the input model itself"),
        (("apply", "a.json", "qat.onnx", "-o", "out"), "qat.onnx: has fake quantization"),
        (
            ("apply", "a.json", "float.onnx", "-o", "out"),
            "it has none of the 1 tensors that need a range, such as",
        ),
        (("show", "none.json"), "none.json: no such file"),
        (("show", "m.onnx"), "m.onnx: is not text, so it is no calibration table"),
        (("show", "half.json"), "half.json: is not JSON or was cut off"),
        (("convert", "a.json", "--to", "tensort", "-o", "out"), "is called 'tensort' (did you mean 'tensorrt'?)"),
        (("convert", "a.json", "--to", "tensorrt", "-o", "no/out"), "does not exist (create it first)"),
        (("convert", "a.json", "--to", "tensorrt", "--trt-version", "a b", "-o", "out"), "'a b' is not a version"),
        (("diff", "a.json"), "Missing argument 'OTHER'"),
        (("diff", "a.json", "half.json"), "half.json: is not JSON or was cut off"),
        (("merge", "a.json", "c.json", "-o", "out"), "a.json and "),
        (("merge", "-o", "out"), "Missing argument"),
        (("extract", "m.onnx", "-o", "out"), "m.onnx: no activation has a grid in this model"),
        (("extract", "a.json", "-o", "out"), "a.json: is a text file, not an ONNX model"),
        (("shwo", "a.json"), "No such command 'shwo'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    tables: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tables)
    onnx.save(parse("g (float[2] x) => (float[2] y) { y = Neg (x) }").to_proto(), "m.onnx")
    onnx.save(parse(QAT).to_proto(), "qat.onnx")
    onnx.save(parse(FLOAT).to_proto(), "float.onnx")
    (tables / "half.json").write_text((tables / "a.json").read_text()[:50])
    before = sorted(tables.iterdir())
    assert says in refused(*words)
    assert sorted(tables.iterdir()) == before
