"""Models of real exporters: each converts or is refused in one line, and what converts answers as it should.

The folder, named by the environment variable ``QAT2INT8_ZOO``, holds ``NAME.onnx`` with ``NAME.npz`` beside it:
inputs ``input_0``..., outputs of the training framework ``output_0``..., and ``labels`` where there are classes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import run
from typer.testing import CliRunner

from qat2int8.ir import Qat2Int8Error
from qat2int8.ir.io import load_model
from qat2int8.pipelines.convert import convert
from qat2int8.pipelines.exporters import exporter_of
from qat2int8.pipelines.sessions import deployed_session, session
from qat2int8.pipelines.target_files import load_target, target_names
from qat2int8.tools.cli import app

pytestmark = pytest.mark.zoo

ZOO = os.environ.get("QAT2INT8_ZOO", "")
MODELS = sorted(Path(ZOO).glob("*.onnx")) if ZOO else []

ALLOWED_POINTS = 0.3
"""How far top-1 may be from that of the training framework, in percentage points; one image of 360 is 0.28."""

FAITHFUL = 99.9
"""Per cent of the integers within 1 LSB of the file's, each computed from the file's own values before it."""

LESS_FAITHFUL = {
    # A grid in front of a bias or a BatchNormalization and another one behind it: one kernel takes in what lies
    # between and applies the second only.
    "pt2e_encoder_x86": 98.0,
    "tao_eager_lenet_unfused_s8_ts": 99.0,
    # The file's own saturation, from ranges measured in front of a BatchNormalization that was folded since, is
    # left out: the framework has none, and answers as the result does.
    "paddle_imp_lenet_pc": 99.5,
    "paddle_imp_lenet_pt": 99.5,
    "paddle_imp_mobilenet_pc": 95.0,
    # Tensors that training left in float lie on derived grids.
    "mopt_resnet_int8": 99.5,
    # Most of attention stays in float, on fewer grids than it was trained with.
    "mopt_encoder_int8": 96.5,
    "mopt_encoder_smooth": 88.0,
}
"""Models of which less is to be had, and why."""


@pytest.mark.skipif(not MODELS, reason="QAT2INT8_ZOO names no folder with models")
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_model(path: Path, tmp_path: Path) -> None:
    document = _converted(path, tmp_path, "ort-x86", ALLOWED_POINTS)
    levels = None if document is None else document["fidelity"]["local_levels"]
    if levels is not None:
        assert levels["within_one_percent"] >= LESS_FAITHFUL.get(path.stem, FAITHFUL), levels


SAMPLED = 24
"""Every so many models one is converted for the other targets where all of them would take too long."""

POINTS_ON_OTHER_TARGETS = 1.0
"""How far top-1 may be there: TensorRT has half the levels behind a Relu that was trained on uint8."""


@pytest.mark.skipif(not MODELS, reason="QAT2INT8_ZOO names no folder with models")
@pytest.mark.parametrize("target", [name for name in target_names() if name != "ort-x86"])
@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=() if i % SAMPLED == 0 else pytest.mark.slow) for i, p in enumerate(MODELS)],
    ids=lambda path: path.stem,
)
def test_model_on_other_targets(path: Path, target: str, tmp_path: Path) -> None:
    _converted(path, tmp_path, target, POINTS_ON_OTHER_TARGETS, "--no-fidelity")


def _converted(path: Path, tmp_path: Path, target: str, points: float, *words: str) -> dict[str, Any] | None:
    """What ``convert`` tells, after its result was run; None for a model that was refused as it should be."""
    output = tmp_path / "int8.onnx"
    command = ["convert", str(path), "-o", str(output), "--target", target, "--json", *words]
    result = CliRunner().invoke(app, command)
    if result.exit_code != 0:
        assert result.exit_code == 2
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"error: {path}: ")
        assert line.endswith(")")
        assert "--debug" not in line
        assert not list(tmp_path.iterdir())
        return None
    assert result.stderr == ""
    # npz files of this kind hold nothing but arrays of numbers and names.
    with np.load(path.with_suffix(".npz")) as data:
        stored = {key: data[key] for key in data.files}
    session = deployed_session(load_target(target), output)
    feeds = {value.name: stored[f"input_{index}"] for index, value in enumerate(session.get_inputs())}
    outputs = session.run(None, feeds)
    assert all(np.isfinite(each).all() for each in outputs if each.dtype.kind == "f")
    if "labels" in stored:
        moved = _top1(outputs[0], stored["labels"]) - _top1(stored["output_0"], stored["labels"])
        assert abs(moved) <= points
    document: dict[str, Any] = json.loads(result.stdout)
    return document


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


@pytest.mark.slow
@pytest.mark.skipif(not MODELS, reason="QAT2INT8_ZOO names no folder with models")
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_without_vnni_the_runtime_as_it_comes_computes_what_it_does_with_it(path: Path) -> None:
    try:
        vnni, avx2 = (convert(path, target=target).model.to_proto() for target in ("ort-x86", "ort-x86-avx2"))
    except Qat2Int8Error:
        pytest.skip("is refused")
    plain = session(avx2.SerializeToString(), threads=1)
    with np.load(path.with_suffix(".npz")) as data:
        feeds = {value.name: data[f"input_{index}"] for index, value in enumerate(plain.get_inputs())}
    for there, here in zip(run(vnni, feeds, optimize=True), plain.run(None, feeds), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-5 * np.abs(there).max())


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


WIDE = [
    path
    for path in MODELS
    if path.stem
    in {
        "hand_i16_op21",
        "hand_ms_domain_u16",
        "hand_u16_op21",
        "ort_lenet_qdq_s16s8",
        "ort_lenet_qdq_u16s8_ms",
        "quark_resnet_a16w8",
    }
]
"""Models whose activations lie on 16-bit grids."""


@pytest.mark.skipif(not WIDE, reason="QAT2INT8_ZOO names no folder with such models")
@pytest.mark.parametrize("path", WIDE, ids=lambda path: path.stem)
def test_16_bits_on_8_answer_as_well_and_run_in_integers(path: Path) -> None:
    with pytest.raises(Qat2Int8Error, match="--narrow-16-bit"):
        convert(path)
    conversion = convert(path, narrow_16_bit=True)
    assert conversion.certificate.integer_macs_percent == 100
    with np.load(path.with_suffix(".npz")) as data:
        stored = {key: data[key] for key in data.files}
    (source,) = conversion.model.graph.inputs
    answers = run(conversion.model, {source.name or "": stored["input_0"]}, optimize=True)[0]
    moved = _top1(answers, stored["labels"]) - _top1(stored["output_0"], stored["labels"])
    assert abs(moved) <= 0.3
