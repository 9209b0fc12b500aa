"""``qat2int8 convert``: what it writes, what it reports, how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from support import REPOSITORY
from typer.testing import CliRunner, Result

from qat2int8.pipelines.benchmarking import networks
from qat2int8.pipelines.benchmarking.fake_quant import images
from qat2int8.pipelines.spec import PipelineSpec
from qat2int8.tools.cli import app

INTEGERS = {"QuantizeLinear", "DequantizeLinear"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small residual network, every Conv and Gemm with fake quant on its inputs."""
    path = tmp_path_factory.mktemp("source") / "model.onnx"
    onnx.save(networks.tiny_resnet(), path)
    return path


def invoke(source: Path, folder: Path, *words: object) -> Result:
    command = ["convert", str(source), "-o", str(folder / "int8.onnx"), *map(str, words)]
    return CliRunner().invoke(app, command)


def converted(source: Path, folder: Path, *words: object) -> onnx.ModelProto:
    result = invoke(source, folder, *words)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return onnx.load(folder / "int8.onnx")


def options(model: onnx.ModelProto) -> str:
    """The pipeline that is stamped into ``model``."""
    return next(entry.value for entry in model.metadata_props if entry.key == "qat2int8.pipeline")


def nodes_in_float(model: onnx.ModelProto) -> set[str]:
    """Conv and Gemm nodes whose weight is in float."""
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    return {
        node.name
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm") and makers.get(node.input[1]) != "DequantizeLinear"
    }


def answers(path: Path) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    shape = session.get_inputs()[0].shape
    (result,) = session.run(None, {session.get_inputs()[0].name: images(8, shape[2])})
    return np.asarray(result)


# -- the report -------------------------------------------------------------------------------------------------


def test_the_report(source: Path, tmp_path: Path) -> None:
    result = invoke(source, tmp_path)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["op", "before", "after"]
    labels = [line.split()[0] for line in lines if line and not line.startswith((" ", "─"))]
    assert labels[-6:] == ["certificate", "fidelity", "overflow", "size", "written", "left"]
    assert any(line.startswith("certificate  100.0 % of ") for line in lines)
    assert "left float   no Conv, Gemm or MatMul" in lines
    assert result.stderr == ""


@pytest.mark.parametrize("overflows", [False, True])
def test_the_report_says_where_products_overflow(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overflows: bool
) -> None:
    monkeypatch.setattr("qat2int8.pipelines.exact_products.products_overflow", lambda: overflows)
    lines = invoke(source, tmp_path, "--no-fidelity").stdout.splitlines()
    (index,) = (i for i, line in enumerate(lines) if line.startswith("overflow "))
    assert lines[index].endswith("on x86 processors without VNNI: wrong numbers")
    assert ("and this is one of them" in lines[index + 1]) == overflows
    assert "overflow" not in invoke(source, tmp_path, "--no-fidelity", "--target", "ort-x86-avx2").stdout


def test_op_types_that_did_not_change_share_a_row(source: Path, tmp_path: Path) -> None:
    def rows(*words: str) -> dict[str, list[str]]:
        text = invoke(source, tmp_path, *words).stdout.split("\n\n")[0]
        split = [line.rsplit(maxsplit=2) for line in text.splitlines()[2:]]
        return {name: counts for name, *counts in split}

    short, full = rows(), rows("-v")
    assert all(before != after for name, (before, after) in short.items() if not name.endswith("others"))
    (others,) = (name for name in short if name.endswith("others"))
    assert not any(name.endswith("others") for name in full)
    unchanged = [counts for name, counts in full.items() if counts[0] == counts[1] and name != "all"]
    assert others == f"{len(unchanged)} others"
    assert int(short[others][0]) == sum(int(counts[0]) for counts in unchanged)
    assert short["all"] == full["all"]


@pytest.mark.parametrize("columns", [80, 60, 30])
def test_the_report_fits_the_terminal(
    source: Path, tmp_path: Path, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    result = invoke(source, tmp_path, "--skip-node", "*")
    assert result.exit_code == 0, result.output
    told = [
        line for line in result.stdout.splitlines() if not line.startswith(("written", "certificate", "fidelity"))
    ]
    assert max(map(len, told)) <= max(columns, 60)
    assert "\x1b" not in result.stdout


def test_what_stayed_float_is_told_by_reason(source: Path, tmp_path: Path) -> None:
    names = [node.name for node in networks.tiny_resnet().graph.node if node.op_type == "Conv"]
    lines = invoke(source, tmp_path, "--skip-node", names[1], "--skip-node", names[2]).stdout.splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("left float"))
    told = " ".join(line.strip() for line in lines[at:])
    assert told.count("left in float as asked") == 1
    assert f"{names[1]} (" in told
    assert f"{names[2]} (" in told


def test_verbose_tells_notes_and_every_node(tmp_path: Path) -> None:
    proto = networks.tiny_resnet()
    # The habit of IR version 3: a note for each.
    for tensor in proto.graph.initializer:
        proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.save(proto, tmp_path / "model.onnx")
    plain, verbose = (
        invoke(tmp_path / "model.onnx", tmp_path, "--skip-node", "*", *words).stdout for words in ((), ("-v",))
    )
    assert " note: " in verbose
    assert " note: " not in plain
    assert "and 1 more (--verbose shows them)" in " ".join(plain.split())
    assert "--verbose" not in verbose


def test_quiet_says_nothing(source: Path, tmp_path: Path) -> None:
    result = invoke(source, tmp_path, "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert (tmp_path / "int8.onnx").exists()


def test_json(source: Path, tmp_path: Path) -> None:
    result = invoke(source, tmp_path, "--json", "--fp32-out", tmp_path / "fp32.onnx", "--skip-node", "Gemm_*")
    assert result.stderr == ""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    document = json.loads(result.stdout, parse_constant=refuse)
    assert set(document) == {
        "source",
        "output",
        "fp32_output",
        "report",
        "calibration",
        "target",
        "pipeline",
        "seconds",
        "bytes",
        "nodes",
        "certificate",
        "fidelity",
        "diagnostics",
        "requirement_met",
    }
    assert document["source"] == str(source)
    assert document["output"] == str(tmp_path / "int8.onnx")
    assert document["fp32_output"] == str(tmp_path / "fp32.onnx")
    assert document["target"] == "ort-x86"
    written = onnx.load(tmp_path / "int8.onnx")
    assert document["pipeline"] == options(written)
    assert document["bytes"] == {
        "before": source.stat().st_size,
        "after": (tmp_path / "int8.onnx").stat().st_size,
    }
    assert sum(document["nodes"]["after"].values()) == len(written.graph.node)
    assert 99.0 < document["certificate"]["integer_macs_percent"] < 100.0
    assert len(document["certificate"]["compute"]) == sum(
        node.op_type in ("Conv", "Gemm") for node in written.graph.node
    )
    assert document["fidelity"]["outputs"][0]["name"] == written.graph.output[0].name
    assert {"code", "severity", "reason", "node", "value", "remedy", "pass_name"} == set(
        document["diagnostics"][0]
    )
    assert document["requirement_met"] is True


def test_json_has_no_infinity(tmp_path: Path) -> None:
    """Nothing is quantized, so that both models compute the same."""
    onnx.save(networks.tiny_resnet(), tmp_path / "model.onnx")
    result = invoke(tmp_path / "model.onnx", tmp_path, "--json", "--pipeline", "cleanup")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["fidelity"]["outputs"][0]["sqnr_db"] is None
    assert document["fidelity"]["outputs"][0]["max_error"] == 0.0
    plain = invoke(tmp_path / "model.onnx", tmp_path, "--pipeline", "cleanup").stdout
    assert "fidelity     identical to the fake-quant model" in plain


def test_without_fidelity(source: Path, tmp_path: Path) -> None:
    assert "\nfidelity " not in invoke(source, tmp_path, "--no-fidelity").stdout
    assert json.loads(invoke(source, tmp_path, "--no-fidelity", "--json").stdout)["fidelity"] is None


def test_poor_fidelity_is_doubted(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doubt = "low: measure it on your data"
    assert doubt not in invoke(source, tmp_path).stdout
    monkeypatch.setattr("qat2int8.tools.convert._DOUBTFUL_DB", 200.0)
    assert doubt in invoke(source, tmp_path).stdout


def test_inputs_that_cannot_be_made_up_are_no_failure(tmp_path: Path) -> None:
    """A second input that must hold the sizes of the first: random numbers are none."""
    proto = networks.tiny_resnet()
    result = proto.graph.output[0].name
    proto.graph.input.append(onnx.helper.make_tensor_value_info("shape", onnx.TensorProto.INT64, [3]))
    proto.graph.node.append(onnx.helper.make_node("Reshape", [result, "shape"], ["reshaped"], name="reshape"))
    del proto.graph.output[:]
    proto.graph.output.append(
        onnx.helper.make_tensor_value_info("reshaped", onnx.TensorProto.FLOAT, ["a", "b", "c"])
    )
    onnx.save(proto, tmp_path / "model.onnx")
    told = invoke(tmp_path / "model.onnx", tmp_path)
    assert told.exit_code == 0, told.output
    assert "fidelity     not measured on synthetic inputs" in told.stdout
    assert json.loads(invoke(tmp_path / "model.onnx", tmp_path, "--json").stdout)["fidelity"] is None


def test_a_share_is_not_rounded_up_to_all() -> None:
    from qat2int8.pipelines.figures import as_percent

    assert as_percent(100.0) == "100.0 %"
    assert as_percent(99.99) == "99.9 %"
    assert as_percent(0.0) == "0.0 %"


# -- what is converted ------------------------------------------------------------------------------------------


def test_the_result_is_close_to_its_source(source: Path, tmp_path: Path) -> None:
    model = converted(source, tmp_path)
    assert nodes_in_float(model) == set()
    expected, actual = answers(source), answers(tmp_path / "int8.onnx")
    assert np.square(actual - expected).sum() < 1e-2 * np.square(expected).sum()


def test_fp32_out_is_the_float_model(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path, "--fp32-out", tmp_path / "fp32.onnx")
    plain = onnx.load(tmp_path / "fp32.onnx")
    kinds = {node.op_type for node in plain.graph.node}
    assert not kinds & {*INTEGERS, "BatchNormalization"}
    without = onnx.load(source)
    _drop_activation_fakes(without)
    onnx.save(without, tmp_path / "without.onnx")
    expected = answers(tmp_path / "without.onnx")
    np.testing.assert_allclose(answers(tmp_path / "fp32.onnx"), expected, rtol=1e-4, atol=1e-4)
    assert not np.allclose(expected, answers(source), rtol=1e-4, atol=1e-4)


def _drop_activation_fakes(model: onnx.ModelProto) -> None:
    """Let every node read past the pairs that stand on no initializer."""
    constants = {tensor.name for tensor in model.graph.initializer}
    makers = {node.output[0]: node for node in model.graph.node}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            pair = makers.get(name)
            if pair is not None and pair.op_type == "DequantizeLinear" and node.op_type != "QuantizeLinear":
                original = makers[pair.input[0]].input[0]
                if original not in constants:
                    node.input[index] = original


def test_quantize_ops(source: Path, tmp_path: Path) -> None:
    model = converted(source, tmp_path, "--quantize-ops", "Gemm", "--on-missing-scale", "float")
    convs = {node.name for node in model.graph.node if node.op_type == "Conv"}
    assert nodes_in_float(model) == convs
    both = converted(source, tmp_path, "--quantize-ops", " Gemm, Conv,", "--on-missing-scale", "float")
    assert nodes_in_float(both) == set()


def test_on_missing_scale(tmp_path: Path) -> None:
    proto = networks.tiny_resnet(bn_folded=True)
    (gemm,) = (node for node in proto.graph.node if node.op_type == "Gemm")
    pair = next(node for node in proto.graph.node if node.output[0] == gemm.input[0])
    quantize = next(node for node in proto.graph.node if node.output[0] == pair.input[0])
    gemm.input[0] = quantize.input[0]
    proto.graph.node.remove(pair)
    proto.graph.node.remove(quantize)
    onnx.save(proto, tmp_path / "model.onnx")
    words = ("--quantize-ops", "Conv,Gemm")
    result = invoke(tmp_path / "model.onnx", tmp_path, *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert not (tmp_path / "int8.onnx").exists()
    (line,) = result.stderr.splitlines()
    assert "scale" in line or "grid" in line
    converted(tmp_path / "model.onnx", tmp_path, *words, "--on-missing-scale", "float")


def test_skip_node_takes_names_and_patterns(source: Path, tmp_path: Path) -> None:
    convs = [node.name for node in onnx.load(source).graph.node if node.op_type == "Conv"]
    model = converted(source, tmp_path, "--skip-node", convs[0], "--skip-node", f"{convs[-1][:-1]}*")
    left = nodes_in_float(model)
    assert {convs[0], convs[-1]} <= left
    assert len(left) < len(convs)


@pytest.mark.parametrize("encoding", ["same-grid", "refine", "exact"])
def test_relu_encoding(source: Path, tmp_path: Path, encoding: str) -> None:
    model = converted(source, tmp_path, "--relu-encoding", encoding)
    assert f"encoding={encoding}" in options(model) or f"encoding: {encoding}" in options(model)


def test_exact_weights(source: Path, tmp_path: Path) -> None:
    words = ("--relu-encoding", "refine")
    assert "centre-weights{exact=true}" in options(converted(source, tmp_path, "--exact-weights", *words))
    assert "centre-weights{" not in options(converted(source, tmp_path, *words))


def test_the_relu_encodings_differ(source: Path, tmp_path: Path) -> None:
    results = []
    for encoding in ("same-grid", "refine"):
        converted(source, tmp_path, "--relu-encoding", encoding)
        results.append(answers(tmp_path / "int8.onnx"))
    assert not np.array_equal(*results)


def test_format(source: Path, tmp_path: Path) -> None:
    model = converted(source, tmp_path, "--format", "qoperator")
    assert "lower-to-qoperators{format=qoperator}" in options(model)
    assert {"QLinearConv", "QLinearAdd", "QGemm"} <= {node.op_type for node in model.graph.node}
    certificates = [
        line
        for words in ((), ("--format", "qoperator"))
        for line in invoke(source, tmp_path, *words).stdout.splitlines()
        if line.startswith(("certificate", "left float"))
    ]
    assert len(certificates) == 4
    assert certificates[:2] == certificates[2:]


def test_formats_that_are_none_or_not_for_the_target(source: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    text = (REPOSITORY / "pipelines" / "targets" / "ort-x86.yaml").read_text()
    own.write_text(text.replace("name: ort-x86", "name: own").replace("formats: [qdq, qoperator]\n", ""))
    for words, told in (
        (("--format", "tflite"), "expects one of qdq, qoperator, not tflite"),
        (("--format", "qoperator", "--target", own), "own does not read the format qoperator (it reads qdq)"),
    ):
        result = invoke(source, tmp_path, *words)
        assert result.exit_code == 2
        assert told in result.stderr
        assert not (tmp_path / "int8.onnx").exists()


def test_pipeline_by_name_file_and_text(source: Path, tmp_path: Path) -> None:
    by_name = converted(source, tmp_path, "--pipeline", "qat-to-int8")
    text = options(by_name)
    by_text = converted(source, tmp_path, "--pipeline", text)
    (tmp_path / "mine.yaml").write_text(PipelineSpec.parse(text).to_yaml(), encoding="utf-8")
    by_file = converted(source, tmp_path, "--pipeline", tmp_path / "mine.yaml")
    assert by_name.graph == by_text.graph == by_file.graph
    assert options(by_file) == text


@pytest.mark.parametrize("level", ["none", "structure", "checker"])
def test_verify_levels(source: Path, tmp_path: Path, level: str) -> None:
    assert converted(source, tmp_path, "--verify", level).graph == converted(source, tmp_path).graph


def test_verifying_numbers(source: Path, tmp_path: Path) -> None:
    passes = "raise-opset,canonicalize,fold-constants,cleanup"
    converted(source, tmp_path, "--pipeline", passes, "--verify", "numeric")


def test_target(source: Path, tmp_path: Path) -> None:
    shipped = (REPOSITORY / "pipelines" / "targets" / "ort-x86.yaml").read_text(encoding="utf-8")
    mine = shipped.replace("name: ort-x86", "name: mine").replace(
        "per_channel_weights: true", "per_channel_weights: false"
    )
    (tmp_path / "mine.yaml").write_text(mine, encoding="utf-8")
    model = converted(source, tmp_path, "--target", tmp_path / "mine.yaml")
    entries = {entry.key: entry.value for entry in model.metadata_props}
    assert entries["qat2int8.target"] == "mine"
    assert model.graph != converted(source, tmp_path).graph


# -- the requirement --------------------------------------------------------------------------------------------


def test_a_requirement_that_is_met(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path, "--require-int8", "100")


@pytest.mark.parametrize("words", [(), ("--quiet",), ("--json",)], ids=["plain", "quiet", "json"])
def test_a_requirement_that_is_not_met(source: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    result = invoke(source, tmp_path, "--require-int8", "90", "--skip-node", "*", *words)
    assert result.exit_code == 1
    assert result.stderr == ("requirement not met: 0.0 % of multiply-accumulates are integer, 90 % required\n")
    assert (tmp_path / "int8.onnx").exists()
    if words == ("--json",):
        assert json.loads(result.stdout)["requirement_met"] is False


# -- as a process -----------------------------------------------------------------------------------------------


def test_piped_into_a_file(source: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "qat2int8", "convert", str(source), "-o", str(tmp_path / "int8.onnx")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "certificate  100.0 %" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8.onnx"]


def test_names_that_the_terminal_cannot_show(tmp_path: Path) -> None:
    proto = networks.tiny_resnet()
    next(node for node in proto.graph.node if node.op_type == "Conv").name = "Faltung_→"
    onnx.save(proto, tmp_path / "model.onnx")
    words = ["convert", str(tmp_path / "model.onnx"), "-o", str(tmp_path / "int8.onnx"), "--skip-node", "Faltung*"]
    done = subprocess.run(
        [sys.executable, "-m", "qat2int8", *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Faltung_\\u2192 (" in done.stdout
    assert "─" not in done.stdout


@pytest.mark.parametrize("target", ["tensorrt", "openvino"])
def test_a_runtime_that_is_not_at_hand_is_not_spoken_for(source: Path, tmp_path: Path, target: str) -> None:
    result = invoke(source, tmp_path, "--target", target, "--require-int8", "100")
    assert result.exit_code == 0, result.output
    assert "certificate" not in result.stdout
    assert "placement    100.0 % of" in result.stdout
    assert f"({target} was not asked what it makes of them)" in result.stdout
    assert "fidelity" in result.stdout
    model = onnx.load(tmp_path / "int8.onnx")
    assert {entry.key: entry.value for entry in model.metadata_props}["qat2int8.target"] == target


def test_broken_rules_of_the_target_are_told_and_counted(tmp_path: Path) -> None:
    """A fake quant that cannot be read stays in the graph, with the zero point that TensorRT does not take."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[1,4,4,4] x) => (float[1,4,4,4] y, float[1,4,4,4] h)
    <float s = {0.05}, int8 z = {0}, float[4] pc = {0.1, 0.1, 0.1, 0.2}, uint8[4] pz = {1, 2, 3, 4},
     float[4,4,1,1] w = {1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8}> {
      [xq] q = QuantizeLinear (x, s, z)
      [xd] d = DequantizeLinear (q, s, z)
      [wq] wi = QuantizeLinear (w, s, z)
      [wd] wf = DequantizeLinear (wi, s, z)
      [conv] y = Conv (d, wf)
      [hq] hi = QuantizeLinear (y, pc, pz)
      [hd] h = DequantizeLinear (hi, pc, pz)
    }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "odd.onnx")
    result = invoke(tmp_path / "odd.onnx", tmp_path, "--target", "tensorrt")
    assert result.exit_code == 0, result.output
    assert "its rules are broken in 6 places" in result.stdout
    assert "Q306 warning: its zero point is not 0" in result.stdout


# -- a report on the result --------------------------------------------------------------------------------------


def test_a_report_on_data_says_how_the_result_does_beside_its_source(source: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images(12, 16))
    words = ("--data", tmp_path / "data.npz", "--batch-size", 4, "--report", tmp_path / "report.json")
    result = invoke(source, tmp_path, *words)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1].startswith("report ")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["reference"]["name"], report["model"]["name"]) == ("model.onnx", "int8.onnx")
    assert [row["model"] for row in report["speed"]] == ["model", "int8"]
    assert report["accuracy"] == []  # nobody said what the answers should be
    assert {error["name"] for error in report["layer_errors"]} >= {layer["name"] for layer in report["layers"]}
    assert report["histograms"]


def test_a_report_without_data_has_what_the_files_say(source: Path, tmp_path: Path) -> None:
    result = invoke(source, tmp_path, "--report", tmp_path / "report.html", "--json")
    assert json.loads(result.stdout)["report"] == str(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "As it came" in text
    assert "Activations" not in text


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("report.pdf", "cannot be written as '.pdf'"),
        ("nowhere/report.html", "nowhere"),
        ("int8.html", "the report would replace a file of this command"),
    ],
)
def test_a_report_that_cannot_be_written_is_refused_first(
    source: Path, tmp_path: Path, name: str, reason: str
) -> None:
    words = ("convert", str(source), "-o", str(tmp_path / "int8.html"), "--report", str(tmp_path / name))
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert reason in line
    assert list(tmp_path.iterdir()) == []
