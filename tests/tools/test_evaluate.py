"""``qat2int8 evaluate`` as a person sees it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
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


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in (("right", RIGHT), ("wrong", WRONG), ("other", OTHER), ("in_graph", IN_GRAPH)):
        save_model(parse(text), tmp_path / f"{name}.onnx")
    labels = np.arange(12) % 3
    np.savez(tmp_path / "data.npz", x=np.eye(3, dtype=np.float32)[labels], labels=labels, shifted=(labels + 1) % 3)
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
