from __future__ import annotations

import hashlib

import numpy as np
import onnx
import onnx_ir as oir
from support import parse

from qat2int8.ir import INT8, QuantParams, text_diff, to_text

SMALL = "g (float[4] x) => (float[4] y) <float[4] w = {1, 2, 3, 4}> { [a] t = Add (x, w) [b] y = Relu (t) }"


def test_small_models_read_back_exactly() -> None:
    model = parse(SMALL)
    back = onnx.parser.parse_model(to_text(model))
    assert onnx.printer.to_text(back) == to_text(model)
    assert back.graph.initializer == model.to_proto().graph.initializer


def test_more_than_sixteen_elements_are_elided() -> None:
    model = parse("g (float[4] x) => (float[4] y) { y = Relu (x) }")
    sixteen, seventeen = np.arange(16, dtype=np.float32), np.arange(17, dtype=np.int8)
    model.add_initializer("sixteen", sixteen)
    model.add_initializer("layer.1/weight", seventeen.reshape(17, 1))
    text = to_text(model)
    digest = hashlib.sha1(seventeen.tobytes()).hexdigest()[:8]
    assert f'"layer.1/weight" = <int8[17,1] sha1:{digest}>' in text
    assert "14,15}" in text.replace(" ", "")
    assert "16" not in text.split("sha1")[0].split("weight")[-1]


def test_constants_and_subgraphs_are_elided_too() -> None:
    model = parse("g (float[20] x) => (float[20] y) { c = Constant <value = float[1] {1}> () y = Add (x, c) }")
    constant = model.graph[0]
    constant.attributes["value"] = oir.AttrTensor("value", oir.tensor(np.arange(20, dtype=np.float32)))
    assert "c = Constant <value: tensor = <float[20] sha1:" in to_text(model)


def test_a_changed_weight_changes_the_text() -> None:
    model = parse("g (float[20] x) => (float[20] y) { y = Relu (x) }")
    weight = model.add_initializer("w", np.zeros(20, np.float32))
    before = to_text(model)
    assert to_text(model) == before
    weight.const_value = oir.tensor(np.ones(20, np.float32), name="w")
    assert to_text(model) != before


def test_printing_leaves_the_model_alone() -> None:
    model = parse("g (float[20] x) => (float[20] y) { y = Relu (x) }")
    model.add_initializer("w", np.zeros(20, np.float32))
    before = model.to_proto()
    to_text(model, scales=True)
    assert model.to_proto() == before


def test_strings_are_left_as_they_are() -> None:
    model = parse('g (float[4] x) => (float[4] y) <string s = {"<float[1] sha1:0>"}> { y = Relu (x) }')
    assert '"<float[1] sha1:0>"' in to_text(model)


def test_scales_follow_as_comments() -> None:
    model = parse(SMALL)
    assert to_text(model, scales=True) == to_text(model)
    model.scales.set(model.values()["t"], QuantParams.make(0.5, 0, INT8, origin="training"))
    text = to_text(model, scales=True)
    assert text.startswith(to_text(model).rstrip())
    (row,) = [line for line in text.splitlines() if line.startswith("//   ")]
    for word in ("t:", "int8", "0.5", "[-64, 63.5]", "training"):
        assert word in row
    assert "//" not in to_text(model)


def test_diff() -> None:
    assert text_diff("a\nb", "a\nb") == ""
    lines = text_diff("a\nb\nc", "a\nB\nc").splitlines()
    assert lines[:2] == ["--- before", "+++ after"]
    assert "-b" in lines
    assert "+B" in lines
    assert " a" in lines
