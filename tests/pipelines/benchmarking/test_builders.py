"""The eight networks: what they are, and that both styles of export end up in integers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from support import run

from qat2int8 import convert
from qat2int8.pipelines.benchmarking import bert, builder, fake_quant, networks, suite
from qat2int8.pipelines.benchmarking.fake_quant import images
from qat2int8.pipelines.benchmarking.suite import STYLES, SUITE

Build = Callable[..., onnx.ModelProto]
SMALL: dict[str, Build] = {
    "googlenet": lambda **export: networks.googlenet(width=0.125, size=32, classes=10, **export),
    "mobilenet_v1": lambda **export: networks.mobilenet_v1(width=0.25, size=32, classes=10, **export),
    "mobilenet_v2": lambda **export: networks.mobilenet_v2(width=0.25, size=32, classes=10, **export),
    "resnet50": lambda **export: networks.resnet50(width=8, size=32, classes=10, **export),
    "resnet101": lambda **export: networks.resnet101(width=8, size=32, classes=10, **export),
    "vgg16": lambda **export: networks.vgg16(width=8, size=32, classes=10, **export),
    "vgg19": lambda **export: networks.vgg19(width=8, size=32, classes=10, **export),
    "ernie": lambda **export: bert.bert(bert.SMALL, **export),
}
LARGE = {"resnet101", "vgg19", "resnet50", "googlenet"}
LAYERS = {
    "googlenet": (57, 1),
    "mobilenet_v1": (27, 1),
    "mobilenet_v2": (52, 1),
    "resnet50": (53, 1),
    "resnet101": (104, 1),
    "vgg16": (13, 3),
    "vgg19": (16, 3),
}
"""Conv and Gemm nodes, as in the papers."""
CASES = [
    pytest.param(name, style, marks=pytest.mark.slow if name in LARGE else ())
    for name in SMALL
    for style in STYLES
]


def test_there_is_a_small_one_of_each() -> None:
    assert list(SMALL) == list(SUITE)


@pytest.mark.parametrize(("name", "style"), CASES)
def test_every_layer_with_constant_weights_becomes_integer(name: str, style: str) -> None:
    proto = SMALL[name](every_tensor=style == "every-tensor")
    onnx.checker.check_model(proto, full_check=True)
    compute = convert(proto).certificate.compute
    assert len(compute) == (sum(LAYERS[name]) if name in LAYERS else 18)
    products = 2 * bert.SMALL.layers if name == "ernie" and style == "layer-inputs" else 0
    assert sum(not record.integer for record in compute) == products


@pytest.mark.parametrize("name", LAYERS)
def test_the_layers_are_those_of_the_paper(name: str) -> None:
    ops = Counter(node.op_type for node in SMALL[name](fake_quant=False).graph.node)
    assert (ops["Conv"], ops["Gemm"]) == LAYERS[name]


def test_googlenet_has_nine_modules_of_four_branches() -> None:
    graph = networks.googlenet(width=0.125, size=32, fake_quant=False).graph
    joins = [node for node in graph.node if node.op_type == "Concat"]
    assert [len(node.input) for node in joins] == [4] * 9


@pytest.mark.parametrize("name", ["mobilenet_v2", "vgg16", "ernie"])
def test_every_tensor_style_is_uint8_behind_layers_and_computes_nearly_the_same(name: str) -> None:
    plain, fake = SMALL[name](fake_quant=False), SMALL[name](every_tensor=True)
    makers = {node.output[0]: node for node in fake.graph.node}
    stored = {tensor.name: tensor.data_type for tensor in fake.graph.initializer}
    for node in fake.graph.node:
        if node.op_type == "QuantizeLinear":
            weight = node.input[0] in stored
            assert stored[node.input[2]] == (onnx.TensorProto.INT8 if weight else onnx.TensorProto.UINT8)
        if node.op_type in ("Conv", "Gemm"):
            on_grid = ("DequantizeLinear", "MaxPool", "Flatten", "Gather")
            assert all(makers[x].op_type in on_grid for x in node.input[:2])
        if node.op_type in ("Relu", "Clip"):
            assert makers[node.input[0]].op_type in ("Conv", "Gemm", "Add")
        if node.op_type in ("Relu", "Clip", "Softmax"):
            readers = [each.op_type for each in fake.graph.node if node.output[0] in each.input]
            assert readers == ["QuantizeLinear"]
    pictures = {"image": images(4, 32, seed=7)}
    feeds = {"token_ids": bert.tokens(1, bert.SMALL)} if name == "ernie" else pictures
    reference, answer = run(plain, feeds)[0], run(fake, feeds)[0]
    error = np.abs(answer - reference).mean()
    assert 0 < error < 0.5 * reference.std()


FORMS = ({}, {"fake_quant": False}, {"every_tensor": True}, {"fake_quant": False, "bn_folded": True})


def test_forms_of_one_drawing_are_those_of_a_drawing_each() -> None:
    drawn, encoder = networks.tiny_resnet.drawn(seed=3), bert.drawn(bert.SMALL, seed=3)
    for form in (*FORMS, {"tflite": True}, {}):
        assert drawn.write(**form) == networks.tiny_resnet(seed=3, **form)
    for form in (*FORMS[:3], {"products": True}, {}):
        assert encoder.write(**form) == bert.bert(bert.SMALL, seed=3, **form)


def test_a_drawing_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    measure = builder.measure
    monkeypatch.setattr(builder, "measure", lambda sketch: measured.append(sketch.name) or measure(sketch))
    write = suite._pictures("Tiny", networks.tiny_resnet).draw()
    for style in (None, *STYLES):
        write(style)
    assert measured == ["resnet18"]


@pytest.mark.parametrize("name", ["mobilenet_v2", "ernie"])
@pytest.mark.parametrize("style", STYLES)
def test_weights_that_are_fed_give_the_same_grids(name: str, style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def steps() -> dict[str, npt.NDArray[Any]]:
        stored = SMALL[name](every_tensor=style == "every-tensor").graph.initializer
        return {each.name: onnx.numpy_helper.to_array(each) for each in stored if each.name.endswith(".scale")}

    within = steps()
    monkeypatch.setattr(fake_quant, "_LARGE", 0)
    fed = steps()
    assert within.keys() == fed.keys()
    for tensor, step in within.items():
        np.testing.assert_allclose(fed[tensor], step, rtol=1e-3, err_msg=tensor)
