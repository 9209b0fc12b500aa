"""The table in a model: of fake quantization, and of what became of it in integers."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from support import REPOSITORY, parse

from qat2int8 import convert
from qat2int8.ir import UnsupportedModel
from qat2int8.pipelines.tables import read_table, write_table
from qat2int8.pipelines.tables.extraction import extract
from qat2int8.pipelines.tables.files import losses

QAT_MODEL = REPOSITORY / "tools" / "demo_data" / "resnet_trt_qat.onnx"


def test_a_grid_of_int8_ends_127_steps_from_zero(tmp_path: Path) -> None:
    text = """g (float[4] x) => (float[4] y) <float s = {0.5}, int8 z = {0}, float t = {0.25}, uint8 u = {128}> {
      q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) n = Neg (d)
      p = QuantizeLinear (n, t, u) y = DequantizeLinear (p, t, u) }"""
    onnx.save(parse(text).to_proto(), tmp_path / "m.onnx")
    table, _ = extract(tmp_path / "m.onnx")
    assert {name: (e.lo, e.hi, e.amax) for name, e in table.entries.items()} == {
        "x": (-64.0, 63.5, 63.5),
        "n": (-32.0, 31.75, 31.75),
    }


def test_no_weight_is_in_the_table() -> None:
    table, _ = extract(QAT_MODEL)
    model = onnx.load(QAT_MODEL)
    weights = {tensor.name for tensor in model.graph.initializer}
    outputs = {name for node in model.graph.node for name in node.output} | {model.graph.input[0].name}
    assert table.entries
    assert not table.entries.keys() & weights
    assert table.entries.keys() <= outputs


@pytest.mark.parametrize("encoding", ["exact", "refine"])
def test_the_integer_model_has_the_ranges_of_the_trained_one(tmp_path: Path, encoding: str) -> None:
    trained, _ = extract(QAT_MODEL)
    convert(QAT_MODEL, options={"update-relu-output-scales": {"encoding": encoding}}).save(tmp_path / "int8.onnx")
    integer, _ = extract(tmp_path / "int8.onnx")
    assert integer.entries["image"] == trained.entries["image"]
    # A Relu that a quantizer absorbed is gone, and its tensor with it: the one before it has the grid from zero.
    unsigned = [entry.amax for entry in integer.entries.values() if entry.lo == 0.0]
    for name, entry in trained.entries.items():
        if "Relu" in name and name != "/l/l.3/Relu_1_output_0":
            assert any(amax == pytest.approx(entry.amax, rel=1e-5) for amax in unsigned), name


def test_it_travels(tmp_path: Path) -> None:
    table, _ = extract(QAT_MODEL)
    assert not any("symmetric" in line for line in losses(table, "tensorrt"))
    write_table(table, tmp_path / "cache", "tensorrt")
    back = read_table(tmp_path / "cache")
    for name, entry in table.entries.items():
        assert back.entries[name].amax == pytest.approx(entry.amax, rel=1e-6)


def test_a_float_model_has_none(tmp_path: Path) -> None:
    onnx.save(parse("g (float[2] x) => (float[2] y) { y = Neg (x) }").to_proto(), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedModel, match="no activation has a grid"):
        extract(tmp_path / "m.onnx")
