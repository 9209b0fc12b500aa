"""Models of real exporters: each converts or is refused in one line, and what converts still answers right.

The folder, named by the environment variable ``QAT2INT8_ZOO``, holds ``NAME.onnx`` with ``NAME.npz`` beside it:
inputs ``input_0``..., outputs of the training framework ``output_0``..., and ``labels`` where there are classes.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from support import run
from typer.testing import CliRunner

from qat2int8.ir import Qat2Int8Error
from qat2int8.ir.io import load_model
from qat2int8.pipelines.convert import convert
from qat2int8.pipelines.exporters import exporter_of
from qat2int8.tools.cli import app

pytestmark = pytest.mark.zoo

ZOO = os.environ.get("QAT2INT8_ZOO", "")
MODELS = sorted(Path(ZOO).glob("*.onnx")) if ZOO else []

ALLOWED_POINTS = 1.0
"""How far top-1 may be from that of the training framework, in percentage points."""

EXCEPTIONS = {
    # The grid behind the Relu begins below zero; put on a grid that begins at zero it saturates later, and this
    # network, hardly trained, answers at less than 50 %.
    "tf_qat_deconv": 3.0,
    "tflite_deconv": 3.0,
}
"""Models whose answers may move farther, and why."""


@pytest.mark.skipif(not MODELS, reason="QAT2INT8_ZOO names no folder with models")
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_model(path: Path, tmp_path: Path) -> None:
    output = tmp_path / "int8.onnx"
    result = CliRunner().invoke(app, ["convert", str(path), "-o", str(output)])
    if result.exit_code != 0:
        assert result.exit_code == 2
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"error: {path}: ")
        assert line.endswith(")")
        assert "--debug" not in line
        assert not list(tmp_path.iterdir())
        return
    assert result.stderr == ""
    # npz files of this kind hold nothing but arrays of numbers and names.
    with np.load(path.with_suffix(".npz")) as data:
        stored = {key: data[key] for key in data.files}
    session = _session(output)
    feeds = {value.name: stored[f"input_{index}"] for index, value in enumerate(session.get_inputs())}
    outputs = session.run(None, feeds)
    assert all(np.isfinite(each).all() for each in outputs if each.dtype.kind == "f")
    if "labels" in stored:
        moved = _top1(outputs[0], stored["labels"]) - _top1(stored["output_0"], stored["labels"])
        assert abs(moved) <= EXCEPTIONS.get(path.stem, ALLOWED_POINTS)


@pytest.mark.slow
@pytest.mark.skipif(not MODELS, reason="QAT2INT8_ZOO names no folder with models")
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_both_formats_compute_the_same(path: Path) -> None:
    try:
        forms = [convert(path, format=format_) for format_ in ("qdq", "qoperator")]
    except Qat2Int8Error:
        pytest.skip("is refused")
    with np.load(path.with_suffix(".npz")) as data:
        names = [value.name or "" for value in forms[0].model.graph.inputs]
        feeds = {name: data[f"input_{index}"] for index, name in enumerate(names)}
    for left, right in zip(*(run(form.model, feeds, optimize=True) for form in forms), strict=True):
        np.testing.assert_array_equal(left, right)
    assert forms[0].certificate.executed == forms[1].certificate.executed
    assert forms[0].certificate.integer_macs_percent == forms[1].certificate.integer_macs_percent


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _top1(logits: np.ndarray, labels: np.ndarray) -> float:
    return 100.0 * float((logits.argmax(-1) == labels).mean())


EXPORTERS = {
    "brev": "Brevitas",
    "hand": "",
    "mopt": "NVIDIA Model Optimizer",
    "nncf": "NNCF",
    "ort": "onnxruntime quantize_static",
    "paddle": "PaddlePaddle",
    "pt2e": "PyTorch PT2E",
    "quark": "AMD Quark",
    "tao": "PyTorch",
    "tf": "TensorFlow",
    "tflite": "TensorFlow",
}
"""By the first word of a model's name."""


@pytest.mark.skipif(not MODELS, reason="QAT2INT8_ZOO names no folder with models")
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_the_exporter_is_recognised(path: Path) -> None:
    expected = EXPORTERS[path.stem.split("_")[0]]
    found = exporter_of(load_model(path))
    assert found == expected or (expected == "PyTorch" and found.startswith(expected))
