"""Weights with a zero point: which channels keep their integers, and what the others are rounded to."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TARGET, apply, graph_text, run

from qat2int8.ir import INT8, UINT8, Code, Contract, Model, OpRule, QuantDType, QuantParams, Severity
from qat2int8.passes import Context
from qat2int8.passes.centre_weights import CentreWeights
from qat2int8.passes.fuse_conv_bn import FuseConvBn
from qat2int8.passes.insert_quantize_dequantize import InsertQuantizeDequantize
from qat2int8.pipelines.convert import convert

NARROW = QuantDType(8, signed=True, narrow_range=True)
CTX = Context(
    replace(
        TARGET,
        ops={
            "Conv": OpRule(Contract.COMPUTE, weight_axis=0),
            "Gemm": OpRule(Contract.COMPUTE, float_output=True, weight_axis=1),
            "MatMul": OpRule(Contract.COMPUTE, float_output=True, weight_axis=1),
            "Mul": OpRule(Contract.ELEMENTWISE, data_inputs=(0, 1)),
        },
    )
)

Levels = list[list[int]]


def layer(
    levels: Levels | np.ndarray,
    params: QuantParams,
    body: str = "y = Gemm <transB = 1> (x, w)",
    extra: str = "",
    image: str = "",
) -> Model:
    """A model whose weight ``w`` holds ``levels`` of the grid ``params``; ``image`` adds dimensions to ``x``."""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, M{image}] x) => (float[A, B{image}] y{extra}) {{ {body} }}"""
    )
    weights = params.dequantize(np.asarray(levels, np.int64))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    model = Model.from_proto(proto)
    model.scales.set(model.graph.initializers["w"], params)
    return model


def grid(model: Model) -> QuantParams:
    return model.scales[model.graph.initializers["w"]]


def written(model: Model) -> list[list[int]]:
    """The integers placement writes for ``w``."""
    array = model.constant(model.graph.initializers["w"])
    assert array is not None
    levels: list[list[int]] = grid(model).quantize(array).tolist()
    return levels


FITTING: Levels = [[3, 100, 227], [130, 100, -0], [227, 0, 100]]
"""Around 100 these are -97, 0, 127; 30, 0, -100; 127, -100, 0."""


def test_channels_that_fit_keep_step_and_integers() -> None:
    model = layer(FITTING, QuantParams.make(0.25, 100, UINT8, origin="DequantizeLinear 'd'"))
    before, values = graph_text(model), model.constant(model.graph.initializers["w"])
    result = apply(CentreWeights(), model, CTX)
    assert result.counts == {"centred": 1, "rounded again": 0, "moved to int8": 0, "left in float": 0}
    assert not result.diagnostics
    assert grid(model).same_grid(QuantParams.make(0.25, 0, NARROW))
    assert grid(model).origin == "DequantizeLinear 'd', centred"
    assert written(model) == [[-97, 0, 127], [30, 0, -100], [127, -100, 0]]
    assert graph_text(model) == before
    np.testing.assert_array_equal(model.constant(model.graph.initializers["w"]), values)


def test_a_channel_that_does_not_fit_is_rounded_to_the_step_of_its_farthest_level() -> None:
    model = layer([[3, 100, 227], [254, 100, 101], [255, 0, 100]], QuantParams.make(0.25, 100, UINT8))
    result = apply(CentreWeights(), model, CTX)
    assert result.counts == {"centred": 0, "rounded again": 1, "moved to int8": 0, "left in float": 0}
    params = grid(model)
    assert (params.axis, params.dtype) == (0, NARROW)
    np.testing.assert_allclose(params.scale, [0.25, 0.25 * 154 / 127, 0.25 * 155 / 127], rtol=1e-7)
    assert written(model) == [[-97, 0, 127], [127, 0, 1], [127, -82, 0]]
    (note,) = result.diagnostics
    assert (note.code, note.severity, note.value) == (Code.WEIGHT_REQUANTIZED, Severity.WARNING, "w")
    assert note.reason.startswith("2 of 3 channels")
    worst = max(abs(155 / 127 * 82 - 100), abs(154 / 127 - 1))
    assert f"by up to {worst:.2f} of a trained step" in note.reason


def test_the_lowest_level_of_int8_is_kept() -> None:
    model = layer([[0, 128, 255], [100, 128, 130]], QuantParams.make(0.25, 128, UINT8))
    apply(CentreWeights(), model, CTX)
    assert grid(model).same_grid(QuantParams.make(0.25, 0, INT8))
    assert written(model) == [[-128, 0, 127], [-28, 0, 2]]


@pytest.mark.parametrize(("level", "counts"), [(228, "rounded again"), (227, "centred")])
def test_the_highest_level_that_fits(level: int, counts: str) -> None:
    result = apply(CentreWeights(), layer([[level, 100]], QuantParams.make(0.25, 100, UINT8)), CTX)
    assert result.counts[counts] == 1


def test_a_lowest_level_beyond_int8() -> None:
    params = QuantParams.make(0.25, 10, INT8)
    model = layer([[-119, 10], [-118, 10], [-117, 10]], params)
    apply(CentreWeights(), model, CTX)
    assert written(model) == [[-127, 0], [-128, 0], [-127, 0]]
    assert grid(model).scale.tolist() == [np.float32(0.25 * 129 / 127), 0.25, 0.25]


def test_zero_points_per_channel() -> None:
    params = QuantParams.make([0.25, 0.5], [100, 0], UINT8, axis=0)
    model = layer([[3, 227], [0, 200]], params)
    apply(CentreWeights(), model, CTX)
    assert written(model) == [[-97, 127], [0, 127]]
    np.testing.assert_allclose(grid(model).scale, [0.25, 0.5 * 200 / 127], rtol=1e-7)


@pytest.mark.parametrize(
    ("body", "axis"), [("y = Gemm (x, w)", 1), ("y = MatMul (x, w)", 1), ("y = Gemm <transB = 1> (x, w)", 0)]
)
def test_channels_are_those_of_the_output(body: str, axis: int) -> None:
    model = layer([[255, 100], [100, 100]], QuantParams.make(0.25, 100, UINT8), body)
    apply(CentreWeights(), model, CTX)
    assert grid(model).axis == axis
    np.testing.assert_allclose(grid(model).scale, [0.25 * 155 / 127, 0.25], rtol=1e-7)


def test_a_target_without_steps_per_channel_gets_one_step() -> None:
    ctx = Context(replace(CTX.target, per_channel_weights=False))
    model = layer([[255, 100], [0, 100]], QuantParams.make(0.25, 100, UINT8))
    (note,) = apply(CentreWeights(), model, ctx).diagnostics
    assert note.reason.startswith("1 of 1 channels")
    assert grid(model).same_grid(QuantParams.make(0.25 * 155 / 127, 0, NARROW))


def test_exact_leaves_layers_in_float_that_would_be_rounded() -> None:
    params = QuantParams.make(0.25, 100, UINT8)
    model = layer([[255, 100], [0, 100]], params)
    model.scales.set(model.graph.inputs[0], QuantParams.make(0.5, 128, UINT8))
    before, weight = model.to_proto(), model.graph.initializers["w"]
    result = apply(CentreWeights(exact=True), model, CTX)
    assert result.counts == {"centred": 0, "rounded again": 0, "moved to int8": 0, "left in float": 1}
    assert weight not in model.scales
    (note,) = result.diagnostics
    assert (note.code, note.severity) == (Code.KEPT_FLOAT, Severity.NOTE)
    assert "1 of 2 channels" in note.reason
    InsertQuantizeDequantize().run(model, CTX)
    assert model.to_proto() == before
    assert apply(CentreWeights(exact=True), layer(FITTING, params), CTX).counts["centred"] == 1


ANY = Context(replace(CTX.target, weight_zero_point="any"))
CONV = "y = Conv (x, w)"


def test_exact_keeps_the_zero_point_where_the_kernels_take_one() -> None:
    model = layer([[255, 100], [0, 100]], QuantParams.make(0.25, 100, UINT8))
    result = apply(CentreWeights(exact=True), model, ANY)
    assert result.counts == {"centred": 0, "rounded again": 0, "moved to int8": 1, "left in float": 0}
    assert not result.diagnostics
    assert grid(model).same_grid(QuantParams.make(0.25, -28, INT8))
    assert written(model) == [[127, -28], [-128, -28]]


def test_without_exact_it_is_not_kept() -> None:
    model = layer([[255, 100], [0, 100]], QuantParams.make(0.25, 100, UINT8))
    assert apply(CentreWeights(), model, ANY).counts["rounded again"] == 1


def test_exact_still_centres_what_fits() -> None:
    model = layer(FITTING, QuantParams.make(0.25, 100, UINT8))
    assert apply(CentreWeights(exact=True), model, ANY).counts["centred"] == 1
    assert grid(model).symmetric


@pytest.mark.parametrize(
    ("zeros", "body", "kept"),
    [
        ([100, 90], CONV, True),
        ([100, 100], "y = Conv <group = 2> (x, w)", True),
        ([100, 90], "y = Conv <group = 2> (x, w)", False),
    ],
    ids=["one group", "grouped, one zero point", "grouped, two zero points"],
)
def test_a_grouped_layer_takes_one_zero_point(zeros: list[int], body: str, kept: bool) -> None:
    params = QuantParams.make([0.25, 0.5], zeros, UINT8, axis=0)
    model = layer(np.reshape([255, 0], (2, 1, 1, 1)), params, body, image=", H, W")
    counts = apply(CentreWeights(exact=True), model, ANY).counts
    assert (counts["moved to int8"], counts["left in float"]) == (int(kept), int(not kept))


def test_a_signed_weight_stays_as_it_is() -> None:
    params = QuantParams.make(0.25, -28, INT8)
    model = layer([[127, -28], [-128, -28]], params)
    assert not apply(CentreWeights(exact=True), model, ANY).modified
    assert grid(model) is params


@pytest.mark.parametrize("bias", ["", ", b"])
@pytest.mark.parametrize("zeros", [[100], [100, 90]])
def test_placement_writes_the_trained_integers_and_the_runtime_computes_with_them(
    zeros: list[int], bias: str
) -> None:
    shape, rng = (2, 3, 1, 1), np.random.default_rng(0)
    steps = [0.01, 0.02][: len(zeros)]
    scale, zero = (steps, zeros) if len(zeros) > 1 else (steps[0], zeros[0])
    axis = 0 if len(zeros) > 1 else None
    levels = rng.integers(0, 256, shape)
    levels.reshape(-1)[[0, 4]] = 255
    model = layer(levels, QuantParams.make(scale, zero, UINT8, axis=axis), "y = Conv (x, w)", image=", H, W")
    if bias:
        model.graph[0].resize_inputs(3)
        model.graph[0].replace_input_with(2, model.add_initializer("b", np.asarray([0.5, -0.5], np.float32)))
    before = model.to_proto()
    for value, step in ((model.graph.inputs[0], 0.05), (model.graph.outputs[0], 0.1)):
        model.scales.set(value, QuantParams.make(step, 128, UINT8))
    CentreWeights(exact=True).run(model, ANY)
    InsertQuantizeDequantize().run(model, ANY)
    stored = next(value for name, value in model.graph.initializers.items() if name.startswith("w_quantized"))
    array = model.constant(stored)
    assert array is not None
    np.testing.assert_array_equal(array.astype(np.int16) + 128, levels)
    x = QuantParams.make(0.05, 128, UINT8).dequantize(rng.integers(0, 256, (4, 3, 5, 5)))
    (exact,), (actual,) = run(before, {"x": x}), run(model, {"x": x}, optimize=True)
    limited = np.clip(exact, -12.8, 12.7)
    assert np.abs(actual - limited).max() <= 0.05 + 1e-4


@pytest.mark.parametrize(
    ("body", "extra"),
    [
        ("u = Gemm <transB = 1> (x, w) y = Gemm (u, w)", ""),
        ("u = Gemm <transB = 1> (x, w) y = Mul (u, w)", ""),
        ("y = Mul (x, w)", ""),
        ("y = Gemm (w, x)", ""),
        ("y = Gemm (x, x, w)", ""),
        ("y = Gemm (x, w) v = Neg (w)", ", float[A, B] v"),
    ],
)
def test_weights_with_other_readers_are_left(body: str, extra: str) -> None:
    params = QuantParams.make(0.25, 100, UINT8)
    model = layer(FITTING, params, body, extra)
    assert not apply(CentreWeights(), model, CTX).modified
    assert grid(model) is params


def test_a_layer_in_the_body_of_a_control_flow_node_is_no_kernel() -> None:
    branch = "() => (float[A, B] t) { t = Gemm <transB = 1> (x, w) }"
    choice = f"y = If (d) <then_branch = a {branch}, else_branch = b {branch}>"
    body = f"c = ReduceMax <keepdims = 0> (x) d = Cast <to = 9> (c) {choice}"
    assert not apply(CentreWeights(), layer(FITTING, QuantParams.make(0.25, 100, UINT8), body), CTX).modified


def test_a_weight_that_is_a_graph_output_keeps_its_values() -> None:
    model = layer(FITTING, QuantParams.make(0.25, 100, UINT8), extra=", float[3, 3] w")
    values = model.constant(model.graph.initializers["w"])
    assert apply(CentreWeights(), model, CTX).modified
    np.testing.assert_array_equal(model.constant(model.graph.initializers["w"]), values)


def test_two_layers_with_the_same_channels_share_the_weight() -> None:
    body = "u = Gemm <transB = 1> (x, w) y = Gemm <transB = 1> (u, w)"
    assert apply(CentreWeights(), layer(FITTING, QuantParams.make(0.25, 100, UINT8), body), CTX).modified


@pytest.mark.parametrize(
    "params",
    [
        QuantParams.make(0.25, 0, INT8),
        QuantParams.make(0.25, 0, UINT8),
        QuantParams.make(0.25, 100, QuantDType(16, signed=False)),
        QuantParams.make([0.25, 0.5, 1], [100, 1, 2], UINT8, axis=1),
    ],
)
def test_other_grids_are_left(params: QuantParams) -> None:
    """Zero point 0, 16 bits, and steps along the input channels."""
    model = layer(FITTING, params)
    assert not apply(CentreWeights(), model, CTX).modified
    assert grid(model) is params


def test_activations_are_left() -> None:
    model = layer(FITTING, QuantParams.make(0.25, 0, INT8))
    model.scales.set(model.graph.inputs[0], QuantParams.make(0.25, 100, UINT8))
    assert not apply(CentreWeights(), model, CTX).modified


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 9999),
    zero=st.integers(0, 255),
    spread=st.floats(5, 120),
    scale=st.floats(2**-12, 8, width=32),
    bits=st.integers(2, 8),
)
def test_exact_channels_are_exact_and_the_others_within_a_step(
    seed: int, zero: int, spread: float, scale: float, bits: int
) -> None:
    dtype = QuantDType(bits, signed=False)
    zero = zero % (dtype.qmax + 1)
    rng = np.random.default_rng(seed)
    levels = np.clip(np.rint(rng.normal(zero, spread, (6, 20))), 0, dtype.qmax).astype(np.int64)
    model = layer(levels, QuantParams.make(scale, zero, dtype))
    apply(CentreWeights(), model, CTX)
    params, centred = grid(model), levels - zero
    steps = np.broadcast_to(params.scale, 6)
    if not zero:
        return
    integers = np.asarray(written(model))
    fits = (centred.min(axis=1) >= -128) & (centred.max(axis=1) <= 127)
    assert np.all(steps[fits] == np.float32(scale))
    np.testing.assert_array_equal(integers[fits], centred[fits])
    error = np.abs(integers * (steps[:, None] / np.float64(scale)) - centred)
    assert np.all(error[~fits] <= np.float64(steps[~fits, None]) / scale / 2 * 1.001)
    assert np.all(np.abs(integers[~fits]).max(axis=1) == 127)


def test_placement_writes_the_centred_integers_and_the_layer_computes_the_same() -> None:
    model = layer(FITTING, QuantParams.make(0.25, 100, UINT8))
    model.scales.set(model.graph.inputs[0], QuantParams.make(0.5, 128, UINT8))
    before = model.to_proto()
    apply(CentreWeights(), model, CTX)
    InsertQuantizeDequantize().run(model, CTX)
    integers = model.constant(model.graph.initializers["w_quantized"])
    assert integers is not None
    assert integers.dtype == np.int8
    assert integers.tolist() == [[-97, 0, 127], [30, 0, -100], [127, -100, 0]]
    feeds = {"x": np.arange(-6, 6, dtype=np.float32).reshape(4, 3) * 0.5}
    np.testing.assert_array_equal(run(model, feeds)[0], run(before, feeds)[0])


@pytest.mark.parametrize("gamma", [[2.0, 0.5], [2.0, -0.5], [-1.0, -1.0]])
def test_folding_a_normalization_keeps_grids_with_a_zero_point_right(gamma: list[float]) -> None:
    """A negative factor mirrors the levels, so the zero point has to be mirrored with them."""
    model = parse_conv(gamma)
    params = QuantParams.make(0.25, 100, UINT8)
    levels = np.asarray([[[[3, 227]]], [[[100, 180]]]])
    value = model.graph.initializers["w"]
    model.scales.set(value, params)
    before = model.to_proto()
    assert FuseConvBn().run(model, CTX).counts["fused"] == 1
    folded = model.scales[value]
    sign = np.sign(gamma).reshape(2, 1, 1, 1)
    array = model.constant(value)
    assert array is not None
    zeros = folded.zero_point.reshape(-1, 1, 1, 1).astype(int)
    np.testing.assert_array_equal(folded.quantize(array).astype(int) - zeros, (levels - 100) * sign)
    np.testing.assert_allclose(folded.dequantize(folded.quantize(array)), array, rtol=1e-6)
    apply(CentreWeights(), model, CTX)
    centred = model.scales[value]
    assert centred.symmetric
    np.testing.assert_array_equal(centred.quantize(array), (levels - 100) * sign)
    feeds = {"x": np.ones((1, 1, 3, 3), np.float32)}
    np.testing.assert_allclose(run(model, feeds)[0], run(before, feeds)[0], rtol=1e-5)


def parse_conv(gamma: list[float]) -> Model:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[1,1,3,3] x) => (float[1,2,3,2] y)
    <float[2,1,1,2] w = {-24.25, 31.75, 0, 20}, float[2] gamma = {GAMMA}, float[2] beta = {1, 2},
     float[2] mean = {3, 4}, float[2] var = {1, 4}> {
      c = Conv (x, w)
      y = BatchNormalization <epsilon = 0.0> (c, gamma, beta, mean, var)
    }""".replace("GAMMA", ", ".join(map(str, gamma)))
    return Model.from_proto(onnx.parser.parse_model(text))


MODELS = os.environ.get("QAT2INT8_ZOO", "")


@pytest.mark.zoo
@pytest.mark.skipif(not MODELS, reason="QAT2INT8_ZOO names no folder of models")
@pytest.mark.parametrize("name", ["brev_lenet_shifted_qcdq", "ort_lenet_qdq_u8u8"])
def test_exported_models_with_zero_points_become_integer(name: str) -> None:
    source = Path(MODELS) / f"{name}.onnx"
    conversion = convert(source)
    assert {d.pass_name for d in conversion.diagnostics if d.code is Code.WEIGHT_REQUANTIZED} <= {"centre-weights"}
    assert conversion.certificate.integer_macs_percent == 100.0
    weights = [t for t in conversion.model.graph.initializers.values() if (t.name or "").endswith("_quantized")]
    assert {value.dtype.name for value in weights if value.dtype is not None} <= {"INT8", "INT32"}
    data = np.load(source.with_suffix(".npz"))
    name_in = conversion.model.graph.inputs[0].name or ""
    actual = run(conversion.model, {name_in: data["input_0"]}, optimize=True)[0]
    assert np.mean(actual.argmax(-1) == data["output_0"].argmax(-1)) >= 0.99
