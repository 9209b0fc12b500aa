"""``qat2int8 evaluate`` as a person sees it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from support import parse
from typer.testing import CliRunner, Result

from qat2int8.ir.io import save_model
from qat2int8.tools.cli import app

RIGHT = "g (float[N,3] x) => (float[N,3] y) { y = Identity (x) }"
WRONG = "g (float[N,3] x) => (float[N,3] y) { y = Neg (x) }"
OTHER = "g (float[N,4] image) => (float[N,4] y) { y = Identity (image) }"
IN_GRAPH = """g (float[N,3] x) => (float[N,3] y, float accuracy) <float half = {0.5}> {
                y = Identity (x)  accuracy = Identity (half) }"""

FIXED = RIGHT.replace("[N,3]", "[5,3]")
QONNX = """<ir_version: 8, opset_import: ["" : 17, "qonnx.custom_op.general" : 1]>
    g (float[N,3] x) => (float[N,3] y) <float s = {0.5}, float z = {0}, float bits = {8}> {
      y = qonnx.custom_op.general.Quant <narrow = 0, signed = 1, rounding_mode = "ROUND"> (x, s, z, bits) }"""
LONE = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[N,3] x) => (float[N,3] y) <float[1] s = {0.5}, uint8[1] z = {0}> {
      a = QuantizeLinear (x, s, z)  b = DequantizeLinear (a, s, z)
      c = Add (b, b)
      d = QuantizeLinear (c, s, z)  y = DequantizeLinear (d, s, z) }"""
"""Scales in arrays of one, which onnxruntime's optimiser makes an operator of that does not take them."""
BROKEN = """
import numpy as np
def samples():
    yield {"x": np.eye(3, dtype=np.float32)[:1]}, np.array([0])
    yield {"x": np.eye(3, dtype=np.float32)[:1]}, np.array([0])
    raise OSError("gone")
"""
PICKY = """
import itertools
count = itertools.count()
def metric(outputs, labels):
    number = next(count)
    if number == 1:
        raise ValueError("not this one")
    return float("nan") if number == 3 else 7
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in (
        ("right", RIGHT),
        ("wrong", WRONG),
        ("other", OTHER),
        ("in_graph", IN_GRAPH),
        ("fixed", FIXED),
    ):
        save_model(parse(text), tmp_path / f"{name}.onnx")
    labels = np.arange(12) % 3
    np.savez(tmp_path / "data.npz", x=np.eye(3, dtype=np.float32)[labels], labels=labels, shifted=(labels + 1) % 3)
    np.savez(tmp_path / "few.npz", x=np.eye(3, dtype=np.float32)[labels], labels=labels[:7])
    np.savez(tmp_path / "bad.npz", x=np.eye(3, dtype=np.float32)[labels], labels=np.where(labels == 2, 9, labels))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, ["evaluate", *words])


def test_answers_and_speed_of_two_models(folder: Path) -> None:
    result = invoke("right.onnx", "wrong.onnx", "--data", "data.npz", "--batch-size", "4")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line.split()[:4] for line in lines if line.startswith(("right", "wrong"))][:2] == [
        ["right", "12", "100.00", "100.00"],
        ["wrong", "12", "0.00", "100.00"],
    ]
    assert any(line.startswith("wrong") and line.endswith("-100.00") for line in lines)
    assert sum(line.startswith(("right", "wrong")) for line in lines) == 4
    assert any(line.startswith("data ") for line in lines)
    assert any("onnxruntime" in line for line in lines if line.startswith("machine "))


def test_a_drop_too_large_is_exit_code_1(folder: Path) -> None:
    result = invoke("right.onnx", "wrong.onnx", "--data", "data.npz", "--max-drop", "1%")
    assert result.exit_code == 1
    assert "FAILED       wrong: top-1 0.00 against 100.00, -100.00 points" in result.stdout
    same = invoke("right.onnx", "right.onnx", "--data", "data.npz", "--max-drop", "1%")
    assert same.exit_code == 0


def test_everything_as_json(folder: Path) -> None:
    words = ("--data", "data.npz", "--json", "--threads", "1,2", "--skip-batches", "2")
    document = json.loads(invoke("right.onnx", "wrong.onnx", *words).stdout)
    assert [(score["model"], score["threads"]) for score in document["scores"]] == [
        ("right", 1),
        ("wrong", 1),
        ("right", 2),
        ("wrong", 2),
    ]
    assert document["scores"][0]["timing"]["batches"] == 12
    assert document["scores"][0]["timing_without_skipped"]["batches"] == 10
    assert document["speedup"]["right"]["1"] == 1.0
    assert document["environment"]["versions"]["onnxruntime"]


def test_labels_under_another_name_and_out_of_the_graph(folder: Path) -> None:
    named = json.loads(invoke("right.onnx", "--data", "data.npz", "--labels", "shifted", "--json").stdout)
    assert named["scores"][0]["metrics"]["top-1"] == 0.0
    in_graph = json.loads(invoke("in_graph.onnx", "--data", "data.npz", "--labels", "accuracy", "--json").stdout)
    assert in_graph["scores"][0]["metrics"] == {"accuracy": 50.0}


def test_made_up_inputs_measure_speed_only(folder: Path) -> None:
    result = invoke("right.onnx", "--random-data", "--iterations", "3", "--profile")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "top-1" not in result.stdout
    assert "where the time of right goes" in result.stdout
    assert "made-up inputs" in result.stdout


def test_bad_labels_end_with_2_and_the_rest_is_reported(folder: Path) -> None:
    result = invoke("right.onnx", "--data", "bad.npz", "--max-drop", "1%")
    assert result.exit_code == 2
    assert "right: sample 2: " in result.stderr
    assert "label 9 is none of the model's 3 classes" in result.stderr
    assert "100.00" in result.stdout


def test_labels_that_end_early_are_told_and_the_rest_is_reported(folder: Path) -> None:
    result = invoke("right.onnx", "wrong.onnx", "--data", "few.npz", "--batch-size", "4", "--json")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        f"error: {model}: samples {span}: there are {count} labels for 4 samples (label all of them)"
        for model in ("right", "wrong")
        for span, count in (("4 to 7", 3), ("8 to 11", "no"))
    ]
    scores = json.loads(result.stdout)["scores"]
    assert [(score["samples"], score["metrics"]["top-1"]) for score in scores] == [(4, 100.0), (4, 0.0)]
    assert scores[0]["timing"]["batches"] == 3


def test_data_that_break_off_are_told_and_the_rest_is_reported(folder: Path) -> None:
    (folder / "broken.py").write_text(BROKEN)
    result = invoke("right.onnx", "--data", "broken:samples", "--json")
    assert result.exit_code == 2
    assert (
        result.stderr
        == "error: data: from sample 2 on: broken:samples: its code failed: OSError: gone (mend it)\n"
    )
    assert json.loads(result.stdout)["scores"][0]["samples"] == 2


def test_a_metric_that_raises_is_told_with_sample_and_model(folder: Path) -> None:
    (folder / "picky.py").write_text(PICKY)
    result = invoke("right.onnx", "--data", "data.npz", "--batch-size", "3", "--metric", "picky:metric", "--json")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "error: right: samples 3 to 5: the metric 'picky:metric' raised ValueError: not this one",
        "error: right: samples 9 to 11: the metric 'picky:metric' returned NaN",
    ]
    (score,) = json.loads(result.stdout)["scores"]
    assert (score["samples"], score["metrics"]) == (6, {"metric": 7.0})


@pytest.mark.parametrize(("text", "how"), [(QONNX, "its fake quantization as Q/DQ"), (LONE, "optimisation off")])
def test_a_model_that_onnxruntime_refuses_is_run_all_the_same(folder: Path, text: str, how: str) -> None:
    onnx.save(onnx.parser.parse_model(text), folder / "refused.onnx")
    result = invoke("right.onnx", "refused.onnx", "--data", "data.npz", "--profile")
    assert "note         refused has no profile: onnxruntime cannot load the model" in result.stdout
    assert "where the time of right goes" in result.stdout
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"note         onnxruntime does not run refused as it is; it was measured with {how}" in result.stdout
    assert any(line.startswith("refused ") and "100.00" in line for line in result.stdout.splitlines())


def test_samples_that_fill_no_batch_are_told(folder: Path) -> None:
    result = invoke("fixed.onnx", "--data", "data.npz")
    assert "note         2 samples at the end of data.npz fill no batch of 5" in result.stdout


def test_both_speeds_are_told_where_batches_were_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    result = invoke("right.onnx", "--data", "data.npz", "--skip-batches", "2")
    (header,) = (line for line in result.stdout.splitlines() if "threads" in line)
    assert header.split("speed")[1].split() == ["all:", "/s", "all:", "ms"]


def test_a_report_on_the_last_model_can_be_had_as_well(folder: Path) -> None:
    words = ("--data", "data.npz", "--report", "report.json", "--batch-size", "4")
    result = invoke("right.onnx", "wrong.onnx", *words)
    assert result.exit_code == 0, result.output
    document = json.loads((folder / "report.json").read_text())
    assert (document["model"]["name"], document["reference"]["name"]) == ("wrong.onnx", "right.onnx")
    assert [row["figures"]["top-1"] for row in document["accuracy"]] == [100.0, 0.0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("right.onnx",), "give either --data or --random-data"),
        (("right.onnx", "--data", "data.npz", "--random-data"), "give either --data or --random-data"),
        (("right.onnx", "other.onnx", "--data", "data.npz"), "other takes image: float32"),
        (("right.onnx", "--data", "data.npz", "--metric", "topp"), "no metric is called 'topp'"),
        (("right.onnx", "--data", "data.npz", "--threads", "two"), "'two' is no list of numbers of threads"),
        (("right.onnx", "--data", "data.npz", "--max-drop", "lots"), "'lots' is no drop"),
        (("right.onnx", "--random-data", "--max-drop", "1%"), "--max-drop needs data with labels"),
        (("right.onnx", "--data", "data.npz", "--iterations", "2", "--skip-batches", "2"), "leave none"),
        (("right.onnx", "--data", "data.npz", "--report", "report.doc"), "cannot be written as '.doc'"),
        (("missing.onnx", "--data", "data.npz"), "missing.onnx"),
        (("right.onnx", "--data", "missing.npz"), "missing.npz"),
    ],
)
def test_mistakes_are_told_in_one_line(folder: Path, words: tuple[str, ...], message: str) -> None:
    result = invoke(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert message in line
