"""``qat2int8 demo``: the bundled network, converted and measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qat2int8.tools.cli import app

MODELS = ["float", "fake quant, as exported", "int8, converted", "int8, post-training"]


def test_demo_measures_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat2int8.tools.demo._ROUNDS", 2)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    for name in MODELS:
        assert sum(line.startswith(name) for line in lines) == 1
    assert any(line.startswith("certificate  100.0 % of ") for line in lines)
    assert sum(line.startswith("fidelity ") for line in lines) == 1
    assert "left float   no Conv, Gemm or MatMul" in lines


def test_demo_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat2int8.tools.demo._ROUNDS", 1)
    document = json.loads(CliRunner().invoke(app, ["demo", "--json"]).stdout)
    assert [row["model"] for row in document["rows"]] == MODELS
    top1 = {row["model"]: float(row["top-1"].split()[0]) for row in document["rows"]}
    assert top1["int8, converted"] >= top1["fake quant, as exported"] - 0.5
    assert top1["int8, post-training"] >= top1["float"] - 0.5
    assert document["certificate"]["integer_macs_percent"] == 100.0
    assert document["fidelity"]["samples"] == 500


def test_demo_can_be_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat2int8.tools.demo._ROUNDS", 1)
    result = CliRunner().invoke(app, ["demo", "--quiet"])
    assert (result.exit_code, result.output) == (0, "")


def test_demo_keeps_its_models_and_a_report_if_told_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("qat2int8.tools.demo._ROUNDS", 1)
    result = CliRunner().invoke(app, ["demo", "-o", str(tmp_path / "kept")])
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1].startswith(f"report       {tmp_path / 'kept' / 'report.html'}, ")
    names = {path.name for path in (tmp_path / "kept").iterdir()}
    assert names == {"resnet_int8.onnx", "resnet_calibrated.onnx", "digits.npz", "report.html"}
    text = (tmp_path / "kept" / "report.html").read_text(encoding="utf-8").replace("<wbr>", "")
    for model in ("resnet_trt_qat", "resnet_trt_fp32", "resnet_calibrated", "resnet_int8"):
        assert text.count(f'<td class="name">{model}</td>') == 2  # its answers and its speed
    assert 'id="errors"' in text


def test_demo_refuses_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    result = CliRunner().invoke(app, ["demo", "-o", str(tmp_path / "taken")])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "taken: cannot be made" in result.stderr
