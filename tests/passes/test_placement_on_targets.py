"""Where quantizers stand on each target, on the small graphs that networks are made of."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as oir
import pytest
from arrays import model_of

from qat2int8.ir import INT8, UINT8, Fact, Model, Provenance, QuantDType, QuantParams
from qat2int8.passes import Context
from qat2int8.pipelines.manager import run_pipeline
from qat2int8.pipelines.spec import PipelineSpec
from qat2int8.pipelines.target_files import load_target
from qat2int8.pipelines.tensorrt_rules import broken_rules

PLACE = PipelineSpec.parse(
    "update-relu-output-scales,propagate-scales,complete-scales,propagate-scales,symmetrize-scales,"
    "insert-quantize-dequantize"
)
START = frozenset({Fact.NO_FAKE_QUANT, Fact.FLOAT_WEIGHTS, Fact.WEIGHT_SCALES})

S8 = QuantParams.make(0.05, 0, INT8)
OTHER = QuantParams.make(0.03, 0, INT8)
DERIVED = QuantParams.make(0.05, 0, INT8, source=Provenance.DERIVED)
W = QuantParams.make(0.01, 0, INT8)

INT4, UINT4 = QuantDType(4, signed=True), QuantDType(4, signed=False)

WEIGHT = "float[8,8,3,3]"


def place(text: str, target: str, scales: Mapping[str, QuantParams]) -> Model:
    """The graph with its quantizers; inputs whose names begin with w or b become weights and biases."""
    model = model_of(text, {}, {})
    rng = np.random.default_rng(3)
    shapes = {value.name or "": [int(str(dim)) for dim in value.shape or ()] for value in model.graph.inputs}
    constants = {name: rng.normal(0, 0.2, shape) for name, shape in shapes.items() if name[0] in "wb"}
    weights = {name: W for name in constants if name[0] == "w"}
    model = model_of(text, constants, {**weights, **scales})
    run_pipeline(model, PLACE, Context(load_target(target)), facts=START)
    return model


def placed(text: str, target: str, scales: Mapping[str, QuantParams]) -> list[str]:
    """Every node but the quantizers, with what it reads and the graph's outputs: ``x@u8:128`` is on a grid."""
    model = place(text, target, scales)
    lines = [
        f"{node.op_type}({', '.join(read(value) for value in node.inputs if value is not None)})"
        for node in model.graph
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear", "Clip")
    ]
    return [*lines, *(f"-> {read(value)}" for value in model.graph.outputs)]


def read(value: oir.Value) -> str:
    dequantize = value.producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return value.name or ""
    zero_point = dequantize.inputs[2]
    assert zero_point is not None
    assert zero_point.const_value is not None
    zero = int(zero_point.const_value.numpy().reshape(-1)[0])
    kind = {"int8": "s8", "uint8": "u8", "int32": "s32"}[str(zero_point.const_value.numpy().dtype)]
    source, clips = dequantize.inputs[0], ""
    while source is not None and (maker := source.producer()) is not None:
        if maker.op_type not in ("QuantizeLinear", "Clip"):
            break
        clips += "|" if maker.op_type == "Clip" else ""
        source = maker.inputs[0]
    assert source is not None
    name = (source.name or "").removesuffix("_quantized").removesuffix("_float")
    return f"{name}@{kind}{f':{zero}' if zero else ''}{clips}"


CHAIN = f"""
g (float[1,8,9,9] x, {WEIGHT} w1, float[8] b1, {WEIGHT} w2, float[8] b2) => (float[1,8,5,5] y) {{
  [conv1] c = Conv (x, w1, b1)
  [relu] r = Relu (c)
  [conv2] d = Conv (r, w2, b2)
  [end] y = Sin (d)
}}
"""

RESIDUAL = f"""
g (float[1,8,9,9] x, {WEIGHT} w1, {WEIGHT} w2, {WEIGHT} w3, float[8] b) => (float[1,8,7,7] y) {{
  [enter] i = Relu (x)
  [conv1] c = Conv <pads = [1,1,1,1]> (i, w1, b)
  [relu1] r = Relu (c)
  [conv2] d = Conv <pads = [1,1,1,1]> (r, w2, b)
  [add] s = Add (d, i)
  [relu2] t = Relu (s)
  [conv3] e = Conv (t, w3, b)
  [end] y = Sin (e)
}}
"""

PROJECTED = RESIDUAL.replace("w3, float[8] b)", f"w3, float[8] b, {WEIGHT} w4)").replace(
    "[add] s = Add (d, i)", "[shortcut] p = Conv <pads = [1,1,1,1]> (i, w4, b)\n  [add] s = Add (d, p)"
)

CONCAT = f"""
g (float[1,8,9,9] x, {WEIGHT} w1, {WEIGHT} w2, float[8,16,3,3] w3) => (float[1,8,5,5] y) {{
  [conv1] c = Conv (x, w1)
  [conv2] d = Conv (x, w2)
  [concat] j = Concat <axis = 1> (c, d)
  [conv3] e = Conv (j, w3)
  [end] y = Sin (e)
}}
"""

POOLS = f"""
g (float[1,8,9,9] x, {WEIGHT} w1, {WEIGHT} w2) => (float[1,8,1,1] y, float[1,8,2,2] z) {{
  [conv1] c = Conv (x, w1)
  [relu] r = Relu (c)
  [max] m = MaxPool <kernel_shape = [2,2], strides = [2,2]> (r)
  [conv2] d = Conv <pads = [1,1,1,1]> (m, w2)
  [average] a = AveragePool <kernel_shape = [2,2]> (d)
  [end] z = Sin (a)
  [global] y = GlobalAveragePool (d)
}}
"""

HEAD = """
g (float[1,8,4,4] x, float[8,8,3,3] w1, float[32,10] w2, float[10] b) => (float[1,10] y) {
  [conv] c = Conv (x, w1)
  [flatten] f = Flatten (c)
  [gemm] y = Gemm (f, w2, b)
}
"""

ATTENTION = """
g (float[1,4,8] q, float[1,8,4] k, float[8,8] w) => (float[1,4,4] y) {
  [project] p = MatMul (q, w)
  [scores] s = MatMul (p, k)
  [end] y = Softmax (s)
}
"""

GRAPHS: dict[str, tuple[str, dict[str, QuantParams]]] = {
    "chain": (CHAIN, {"x": S8, "r": S8, "d": S8}),
    "residual": (RESIDUAL, {"i": S8, "r": S8, "t": S8, "e": S8}),
    "projected": (PROJECTED, {"i": S8, "r": S8, "t": S8, "e": S8}),
    "projected, both on grids": (PROJECTED, {"i": S8, "r": S8, "d": S8, "p": OTHER, "t": S8, "e": S8}),
    "projected, swapped": (
        PROJECTED.replace("(d, p)", "(p, d)"),
        {"i": S8, "r": S8, "p": OTHER, "t": S8, "e": S8},
    ),
    "unsigned": (CHAIN, {"x": QuantParams.make(0.02, 100, UINT8), "r": QuantParams.make(0.04, 0, UINT8)}),
    "four bits": (CHAIN, {"x": QuantParams.make(0.5, 0, INT4), "r": QuantParams.make(0.3, 0, UINT4)}),
    "concat": (CONCAT, {"x": S8, "j": S8, "e": S8}),
    "pools": (POOLS, {"x": S8, "m": S8, "d": S8, "a": OTHER}),
    "pools without a trained grid": (POOLS, {"x": S8, "m": S8, "d": DERIVED}),
    "head": (HEAD, {"x": S8, "f": S8}),
    "trained head": (HEAD, {"x": S8, "f": S8, "y": OTHER}),
    "derived head": (HEAD, {"x": S8, "f": S8, "y": DERIVED}),
    "attention": (ATTENTION, {"q": S8, "p": S8, "k": OTHER}),
}

EXPECTED: dict[tuple[str, tuple[str, ...]], list[str]] = {
    ("chain", ("ort-x86",)): [
        "Conv(x@u8:128, w1@s8, b1@s32)",
        "Relu(c)",
        "Conv(r@u8|, w2@s8, b2@s32)",
        "Sin(d@u8:128)",
    ],
    ("chain", ("ort-arm",)): [
        "Conv(x@s8, w1@s8, b1@s32)",
        "Relu(c)",
        "Conv(r@s8:-128|, w2@s8, b2@s32)",
        "Sin(d@s8)",
    ],
    ("chain", ("tensorrt", "openvino")): [
        "Conv(x@s8, w1@s8, b1)",
        "Relu(c)",
        "Conv(r@s8, w2@s8, b2)",
    ],
    ("residual", ("ort-x86",)): [
        "Relu(x)",
        "Conv(i@u8|, w1@s8, b@s32)",
        "Relu(c)",
        "Conv(r@u8|, w2@s8, b_quantized_1@s32)",
        "Add(d@u8:127, i@u8|)",
        "Relu(s)",
        "Conv(t@u8|, w3@s8, b_quantized_2@s32)",
        "Sin(e@u8:128)",
    ],
    ("residual", ("ort-arm",)): [
        "Relu(x)",
        "Conv(i@s8:-128|, w1@s8, b@s32)",
        "Relu(c)",
        "Conv(r@s8:-128|, w2@s8, b_quantized_1@s32)",
        "Add(d@s8:-1, i@s8:-128|)",
        "Relu(s)",
        "Conv(t@s8:-128|, w3@s8, b_quantized_2@s32)",
        "Sin(e@s8)",
    ],
    ("residual", ("tensorrt", "openvino")): [
        "Relu(x)",
        "Conv(i@s8, w1@s8, b)",
        "Relu(c)",
        "Conv(r@s8, w2@s8, b)",
        "Add(d, i@s8)",
        "Relu(s)",
        "Conv(t@s8, w3@s8, b)",
        "Sin(e)",
    ],
    ("projected", ("ort-x86",)): [
        "Relu(x)",
        "Conv(i@u8|, w1@s8, b@s32)",
        "Relu(c)",
        "Conv(r@u8|, w2, b)",
        "Conv(i, w4, b)",
        "Add(d, p)",
        "Relu(s)",
        "Conv(t@u8|, w3@s8, b_quantized_1@s32)",
        "Sin(e@u8:128)",
    ],
    ("projected", ("tensorrt", "openvino")): [
        "Relu(x)",
        "Conv(i@s8, w1@s8, b)",
        "Relu(c)",
        "Conv(r@s8, w2@s8, b)",
        "Conv(i@s8, w4@s8, b)",
        "Add(d, p)",
        "Relu(s)",
        "Conv(t@s8, w3@s8, b)",
        "Sin(e)",
    ],
    ("projected, both on grids", ("ort-x86",)): [
        "Relu(x)",
        "Conv(i@u8|, w1@s8, b@s32)",
        "Relu(c)",
        "Conv(r@u8|, w2@s8, b_quantized_1@s32)",
        "Conv(i@u8|, w4@s8, b_quantized_2@s32)",
        "Add(d@u8:128, p@u8:128)",
        "Relu(s)",
        "Conv(t@u8|, w3@s8, b_quantized_3@s32)",
        "Sin(e@u8:128)",
    ],
    ("projected, both on grids", ("tensorrt", "openvino")): [
        "Relu(x)",
        "Conv(i@s8, w1@s8, b)",
        "Relu(c)",
        "Conv(r@s8, w2@s8, b)",
        "Conv(i@s8, w4@s8, b)",
        "Add(d, p@s8)",
        "Relu(s)",
        "Conv(t@s8, w3@s8, b)",
        "Sin(e)",
    ],
    ("projected, swapped", ("ort-x86",)): [
        "Relu(x)",
        "Conv(i@u8|, w1@s8, b@s32)",
        "Relu(c)",
        "Conv(r@u8|, w2@s8, b_quantized_1@s32)",
        "Conv(i@u8|, w4@s8, b_quantized_2@s32)",
        "Add(p@u8:128, d@u8:69)",
        "Relu(s)",
        "Conv(t@u8|, w3@s8, b_quantized_3@s32)",
        "Sin(e@u8:128)",
    ],
    ("projected, swapped", ("tensorrt", "openvino")): [
        "Relu(x)",
        "Conv(i@s8, w1@s8, b)",
        "Relu(c)",
        "Conv(r@s8, w2@s8, b)",
        "Conv(i@s8, w4@s8, b)",
        "Add(p@s8, d)",
        "Relu(s)",
        "Conv(t@s8, w3@s8, b)",
        "Sin(e)",
    ],
    ("unsigned", ("ort-x86",)): [
        "Conv(x@u8:100, w1@s8, b1@s32)",
        "Relu(c)",
        "Conv(r@u8, w2, b2)",
    ],
    ("unsigned", ("ort-arm",)): [
        "Conv(x@s8:-28, w1@s8, b1@s32)",
        "Relu(c)",
        "Conv(r@s8:-128, w2, b2)",
    ],
    ("unsigned", ("tensorrt",)): [
        "Conv(x@s8, w1@s8, b1)",
        "Relu(c)",
        "Conv(r@s8, w2@s8, b2)",
    ],
    ("unsigned", ("openvino",)): [
        "Conv(x@u8:100, w1@s8, b1)",
        "Relu(c)",
        "Conv(r@u8, w2@s8, b2)",
    ],
    ("four bits", ("ort-x86",)): [
        "Conv(x@u8:8|, w1@s8, b1@s32)",
        "Relu(c)",
        "Conv(r@u8|, w2, b2)",
    ],
    ("four bits", ("ort-arm",)): [
        "Conv(x@s8|, w1@s8, b1@s32)",
        "Relu(c)",
        "Conv(r@s8:-128|, w2, b2)",
    ],
    ("four bits", ("tensorrt",)): [
        "Conv(x@s8|, w1@s8, b1)",
        "Relu(c)",
        "Conv(r@s8|, w2@s8, b2)",
    ],
    ("four bits", ("openvino",)): [
        "Conv(x@s8|, w1@s8, b1)",
        "Relu(c)",
        "Conv(r@u8|, w2@s8, b2)",
    ],
    ("concat", ("ort-x86",)): [
        "Conv(x@u8:128, w1@s8)",
        "Conv(x@u8:128, w2@s8)",
        "Concat(c@u8:128, d@u8:128)",
        "Conv(j@u8:128, w3@s8)",
        "Sin(e@u8:128)",
    ],
    ("concat", ("tensorrt", "openvino")): [
        "Conv(x@s8, w1@s8)",
        "Conv(x@s8, w2@s8)",
        "Concat(c@s8, d@s8)",
        "Conv(j@s8, w3@s8)",
        "Sin(e)",
    ],
    ("pools", ("ort-x86",)): [
        "Conv(x@u8:128, w1@s8)",
        "Relu(c)",
        "MaxPool(r@u8|)",
        "Conv(m@u8|, w2@s8)",
        "AveragePool(d@u8:128)",
        "Sin(a)",
        "GlobalAveragePool(d@u8:128)",
        "-> y@u8:128",
    ],
    ("pools", ("tensorrt", "openvino")): [
        "Conv(x@s8, w1@s8)",
        "Relu(c)",
        "MaxPool(r)",
        "Conv(m@s8, w2@s8)",
        "AveragePool(d@s8)",
        "Sin(a)",
        "GlobalAveragePool(d@s8)",
        "-> y@s8",
    ],
    ("head", ("ort-x86",)): [
        "Conv(x@u8:128, w1@s8)",
        "Flatten(c@u8:128)",
        "Gemm(f@u8:128, w2@s8, b@s32)",
    ],
    ("head", ("tensorrt", "openvino")): [
        "Conv(x@s8, w1@s8)",
        "Flatten(c)",
        "Gemm(f@s8, w2@s8, b)",
    ],
    ("attention", ("ort-x86",)): [
        "MatMul(q@u8:128, w@s8)",
        "MatMul(p@u8:128, k@u8:128)",
        "Softmax(s)",
    ],
    ("attention", ("tensorrt", "openvino")): [
        "MatMul(q@s8, w@s8)",
        "MatMul(p@s8, k@s8)",
        "Softmax(s)",
    ],
    ("pools without a trained grid", ("ort-x86",)): [
        "Conv(x@u8:128, w1@s8)",
        "Relu(c)",
        "MaxPool(r@u8|)",
        "Conv(m@u8|, w2@s8)",
        "AveragePool(d@u8:128)",
        "Sin(a)",
        "GlobalAveragePool(d@u8:128)",
    ],
    ("pools without a trained grid", ("tensorrt", "openvino")): [
        "Conv(x@s8, w1@s8)",
        "Relu(c)",
        "MaxPool(r)",
        "Conv(m@s8, w2@s8)",
        "AveragePool(d)",
        "Sin(a)",
        "GlobalAveragePool(d)",
    ],
    ("trained head", ("ort-x86",)): [
        "Conv(x@u8:128, w1@s8)",
        "Flatten(c@u8:128)",
        "Gemm(f@u8:128, w2@s8, b@s32)",
        "-> y@u8:128",
    ],
    ("trained head", ("tensorrt", "openvino")): [
        "Conv(x@s8, w1@s8)",
        "Flatten(c)",
        "Gemm(f@s8, w2@s8, b)",
        "-> y@s8",
    ],
    ("derived head", ("ort-x86",)): [
        "Conv(x@u8:128, w1@s8)",
        "Flatten(c@u8:128)",
        "Gemm(f@u8:128, w2@s8, b@s32)",
    ],
    ("derived head", ("tensorrt", "openvino")): [
        "Conv(x@s8, w1@s8)",
        "Flatten(c)",
        "Gemm(f@s8, w2@s8, b)",
    ],
}
"""``|`` is a Clip, of integers behind Quantize or of floats in front of it, that cuts off levels."""


@pytest.mark.parametrize(
    ("graph", "target", "lines"),
    [(graph, target, lines) for (graph, targets), lines in EXPECTED.items() for target in targets],
    ids=[f"{graph}-{target}" for graph, targets in EXPECTED for target in targets],
)
def test_quantizers_stand_where_the_target_wants_them(graph: str, target: str, lines: list[str]) -> None:
    text, scales = GRAPHS[graph]
    found = [line for line in placed(text, target, scales) if line not in ("-> y", "-> z", "Sin(d)")]
    assert found == lines


@pytest.mark.parametrize("graph", GRAPHS)
def test_what_is_placed_for_tensorrt_breaks_none_of_its_rules(graph: str) -> None:
    text, scales = GRAPHS[graph]
    reasons = [finding.reason for finding in broken_rules(place(text, "tensorrt", scales))]
    unbounded = ["the residual input is not quantized, so the layer ends in float"]
    assert reasons == (unbounded if graph == "projected" else [])
