"""``qat2int8 explain``: a converted model tells from the file alone what runs in float and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from test_docs import keys, nested
from typer.testing import CliRunner, Result

from qat2int8.pipelines.benchmarking import networks
from qat2int8.pipelines.convert import convert
from qat2int8.tools.cli import app

PARTLY = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[1,4,4,4] x) => (float[1,4,4,4] y, float[1,4,4,4] h)
<float xs = {0.05}, float ys = {0.1}, int8 z = {0}, float ws = {0.01}, float[4,4,1,1] w =
 {0.1, 0.2, 0.3, 0.4, -0.1, 0.2, 0.3, 0.4, 0.1, 0.2, -0.3, 0.4, 0.1, 0.2, 0.3, 0.4}> {
  [xq] q = QuantizeLinear (x, xs, z)
  [xd] d = DequantizeLinear (q, xs, z)
  [wq] wi = QuantizeLinear (w, ws, z)
  [wd] wf = DequantizeLinear (wi, ws, z)
  [first] a = Conv (d, wf)
  [aq] ai = QuantizeLinear (a, ys, z)
  [ad] af = DequantizeLinear (ai, ys, z)
  [flat] m = Transpose <perm = [0, 1, 3, 2]> (af)
  [tanh] t = Tanh (m)
  [sig] s = Sigmoid (t)
  [blind] y = Conv (s, wf)
  [last] h = Conv (af, wf)
}
"""
"""``first`` can be integer; ``blind`` has no grid on its input, ``last`` none on its output."""


@pytest.fixture(scope="module")
def partly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("partly") / "model.int8.onnx"
    convert(onnx.parser.parse_model(PARTLY), verify="none").save(path)
    return path


@pytest.fixture(scope="module")
def integer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("integer") / "model.int8.onnx"
    convert(networks.tiny_resnet(), verify="none").save(path)
    return path


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, ["explain", *map(str, words)])


def document(*words: object) -> dict[str, Any]:
    result = invoke(*words, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def grids(told: dict[str, Any]) -> list[tuple[str, str, bool]]:
    return [(one["role"], one["tensor"], bool(one["grid"])) for one in told["tensors"]]


# -- the whole model --------------------------------------------------------------------------------------------


def test_what_it_was_made_from_and_for(partly: Path) -> None:
    made_by = document(partly)["made_by"]
    props = {entry.key: entry.value for entry in onnx.load(partly).metadata_props}
    assert made_by == {key: props[f"qat2int8.{key}"] for key in made_by}
    assert list(made_by) == ["version", "target", "pipeline", "source_sha256"]
    lines = invoke(partly).stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[:5]] == ["made by", "for", "from", "pipeline", "certificate"]
    assert lines[3].split() == ["pipeline", "qat-to-int8"]
    assert "canonicalize" in invoke(partly, "-v").stdout


def test_a_pipeline_with_options_is_told_in_full(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    convert(networks.tiny_resnet(), skip_nodes=["Conv_11"], verify="none").save(path)
    assert "{skip_nodes=[Conv_11]}" in invoke(path).stdout


def test_nodes_in_float_are_grouped_by_reason_with_code_and_remedy(partly: Path) -> None:
    groups = document(partly)["left_float"]
    told = {
        node["node"]: (group["code"], group["reason"], bool(group["remedy"]))
        for group in groups
        for node in group["nodes"]
    }
    assert told == {
        "sig": ("Q301", "no integer kernel computes its inputs", False),
        "blind": ("Q301", "its input has no grid", True),
        "last": ("Q302", "it computes a graph output that no fake quant gave a grid", True),
    }
    assert "Q302 it computes a graph output" in invoke(partly).stdout


def test_layers_left_for_one_reason_share_a_group(tmp_path: Path) -> None:
    text = PARTLY.replace("[blind] y = Conv (s, wf)", "[b] u = Conv (s, wf) [blind] y = Conv (s, wf)")
    text = text.replace("float[1,4,4,4] h)", "float[1,4,4,4] h, float[1,4,4,4] u)")
    path = tmp_path / "m.onnx"
    convert(onnx.parser.parse_model(text), verify="none").save(path)
    groups = [[node["node"] for node in group["nodes"]] for group in document(path)["left_float"]]
    assert ["b", "blind"] in groups


def test_everything_in_integers(integer: Path) -> None:
    assert document(integer)["left_float"] == []
    assert "left float   nothing that could be integer" in invoke(integer).stdout


def test_a_model_of_somebody_else(tmp_path: Path) -> None:
    path = tmp_path / "source.onnx"
    onnx.save(onnx.parser.parse_model(PARTLY), path)
    told = document(path)
    assert (told["made_by"], told["diagnostics"]) == (None, [])
    (group,) = told["left_float"]
    assert group["code"] == group["remedy"] == ""
    # Tanh and Sigmoid are not told of: whether they could be integer depends on a target nobody chose.
    assert {node["op_type"] for node in group["nodes"]} == {"Conv"}
    assert {"blind", "last"} <= {node["node"] for node in group["nodes"]}
    assert "not qat2int8" in invoke(path).stdout


def test_nodes_without_names_are_called_after_what_they_write(tmp_path: Path) -> None:
    path = tmp_path / "source.onnx"
    proto = onnx.parser.parse_model(PARTLY)
    for node in proto.graph.node:
        node.name = ""
    onnx.save(proto, path)
    (group,) = document(path)["left_float"]
    assert {"y", "h"} <= {node["node"] for node in group["nodes"]}
    assert document(path, "--node", "y")["node"]["op_type"] == "Conv"


# -- one node ---------------------------------------------------------------------------------------------------


def test_a_node_in_integers(partly: Path) -> None:
    told = document(partly, "--node", "first")["node"]
    assert (told["integer"], told["kernel"], told["chain"]) == (True, "QLinearConv", [])
    (source, weight, output) = told["tensors"]
    assert source | {"range": ""} == {
        "role": "input",
        "tensor": "x",
        "grid": "uint8 scale=0.05 zp=128",
        "range": "",
    }
    assert (weight["role"], weight["grid"]) == ("weight", "int8 scale=0.01")
    assert (output["role"], output["tensor"], output["grid"]) == ("output", "a", "uint8 scale=0.1 zp=128")
    text = invoke(partly, "--node", "first").stdout
    assert "in integers, as QLinearConv" in text
    assert "what led there" not in text


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("operators") / "model.int8.onnx"
    convert(networks.tiny_resnet(), format="qoperator", verify="none").save(path)
    return path


@pytest.mark.parametrize(
    ("name", "kernel", "roles"),
    [
        ("Conv_11", "QLinearConv", ["input", "weight", "bias", "output"]),
        ("Add_20", "QLinearAdd", ["input", "input", "output"]),
        ("Gemm_49", "QGemm", ["input", "weight", "bias"]),
        ("Flatten_44", "Flatten", ["input", "output"]),
    ],
)
def test_operators_on_integers_tell_their_grids(
    operators: Path, integer: Path, name: str, kernel: str, roles: list[str]
) -> None:
    told = document(operators, "--node", name)["node"]
    assert (told["integer"], told["kernel"], told["chain"]) == (True, kernel, [])
    assert [role for role, _, on_grid in grids(told) if on_grid] == roles
    # Between Quantize and Dequantize a Clip is not seen through what moves integers behind it.
    told_alike = slice(None) if kernel in ("QLinearConv", "QLinearAdd") else slice(2, 3)
    steps, others = (
        [one["grid"].partition(" ")[told_alike] for one in tensors]
        for tensors in (told["tensors"], document(integer, "--node", name)["node"]["tensors"])
    )
    assert steps == others
    if kernel == "QLinearConv":
        assert told["tensors"][-1]["grid"].startswith("uint7")
    assert document(operators)["left_float"] == []


@pytest.mark.parametrize(
    ("name", "kernel"), [("Add_20", "QLinearAdd"), ("Gemm_49", "QGemm"), ("Flatten_44", "Flatten")]
)
def test_the_kernel_is_the_one_that_is_executed(integer: Path, name: str, kernel: str) -> None:
    told = document(integer, "--node", name)["node"]
    assert (told["integer"], told["kernel"]) == (True, kernel)


def test_the_grid_of_an_absorbed_relu_and_of_moved_integers(integer: Path) -> None:
    conv = document(integer, "--node", "Conv_11")["node"]
    assert [role for role, _, on_grid in grids(conv) if on_grid] == ["input", "weight", "bias", "output"]
    # Training saturated at half of uint8, which the Clip behind the quantizer keeps.
    assert conv["tensors"][-1]["grid"].startswith("uint7 ")
    assert all(on_grid for _, _, on_grid in grids(document(integer, "--node", "Flatten_44")["node"]))


def test_the_chain_of_a_float_node_ends_at_a_grid_or_a_reason(partly: Path) -> None:
    blind = document(partly, "--node", "blind")["node"]
    assert (blind["integer"], blind["kernel"]) == (False, "")
    assert grids(blind)[0] == ("input", "s", False)
    assert [(cause["tensor"], cause["node"]) for cause in blind["chain"]] == [("s", "sig")]
    sig = document(partly, "--node", "sig")["node"]
    first, *rest = sig["chain"]
    assert (first["tensor"], first["node"], first["reason"]) == (
        "t",
        "tanh",
        "ort-x86 has no integer kernel for it",
    )
    assert "x" not in [cause["tensor"] for cause in rest]


def test_the_output_is_blamed_where_the_finding_names_it(partly: Path) -> None:
    last = document(partly, "--node", "last")["node"]
    assert last["chain"] == [{"tensor": "h", "node": "last", "op_type": "Conv", "reason": "no quantizer reads it"}]
    assert [finding["code"] for finding in last["diagnostics"]] == ["Q302"]
    assert "what led there" in invoke(partly, "--node", "last").stdout


def test_only_the_input_that_the_finding_names_is_blamed(tmp_path: Path) -> None:
    text = PARTLY.replace("[last] h = Conv (af, wf)", "[cos] c = Softsign (m) [last] h = MatMul (s, c)")
    path = tmp_path / "m.onnx"
    convert(onnx.parser.parse_model(text), verify="none").save(path)
    told = document(path, "--node", "last")["node"]
    assert [finding["value"] for finding in told["diagnostics"] if finding["node"] == "last"] == ["s"]
    assert [cause["tensor"] for cause in told["chain"]] == ["s"]


def test_findings_about_the_tensors_of_a_node_are_told(partly: Path) -> None:
    # Found at 'blind', about the tensor that 'sig' writes.
    codes = {(found["code"], found["node"]) for found in document(partly, "--node", "sig")["node"]["diagnostics"]}
    assert ("Q301", "blind") in codes
    assert not any(node == "last" for _, node in codes)


def test_quantizers_are_told_as_such(integer: Path) -> None:
    told = document(integer, "--node", "relu_12_QuantizeLinear")["node"]
    assert [one["role"] for one in told["tensors"]] == ["input", "output"]
    assert told["chain"] == []
    assert "between floats and integers" in invoke(integer, "--node", "relu_12_QuantizeLinear").stdout


def test_a_float_weight_that_the_runtime_quantizes_is_told(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    convert(networks.tiny_resnet(), skip_nodes=["Conv_26"], verify="none").save(path)
    told = document(path, "--node", "Conv_26")["node"]
    assert ("weight", "conv_10.weight", False) in grids(told)
    assert [finding["code"] for finding in told["diagnostics"]] == ["Q303"]
    # Not every version of onnxruntime does.
    text = invoke(path, "--node", "Conv_26").stdout
    assert ("quantizes its float weight by itself" in text) == told["integer"]


def test_odd_quantizers_of_others(tmp_path: Path) -> None:
    """No zero point, and one scale per block: no grid that could be shown, and no reason to stop."""
    text = """<ir_version: 10, opset_import: ["" : 21]>
      g (float[2,4] x) => (float[2,4] y, float[2,4] v) <float s = {0.5}, float[2,2] blocks = {1, 2, 3, 4}> {
        [q] i = QuantizeLinear (x, s) [d] f = DequantizeLinear (i, s) [n] y = Neg (f)
        [bq] j = QuantizeLinear <axis = 1, block_size = 2> (x, blocks)
        [bd] h = DequantizeLinear <axis = 1, block_size = 2> (j, blocks) [m] v = Neg (h) }"""
    path = tmp_path / "m.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    assert document(path, "--node", "n")["node"]["tensors"][0]["grid"] == "uint8 scale=0.5"
    assert document(path, "--node", "q")["node"]["tensors"][1]["grid"] == "uint8 scale=0.5"
    assert document(path, "--node", "m")["node"]["tensors"][0]["grid"] == ""


def test_a_kernel_inside_a_branch(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
      g (bool c, float[1,1,2,2] x) => (float[1,1,2,2] y)
      <float s = {0.5}, int8 z = {0}, uint8 u = {8}, int8[1,1,1,1] w = {3}> {
        y = If (c) <then_branch = t () => (float[1,1,2,2] o) {
            i = QuantizeLinear (x, s, u) f = DequantizeLinear (i, s, u) wf = DequantizeLinear (w, s, z)
            [inner] k = Conv (f, wf) j = QuantizeLinear (k, s, u) o = DequantizeLinear (j, s, u)
          }, else_branch = e () => (float[1,1,2,2] p) { p = Neg (x) }> }"""
    path = tmp_path / "m.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    told = document(path, "--node", "inner")
    assert told["left_float"] == []
    assert told["node"]["kernel"] == "QLinearConv"


# -- ends -------------------------------------------------------------------------------------------------------


def test_an_unknown_node_gets_the_nearest(integer: Path) -> None:
    result = invoke(integer, "--node", "Con_11")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: {integer}: no node is called 'Con_11' (did you mean 'Conv_11'?)\n"


@pytest.mark.parametrize(
    "record",
    [
        "{",
        "[1]",
        '[{"code": "Q301", "severity": "note", "reason": 5}]',
        '[{"code": "Q999"}]',
        '[{"code": "Q301", "severity": "note"}]',
        "1",
    ],
)
def test_a_damaged_record_is_named(partly: Path, tmp_path: Path, record: str) -> None:
    proto = onnx.load(partly)
    for entry in proto.metadata_props:
        if entry.key == "qat2int8.diagnostics":
            entry.value = record
    onnx.save(proto, tmp_path / "m.onnx")
    result = invoke(tmp_path / "m.onnx")
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert "'qat2int8.diagnostics' cannot be read (convert the source again" in line
    assert "--debug" not in line


def test_a_target_of_a_file_that_is_not_here(partly: Path, tmp_path: Path) -> None:
    proto = onnx.load(partly)
    for entry in proto.metadata_props:
        if entry.key == "qat2int8.target":
            entry.value = "mine"
    onnx.save(proto, tmp_path / "m.onnx")
    assert document(tmp_path / "m.onnx")["made_by"]["target"] == "mine"


@pytest.mark.parametrize("content", [None, b"", b"no model"])
def test_no_model(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    result = invoke(path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {path}")


def test_quiet_prints_nothing(partly: Path) -> None:
    for words in ((), ("--node", "last")):
        result = invoke(partly, "-q", *words)
        assert (result.exit_code, result.output) == (0, "")


def test_the_file_is_left_as_it_is(partly: Path) -> None:
    before = partly.read_bytes()
    invoke(partly, "--node", "first")
    assert partly.read_bytes() == before
    assert [path.name for path in partly.parent.iterdir()] == [partly.name]


def test_the_document_is_told_of(partly: Path) -> None:
    told = document(partly, "--node", "blind")
    assert keys("formats.md", "json-explain") == list(told)
    assert nested("formats.md", "json-explain", "made_by") == list(told["made_by"])
    assert nested("formats.md", "json-explain", "left_float") == list(told["left_float"][0])
    assert keys("formats.md", "json-explain-node") == list(told["node"])
    assert nested("formats.md", "json-explain-node", "tensors") == list(told["node"]["tensors"][0])
    assert nested("formats.md", "json-explain-node", "chain") == list(told["node"]["chain"][0])


def test_help_shows_an_example() -> None:
    assert "qat2int8 explain model.int8.onnx --node" in invoke("--help").stdout


def test_weights_are_not_taken_for_activations(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(PARTLY.replace("[last] h = Conv (af, wf)", "[last] h = Add (af, w0)"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((1, 4, 1, 1), np.float32), "w0"))
    path = tmp_path / "m.onnx"
    convert(proto, verify="none").save(path)
    told = document(path, "--node", "last")["node"]
    assert not told["integer"]
    assert {cause["tensor"] for cause in told["chain"]} == {"h"}


def test_a_file_for_another_runtime_is_told_by_its_placement(tmp_path: Path) -> None:
    path = tmp_path / "model.trt.onnx"
    convert(networks.tiny_resnet(), target="tensorrt", verify="none").save(path)
    told = invoke(path).stdout
    assert "for          tensorrt" in told
    assert "placement    100.0 % of" in told
    assert "(tensorrt was not asked what it makes of them)" in told
    assert "training put no fake quant on what it reads" in told
    assert document(path)["certificate"]["basis"] == "placement"
