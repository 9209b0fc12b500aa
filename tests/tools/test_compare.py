"""``qat2int8 compare`` as a person sees it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support import REPOSITORY, parse
from typer.testing import CliRunner, Result

from qat2int8 import convert
from qat2int8.ir.io import save_model
from qat2int8.tools.cli import app

QAT = REPOSITORY / "tools" / "demo_data" / "resnet_trt_qat.onnx"
BAD = "/l/l.1/c1/Conv"
FLOAT = "g (float[N,2] x) => (float[N,2] y) <float two = {2}> { [a] t = Add (x, two) [m] y = Mul (t, two) }"
NAN = "g (float[N,2] x) => (float[N,2] y) <float two = {2}> { [a] t = Log (x) [m] y = Mul (t, two) }"
FIXED = FLOAT.replace("[N,2]", "[1,2]")
OTHER = "g (float[N,2] image) => (float[N,2] y) { y = Neg (image) }"
NET = """g (float[N,2] x) => (float[N,2] y) <float[2,2] w = {1, 0.5, 0.25, 0.125}> {
    [m] a = MatMul (x, w)  y = Relu (a) }"""
QOPERATOR = """g (float[N,2] x) => (float[N,2] y) <
    float s = {0.1}, uint8 z = {128}, float ws = {0.01}, int8[2,2] w = {100, 50, 25, 12}, int8 wz = {0},
    uint8 zero = {0}> {
    x_quantized = QuantizeLinear (x, s, z)
    [m_quant] y_quantized = QLinearMatMul (x_quantized, s, z, w, ws, wz, s, zero)
    y = DequantizeLinear (y_quantized, s, zero) }"""
"""What a quantizer makes of NET that calls nodes by names of its own."""
NOTHING = "g (float[N,2] x) => (float[N,2] y) { y = Identity (x) }"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled network, its conversion, the same with one weight scale doubled, and small float models."""
    path = tmp_path_factory.mktemp("compare")
    convert(QAT, verify="none").save(path / "int8.onnx")
    proto = onnx.load(path / "int8.onnx")
    (conv,) = (node for node in proto.graph.node if node.name == BAD)
    (reader,) = (node for node in proto.graph.node if conv.input[1] in node.output)
    (scale,) = (tensor for tensor in proto.graph.initializer if tensor.name == reader.input[1])
    proto.graph.initializer.append(numpy_helper.from_array(2 * numpy_helper.to_array(scale), "planted"))
    reader.input[1] = "planted"
    onnx.save(proto, path / "planted.onnx")
    with np.load(QAT.with_name("mnist500.npz")) as digits:
        image, labels = digits["images"][:8].astype(np.float32)[:, None] / 255.0, digits["labels"][:8]
        np.savez(path / "digits.npz", image=image)
        np.savez(path / "labelled.npz", image=image, labels=labels, wrong=(labels + 1) % 10)
        np.savez(path / "odd.npz", image=image, labels=labels + 90)
    for name, text in (("float", FLOAT), ("nan", NAN), ("fixed", FIXED), ("other", OTHER), ("nothing", NOTHING)):
        save_model(parse(text), path / f"{name}.onnx")
    save_model(parse(NET), path / "net.onnx")
    save_model(parse(QOPERATOR), path / "qoperator.onnx")
    np.savez(path / "positive.npz", x=np.ones((2, 2), np.float32))
    np.savez(path / "pairs.npz", x=np.asarray([[1, 2], [-3, 4], [5, 6]], np.float32))
    return path


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, words)])


def test_the_planted_layer_stands_first_with_what_to_try() -> None:
    result = invoke(QAT, "planted.onnx", "--data", "digits.npz")
    assert (result.exit_code, result.stderr) == (0, "")
    header, _, first, *rest = result.stdout.splitlines()
    assert header.split() == ["local", "whole", "cosine", "max", "mean", "off", "by", "1/2/3+", "layer"]
    assert first.endswith(f"Conv {BAD}") or BAD in first + rest[0]
    lines = {line[:13].strip(): line[13:] for line in rest}
    assert lines["layers"] == "17 of 17 have a counterpart in the reference"
    assert lines["samples"] == "8"
    assert lines["to try"] == f"qat2int8 convert {QAT} -o FILE --skip-node {BAD}"
    assert "... and 2 better layers (--verbose shows them)" in result.stdout
    assert "better layers" not in invoke(QAT, "planted.onnx", "--data", "digits.npz", "-v").stdout


def test_what_a_layer_in_float_gains_is_measured_and_a_broken_file_told() -> None:
    result = invoke(QAT, "planted.onnx", "--data", "digits.npz", "--try-skip", "1")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "left in float" in result.stdout
    assert "tried on     8 samples; '(none)' is the reference converted again" in result.stdout
    assert "it is not what qat2int8 makes of the reference now" in " ".join(result.stdout.split())
    assert "to try" not in result.stdout
    sound = invoke(QAT, "int8.onnx", "--data", "digits.npz", "--try-skip", "1")
    assert "it is not what qat2int8 makes" not in " ".join(sound.stdout.split())


def test_everything_as_json() -> None:
    words = ("--data", "digits.npz", "--json", "--try-skip", "1", "--sort", "end-to-end")
    document = json.loads(invoke(QAT, "planted.onnx", *words).stdout)
    assert (document["matched"], document["total"], document["samples"]) == (17, 17, 8)
    by_local = min(document["layers"], key=lambda layer: layer["local"]["sqnr_db"])
    assert by_local["name"] == BAD
    figures = [layer["end_to_end"]["sqnr_db"] for layer in document["layers"]]
    assert document["worst"][0] == document["layers"][figures.index(min(figures))]["name"]
    assert document["sort"] == "end-to-end"
    assert document["try_skip"]["trials"][0]["layer"] == document["worst"][0]


def test_made_up_inputs_span_the_trained_range() -> None:
    result = invoke(QAT, "planted.onnx", "--random-data", "--samples", "2", "--json")
    document = json.loads(result.stdout)
    assert (document["data"], document["samples"]) == ("made-up inputs", 2)
    assert document["worst"][0] == BAD


def test_some_samples_of_the_data() -> None:
    document = json.loads(invoke(QAT, "int8.onnx", "--data", "digits.npz", "--samples", "3", "--json").stdout)
    assert document["samples"] == 3


def test_with_labels_the_gain_is_told_in_points_too() -> None:
    words = (QAT, "int8.onnx", "--data", "labelled.npz", "--try-skip", "1")
    told = invoke(*words, "--json")
    document = json.loads(told.stdout)["try_skip"]
    assert document["samples"] == 8
    assert document["reference_metrics"]["top-1"] == 100.0
    (trial,) = document["trials"]
    assert trial["gain"] == trial["quality"]["metrics"]["top-1"] - document["whole"]["metrics"]["top-1"]
    # Labels that every answer is wrong by leave no gain to be had.
    other = json.loads(invoke(*words, "--labels", "wrong", "--json").stdout)["try_skip"]
    assert other["reference_metrics"]["top-1"] == 0.0
    f1 = json.loads(invoke(*words, "--metric", "f1", "--json").stdout)["try_skip"]
    assert f1["reference_metrics"] == {"f1": 100.0}
    lines = invoke(*words).stdout.splitlines()
    assert any(line.split()[:5] == ["output", "dB", "gain", "top-1", "gain"] for line in lines)
    assert "top-1        100.00 of the reference on the same samples" in lines


def test_labels_that_topk_cannot_judge_are_no_obstacle() -> None:
    words = (QAT, "int8.onnx", "--data", "odd.npz", "--try-skip", "1")
    result = invoke(*words)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "left in float" in result.stdout
    assert "note         answers are not judged: sample 0: label 90 is none of the model's 10" in result.stdout


def test_a_float_reference_is_quantized_again() -> None:
    result = invoke("net.onnx", "qoperator.onnx", "--data", "pairs.npz", "--try-skip", "1", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    (layer,) = document["layers"]
    assert (layer["name"], layer["source"]) == ("m_quant", "m")
    assert document["try_skip"]["calibrated"]
    (trial,) = document["try_skip"]["trials"]
    assert trial["layer"] == "m"
    assert trial["error"] == ""
    assert trial["gain_db"] is None or trial["gain_db"] > 20.0
    assert trial["quality"]["integer_macs_percent"] == 0.0
    said = invoke("net.onnx", "qoperator.onnx", "--data", "pairs.npz").stdout
    assert "qat2int8 quantize net.onnx --data pairs.npz -o FILE --skip-node m\n" in said


def test_what_cannot_be_quantized_again_is_told_in_one_line() -> None:
    result = invoke("nan.onnx", "float.onnx", "--data", "positive.npz", "--try-skip", "2")
    assert (result.exit_code, result.stderr) == (0, "")
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("--try-skip"))
    assert "the reference cannot be converted: " in line


def test_nothing_is_to_be_tried_where_nothing_differs() -> None:
    for words in ((), ("--try-skip", "2")):
        result = invoke("float.onnx", "float.onnx", "--data", "pairs.npz", *words)
        assert (result.exit_code, result.stderr) == (0, "")
        assert "to try       nothing: no layer differs" in result.stdout
        assert "--skip-node" not in result.stdout


def test_a_batch_that_crashes_ends_with_2_and_the_rest_is_told() -> None:
    result = invoke("float.onnx", "fixed.onnx", "--data", "pairs.npz", "--batch-size", "2")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: candidate: samples 0 to 1: onnxruntime cannot run")
    assert "samples      1" in result.stdout


def test_nan_ends_with_2_and_names_the_layer() -> None:
    result = invoke("float.onnx", "nan.onnx", "--data", "pairs.npz")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[0] == ("error: layer 'a': 1 values are NaN, or infinite in one model only")
    assert "samples      3" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("float.onnx", "nan.onnx"), "give either --data or --random-data"),
        (("float.onnx", "nan.onnx", "--data", "pairs.npz", "--random-data"), "give either --data"),
        (("float.onnx", "other.onnx", "--data", "pairs.npz"), "other takes image: float32"),
        (("float.onnx", "nothing.onnx", "--data", "pairs.npz"), "none of its 0 layers computes a tensor"),
        (("float.onnx", "nan.onnx", "--data", "pairs.npz", "--sort", "name"), "cannot be sorted by 'name'"),
        (("float.onnx", "missing.onnx", "--data", "pairs.npz"), "missing.onnx"),
        (("float.onnx", "nan.onnx", "--data", "pairs.npz", "--metric", "f1"), "give --try-skip N and --data"),
        (("float.onnx", "nan.onnx", "--random-data", "--try-skip", "1", "--labels", "a"), "give --try-skip N"),
        (("float.onnx", "nan.onnx", "--data", "pairs.npz", "--try-skip", "1", "--metric", "f2"), "called 'f2'"),
        (("float.onnx", "nan.onnx", "--data", "missing.npz"), "missing.npz"),
    ],
)
def test_mistakes_are_told_in_one_line(words: tuple[str, ...], message: str) -> None:
    result = invoke(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert message in line
