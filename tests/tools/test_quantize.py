"""``qat2int8 calibrate`` and ``quantize``: what they write and report, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from float_networks import convolutions, images
from typer.testing import CliRunner, Result

from qat2int8.pipelines.tables import read_table
from qat2int8.tools.cli import app


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and data, which is the current one."""
    onnx.save(convolutions(), tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", image=images(12), labels=np.zeros(12, np.int64))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def done(*words: object) -> str:
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def refused(*words: object) -> str:
    result = invoke(*words)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    return str(result.stderr)


CALIBRATE = ("calibrate", "model.onnx", "--data", "data.npz", "-o", "table.json")
QUANTIZE = ("quantize", "model.onnx", "-o", "int8.onnx", "--no-fidelity")


def test_calibrate_writes_a_table_and_says_so(place: Path) -> None:
    lines = done(*CALIBRATE).splitlines()
    assert lines[0] == "calibrated   5 tensors by entropy over 12 samples of data.npz"
    assert lines[1].startswith("written      table.json in ")
    table = read_table(place / "table.json")
    assert list(table.entries) == ["image", "relu1", "relu2", "sum", "mean"]
    assert "relu1" in done(*CALIBRATE, "--verbose")
    assert done(*CALIBRATE, "--quiet") == ""


def test_calibrate_as_json(place: Path) -> None:
    document = json.loads(done(*CALIBRATE, "--calibrator", "percentile{percent=99.0}", "--samples", 5, "--json"))
    assert (document["algorithm"], document["samples"]) == ("percentile{percent=99.0}", 5)
    assert set(document["tensors"]["image"]) == {"lo", "hi", "amax"}


def test_shards_merge_to_the_whole(place: Path) -> None:
    done(*CALIBRATE[:-1], "whole.json", "--keep-statistics")
    for part in (1, 2, 3):
        done(*CALIBRATE[:-1], f"part{part}.json", "--shard", f"{part}/3")
    done("table", "merge", "part2.json", "part3.json", "part1.json", "-o", "merged.json")
    assert read_table(place / "merged.json") == read_table(place / "whole.json")


def test_quantize_on_data_on_a_table_and_with_a_cache(place: Path) -> None:
    text = done("quantize", "model.onnx", "--data", "data.npz", "-o", "int8.onnx")
    assert "dB against the float model" in text
    assert "(data.npz inputs: 12)" in text
    assert "calibrated   5 tensors by entropy over 12 samples" in text
    assert "left float   no Conv, Gemm or MatMul" in text
    done(*CALIBRATE)
    done(*QUANTIZE[:3], "table.onnx", "--table", "table.json", "--no-fidelity")
    one, other = (onnx.load(place / name).graph for name in ("int8.onnx", "table.onnx"))
    assert one.SerializeToString(deterministic=True) == other.SerializeToString(deterministic=True)

    cached = (*QUANTIZE, "--data", "data.npz", "--table", "cache.json")
    assert "calibrating  cache.json: there is no table yet" in done(*cached)
    (place / "data.npz").rename(place / "hidden.npz")
    assert "calibrating" not in done(*cached[:-4], "--table", "cache.json", "--data", "hidden.npz")
    assert "it was made by 'entropy'" in done(
        *cached[:-4], "--table", "cache.json", "--data", "hidden.npz", "--calibrator", "mse"
    )
    assert read_table(place / "cache.json").algorithm == "mse"


def test_options_reach_the_model(place: Path) -> None:
    document = json.loads(
        done(
            *QUANTIZE,
            "--data",
            "data.npz",
            "--skip-first-conv",
            "--keep-fp32-weights",
            "--bias-correction",
            "--json",
        )
    )
    in_float = [one["node"] for one in document["certificate"]["compute"] if not one["integer"]]
    assert in_float == ["conv1"]
    assert document["calibration"] == {"algorithm": "entropy", "samples": 12, "tensors": 5}
    weights = {tensor.name: tensor.data_type for tensor in onnx.load(place / "int8.onnx").graph.initializer}
    assert weights["gemm.weight"] == onnx.TensorProto.FLOAT
    assert "correct-weight-bias" in document["pipeline"]
    done(*QUANTIZE, "--data", "data.npz", "--per-tensor", "--symmetric", "--require-int8", 100)
    assert invoke(*QUANTIZE, "--data", "data.npz", "--skip-first-conv", "--require-int8", 100).exit_code == 1


def test_a_configuration_says_everything_and_the_command_line_comes_first(place: Path) -> None:
    (place / "ptq.yaml").write_text(
        "model: model.onnx\noutput: from_config.onnx\ndata: data.npz\ncalibrator: mse\nsamples: 4\n"
    )
    document = json.loads(done("quantize", "--config", "ptq.yaml", "--no-fidelity", "--json"))
    assert document["output"] == "from_config.onnx"
    assert document["calibration"] == {"algorithm": "mse", "samples": 4, "tensors": 5}
    words = ("--calibrator", "entropy", "-o", "other.onnx")
    document = json.loads(done("quantize", "--config", "ptq.yaml", "--no-fidelity", "--json", *words))
    assert (document["output"], document["calibration"]["algorithm"]) == ("other.onnx", "entropy")
    assert document["calibration"]["samples"] == 4


def test_a_table_of_another_model_can_be_trusted(place: Path) -> None:
    done(*CALIBRATE)
    onnx.save(convolutions(seed=1), place / "model.onnx")
    assert "made for another model" in refused(*QUANTIZE, "--table", "table.json")
    done(*QUANTIZE, "--table", "table.json", "--trust-table")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("quantize",), "no model was given"),
        (("quantize", "model.onnx"), "no output was given"),
        ((*QUANTIZE,), "neither data nor a table"),
        ((*QUANTIZE, "--data", "none.npz"), "none.npz"),
        ((*QUANTIZE, "--table", "none.json"), "none.json: no such file"),
        ((*QUANTIZE, "--data", "data.npz", "--calibrator", "KL"), "did you mean 'entropy'"),
        ((*QUANTIZE, "--config", "none.yaml"), "none.yaml: cannot be read"),
        ((*CALIBRATE, "--shard", "5"), "'5' is not a part of all"),
        ((*CALIBRATE, "--shard", "5/3"), "there is no shard 5 of 3"),
        ((*CALIBRATE, "--resume"), "table.json.part: there is nothing to go on from"),
    ],
)
def test_mistakes_are_told_in_one_line(place: Path, words: tuple[str, ...], message: str) -> None:
    assert message in refused(*words)
    assert not (place / "int8.onnx").exists()
    assert not (place / "table.json").exists()


def test_a_bad_sample_keeps_what_came_before_it(place: Path) -> None:
    data = images(12)
    data[7] *= 1e38
    np.savez(place / "data.npz", image=data)
    error = refused(*CALIBRATE)
    assert "sample 7, tensor 'relu1': the tensor holds a NaN or an infinity" in error
    assert "7 samples are kept in table.json.part: rerun with --resume" in error
    np.savez(place / "data.npz", image=images(12))
    done(*CALIBRATE, "--resume", "--keep-statistics")
    resumed = read_table(place / "table.json")
    assert not (place / "table.json.part").exists()
    done(*CALIBRATE, "--keep-statistics")
    assert resumed == read_table(place / "table.json")


SLOW = """
import time
import numpy as np
def batches():
    rng = np.random.default_rng(0)
    for index in range(1000):
        if index == 3:
            open("started", "w").close()
        time.sleep(0.02)
        yield {"image": rng.normal(size=(1, 2, 8, 8)).astype(np.float32)}
"""


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_seen(place: Path) -> None:
    (place / "slow.py").write_text(SLOW)
    words = ["calibrate", "model.onnx", "--data", "slow:batches", "-o", "table.json"]
    process = subprocess.Popen([sys.executable, "-m", "qat2int8", *words], stderr=subprocess.PIPE, text=True)
    while not (place / "started").exists() and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in error
    assert "samples are kept in table.json.part" in error
    assert read_table(place / "table.json.part").samples >= 3


def test_a_report_on_the_result_is_measured_on_the_data(place: Path) -> None:
    text = done(*QUANTIZE, "--data", "data.npz", "--report", "report.md")
    assert text.splitlines()[-1].startswith("report       report.md, ")
    report = (place / "report.md").read_text()
    assert "| model | 12 |" in report
    assert "| int8 | 12 |" in report
    assert "## The layers with the largest error" in report


@pytest.mark.parametrize(
    ("name", "reason"), [("report.txt", "'.txt'"), ("ranges.json", "would replace a file of this command")]
)
def test_a_report_that_cannot_be_written_is_refused_first(place: Path, name: str, reason: str) -> None:
    table = ("--data", "data.npz", "--table", "ranges.json")
    assert reason in refused(*QUANTIZE, *table, "--report", name)
    assert {path.name for path in place.iterdir()} == {"model.onnx", "data.npz"}
