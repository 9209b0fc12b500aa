"""``qat2int8 inspect``: what a model holds, and how it is fake quantized, before anything is done to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_docs import keys, nested
from typer.testing import CliRunner, Result

from qat2int8.pipelines.benchmarking import networks
from qat2int8.tools.cli import app

HEADER = """<ir_version: 8, opset_import: ["" : 17, "qonnx.custom_op.general" : 2, "org.openvinotoolkit" : 1,
 "com.microsoft" : 1], producer_name: "maker", producer_version: "1.2">"""
GRIDS = "float s = {0.05}, float z = {0}, float bits = {8}, int8 zero = {0}, float lo = {-6.4}, float hi = {6.35}"


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, ["inspect", *map(str, words)])


def document(path: Path) -> dict[str, Any]:
    result = invoke(path, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def saved(folder: Path, body: str, *weights: tuple[str, np.ndarray]) -> Path:
    text = f"{HEADER} g (float[N,4,?,6] x) => (float[N,4,?,6] y) <{GRIDS}> {{ {body} }}"
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights)
    path = folder / "m.onnx"
    onnx.save(proto, path)
    return path


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inspect") / "model.onnx"
    onnx.save(networks.tiny_resnet(), path)
    return path


# -- the surface ------------------------------------------------------------------------------------------------


def test_the_surface(tmp_path: Path) -> None:
    path = saved(tmp_path, "a = Relu (x) b = Relu (a) y = Neg (b)")
    told = document(path)
    assert (told["producer"], told["ir_version"], told["opsets"]["ai.onnx"]) == ("maker 1.2", 8, 17)
    assert (told["bytes"], told["weights"]) == (path.stat().st_size, 6)
    assert told["inputs"] == [{"name": "x", "type": "float", "shape": ["N", 4, "?", 6]}]
    assert told["outputs"] == [{"name": "y", "type": "float", "shape": ["N", 4, "?", 6]}]
    assert told["ops"] == {"Relu": 2, "Neg": 1}
    text = invoke(path).stdout
    assert "exporter     not told" in text
    assert "producer     maker 1.2" in text
    assert "input        x: float [N, 4, ?, 6]" in text
    assert "nodes        3: 2 Relu, 1 Neg" in text


def test_external_data_counts(tmp_path: Path, resnet: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(onnx.load(resnet), path, save_as_external_data=True, location="m.data", size_threshold=0)
    told = document(path)
    assert told["bytes"] > path.stat().st_size
    assert told["weights"] == document(resnet)["weights"]


# -- dialects ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "dialects"),
    [
        ("q = QuantizeLinear (x, s, zero) y = DequantizeLinear (q, s, zero)", {"ONNX Quantize/Dequantize": 2}),
        (
            "q = com.microsoft.QuantizeLinear (x, s, zero) y = com.microsoft.DequantizeLinear (q, s, zero)",
            {"com.microsoft Quantize/Dequantize": 2},
        ),
        ("y = qonnx.custom_op.general.Quant <signed = 1, narrow = 0> (x, s, z, bits)", {"QONNX": 1}),
        ("y = org.openvinotoolkit.FakeQuantize <levels = 256> (x, lo, hi, lo, hi)", {"OpenVINO FakeQuantize": 1}),
        (
            "a = Div (x, s) b = Round (a) low = Constant <value_float = -128.0> () "
            "high = Constant <value_float = 127.0> () c = Clip (b, low, high) y = Mul (c, s)",
            {"float primitives": 1},
        ),
        (
            "q = QuantizeLinear (x, s, zero) a = com.microsoft.QLinearAdd (q, s, zero, q, s, zero, s, zero) "
            "y = DequantizeLinear (a, s, zero)",
            {"ONNX Quantize/Dequantize": 2, "QOperator": 1},
        ),
    ],
)  # fmt: skip
def test_dialects(tmp_path: Path, body: str, dialects: dict[str, int]) -> None:
    told = document(saved(tmp_path, body))
    assert (told["dialects"], told["fake_quant"], told["problem"]) == (dialects, True, "")
    # Whatever it was spelt in, it is one and the same grid.
    forms = [{key: form[key] for key in ("role", "type", "axis", "zero_points")} for form in told["forms"]]
    assert forms == [{"role": "activation", "type": "int8", "axis": None, "zero_points": False}]
    assert next(iter(dialects)) in invoke(tmp_path / "m.onnx").stdout


def test_weights_on_a_grid_without_nodes(tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(-127, 128, (4, 4, 1, 1)).astype(np.float32)
    levels[:, 0] = 127
    body = "q = QuantizeLinear (x, s, zero) d = DequantizeLinear (q, s, zero) y = Conv (d, w)"
    on_grid = document(saved(tmp_path, body, ("w", levels * np.float32(0.01))))
    assert on_grid["dialects"]["weights on a grid, without nodes"] == 1
    assert on_grid["layers"][0]["weight"] == 0
    off = np.random.default_rng(0).normal(size=(4, 4, 1, 1)).astype(np.float32)
    assert list(document(saved(tmp_path, body, ("w", off)))["dialects"]) == ["ONNX Quantize/Dequantize"]


def test_recorded_thresholds(tmp_path: Path) -> None:
    path = saved(tmp_path, "y = Relu (x)")
    proto = onnx.load(path)
    proto.graph.node[0].metadata_props.add(key="out_threshold", value="1.5")
    onnx.save(proto, path)
    told = document(path)
    assert (told["thresholds"], told["fake_quant"], told["dialects"]) == (1, True, {})
    assert [row["tensor"] for row in told["scales"]] == ["y"]
    assert "1 recorded thresholds" in invoke(path).stdout


def test_fake_quant_in_a_branch_is_seen(tmp_path: Path) -> None:
    body = """c = Constant <value_ints = [1]> () t = Cast <to = 9> (c) y = If (t) <
      then_branch = p () => (float[N,4,?,6] d) {
        q = QuantizeLinear (x, s, zero) d = DequantizeLinear (q, s, zero) },
      else_branch = e () => (float[N,4,?,6] n) { n = Neg (x) }>"""
    assert document(saved(tmp_path, body))["dialects"] == {"ONNX Quantize/Dequantize": 2}


@pytest.mark.parametrize("body", ["y = Relu (x)", "y = Round (x)"])
def test_a_float_model_says_so(tmp_path: Path, body: str) -> None:
    path = saved(tmp_path, body)
    told = document(path)
    assert (told["fake_quant"], told["dialects"], told["forms"], told["scales"]) == (False, {}, [], [])
    assert "fake quant   none: a float model" in invoke(path).stdout


def test_what_cannot_be_read_is_told_and_the_rest_still_is(tmp_path: Path) -> None:
    path = saved(tmp_path, "y = qonnx.custom_op.general.Trunc (x, s, z, bits, bits)")
    told = document(path)
    assert "Trunc" in told["problem"]
    assert (told["fake_quant"], told["dialects"]) == (True, {"QONNX": 1})
    assert "cannot be read further: " in invoke(path).stdout


def test_a_fake_quant_that_no_kernel_computes_is_a_finding(tmp_path: Path) -> None:
    body = (
        "z16 = Constant <value = int16[1] {0}> () q = QuantizeLinear (x, s, z16) y = DequantizeLinear (q, s, z16)"
    )
    path = saved(tmp_path, body.replace("int16[1] {0}", "int16 {0}"))
    proto = onnx.load(path)
    proto.opset_import[0].version = 21
    onnx.save(proto, path)
    told = document(path)
    assert told["fake_quant"]
    assert [found["code"] for found in told["diagnostics"]] == ["Q404"]
    assert "Q404 warning" in invoke(path).stdout


def test_float_primitives_on_too_wide_a_grid_are_fake_quant_too(tmp_path: Path) -> None:
    body = """a = Div (x, s) b = Round (a) low = Constant <value_float = -1000.0> ()
      high = Constant <value_float = 1000.0> () c = Clip (b, low, high) y = Mul (c, s)"""
    path = saved(tmp_path, body)
    told = document(path)
    assert (told["fake_quant"], told["dialects"]) == (True, {})
    assert [found["code"] for found in told["diagnostics"]] == ["Q404"]
    assert "of a form that is not read, see below" in invoke(path).stdout


# -- forms and layers -------------------------------------------------------------------------------------------


def test_forms(tmp_path: Path) -> None:
    body = """q = QuantizeLinear (x, s, uz) d = DequantizeLinear (q, s, uz)
      wi = QuantizeLinear <axis = 0> (w, ws, wz) wf = DequantizeLinear <axis = 0> (wi, ws, wz)
      bf = DequantizeLinear (b, s, bz) y = Conv (d, wf, bf)"""
    path = saved(
        tmp_path,
        body,
        ("uz", np.array(3, np.uint8)),
        ("w", np.ones((4, 4, 1, 1), np.float32)),
        ("ws", np.full(4, 0.1, np.float32)),
        ("wz", np.zeros(4, np.int8)),
        ("b", np.arange(4, dtype=np.int32)),
        ("bz", np.array(0, np.int32)),
    )
    told = document(path)
    forms = {form.pop("role"): form for form in told["forms"]}
    assert forms == {
        "activation": {"type": "uint8", "bits": 8, "signed": False, "axis": None, "zero_points": True, "count": 1},
        "weight": {"type": "int8", "bits": 8, "signed": True, "axis": 0, "zero_points": False, "count": 1},
        "bias": {"type": "int32", "bits": 32, "signed": True, "axis": None, "zero_points": False, "count": 1},
    }
    assert told["layers"] == [{"op_type": "Conv", "count": 1, "input": 1, "weight": 1, "bias": 1, "output": 0}]
    text = invoke(path).stdout
    assert "1 activations: uint8, per tensor, with zero points" in text
    assert "1 weights: int8, per channel of axis 0, zero point 0" in text


CONV = "q = QuantizeLinear (x, s, zero) d = DequantizeLinear (q, s, zero)"
OUT = "e = QuantizeLinear (r, s, zero) y = DequantizeLinear (e, s, zero)"


@pytest.mark.parametrize(
    ("body", "count", "sides"),
    [
        (f"{CONV} y = Conv (d, w)", 1, (1, 0)),
        (f"{CONV} t = Transpose <perm = [0, 1, 3, 2]> (d) y = Conv (t, w)", 1, (1, 0)),
        (f"{CONV} t = Tanh (d) y = Conv (t, w)", 1, (0, 0)),
        (f"r = Conv (x, w) {OUT}", 1, (0, 1)),
        (f"c = Conv (x, w) r = Relu (c) {OUT}", 1, (0, 1)),
        (f"c = Conv (x, w) r = Tanh (c) {OUT}", 1, (0, 0)),
        ("c = Conv (x, w) r = Relu (c) h = Conv (c, w) k = Add (r, h) v = Relu (k) y = Neg (v)", 2, (0, 0)),
        (f"c = Conv (x, w) p = Relu (c) h = Neg (c) r = Add (p, h) {OUT}", 1, (0, 0)),
        (f"{CONV} a = Conv (d, w) y = Conv (a, w)", 2, (1, 0)),
    ],
)  # fmt: skip
def test_layers_with_fake_quant_on_input_and_output(
    tmp_path: Path, body: str, count: int, sides: tuple[int, int]
) -> None:
    (layer,) = document(saved(tmp_path, body, ("w", np.ones((4, 4, 1, 1), np.float32))))["layers"]
    assert (layer["count"], layer["input"], layer["output"]) == (count, *sides)


def test_a_network(resnet: Path) -> None:
    told = document(resnet)
    layers = {layer["op_type"]: layer for layer in told["layers"]}
    assert (layers["Conv"]["count"], layers["Conv"]["input"], layers["Conv"]["weight"]) == (6, 6, 6)
    ops = [node.op_type for node in onnx.load(resnet).graph.node]
    assert told["batch_norms"] == ops.count("BatchNormalization") > 0
    assert told["ops"] == {kind: ops.count(kind) for kind in told["ops"]}
    assert sum(told["ops"].values()) == len(ops)


# -- ends -------------------------------------------------------------------------------------------------------


def test_verbose_shows_the_table_of_grids(resnet: Path) -> None:
    told = document(resnet)
    assert told["scales"]
    plain, full = (invoke(resnet, *words).stdout for words in ((), ("-v",)))
    for row in told["scales"]:
        line = f"{row['tensor']}: {row['grid']} {row['range']} from {row['origin']}"
        assert line in full.splitlines()
        assert line not in plain


def test_quiet_prints_nothing(resnet: Path) -> None:
    result = invoke(resnet, "-q")
    assert (result.exit_code, result.output) == (0, "")


@pytest.mark.parametrize("content", [None, b"", b"no model"])
def test_no_model(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    result = invoke(path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {path}")


def test_the_exporter_and_the_number_of_grids_are_named(tmp_path: Path, resnet: Path) -> None:
    proto = onnx.load(resnet)
    proto.graph.node[0].name = "/conv/input_quantizer/QuantizeLinear"
    path = tmp_path / "named.onnx"
    onnx.save(proto, path)
    told = document(path)
    assert told["exporter"] == "NVIDIA Model Optimizer"
    text = invoke(path).stdout
    assert "exporter     NVIDIA Model Optimizer" in text
    assert f"grids        {len(told['scales'])} trained ones (--verbose lists them)" in text


def test_the_file_is_left_as_it_is(resnet: Path) -> None:
    before = resnet.read_bytes()
    invoke(resnet)
    assert resnet.read_bytes() == before


def test_the_document_is_told_of(resnet: Path) -> None:
    told = document(resnet)
    assert keys("formats.md", "json-inspect") == list(told)
    for key in ("inputs", "forms", "layers", "scales"):
        assert nested("formats.md", "json-inspect", key) == list(told[key][0])


def test_help_shows_an_example() -> None:
    assert "qat2int8 inspect model.onnx" in invoke("--help").stdout
