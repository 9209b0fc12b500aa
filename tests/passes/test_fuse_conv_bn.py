import numpy as np
import onnx
import onnx_ir as oir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TARGET, apply, assert_same_numbers, check_pass, graph_text, named, parse, run

from qat2int8.ir import INT8, UINT8, Code, Model, Provenance, QuantDType, QuantParams, Severity
from qat2int8.passes import Context, PassResult
from qat2int8.passes.affine_chain import batch_norm_link
from qat2int8.passes.fuse_conv_bn import FuseConvBn

RNG = np.random.default_rng(7)

BEFORE = """
g (float[N, 1, 4, 4] x) => (float[N, 2, 4, 4] y)
  <float[2, 1, 1, 1] w = {2, 4}, float[2] b = {1, 2},
   float[2] gamma = {3, -1}, float[2] beta = {10, 20}, float[2] mean = {1, 3}, float[2] var = {8, 3}> {
  [conv] c = Conv (x, w, b)
  [bn] y = BatchNormalization <epsilon = 1.0> (c, gamma, beta, mean, var)
}
"""


def of(model: Model, name: str) -> QuantParams:
    return model.scales[model.values()[name]]


def array(model: Model, name: str) -> np.ndarray:
    constant = model.constant(model.values()[name])
    assert constant is not None
    return constant


def trained(levels: np.ndarray, grid: QuantParams) -> np.ndarray:
    return grid.dequantize(levels.astype(grid.dtype.numpy))


def conv_bn(
    weights: np.ndarray,
    gamma: np.ndarray,
    *,
    grid: QuantParams | None = None,
    op: str = "Conv",
    group: int = 1,
    bias: bool = True,
) -> Model:
    """x -> conv/deconv -> BN -> y with random statistics, ``weights`` on ``grid``."""
    channels = gamma.size
    arrays = {
        "w": weights,
        "gamma": gamma,
        "beta": RNG.normal(size=channels),
        "mean": RNG.normal(size=channels),
        "var": RNG.uniform(0.5, 2, channels),
    }
    inputs = ["x", "w"]
    if bias:
        arrays["b"] = RNG.normal(size=channels)
        inputs.append("b")
    inits = [onnx.numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()]
    rows = weights.shape[1] * group if op == "Conv" else weights.shape[0]
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node(op, inputs, ["c"], "conv", group=group),
            onnx.helper.make_node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["y"], "bn"),
        ],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [2, rows, 5, 5])],
        [onnx.helper.make_tensor_value_info("y", 1, None)],
        inits,
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    model = Model.from_proto(onnx.shape_inference.infer_shapes(proto))
    if grid is not None:
        model.scales.set(model.values()["w"], grid)
    return model


def test_weight_and_bias_take_the_normalization_in() -> None:
    model, result = check_pass(
        FuseConvBn(),
        BEFORE,
        """
        g (float[N, 1, 4, 4] x) => (float[N, 2, 4, 4] y)
          <float[2, 1, 1, 1] w = {2, -2}, float[2] b = {10, 20.5},
           float[2] gamma = {3, -1}, float[2] beta = {10, 20}, float[2] mean = {1, 3}, float[2] var = {8, 3}>
          { [conv] y = Conv (x, w, b) }
        """,
    )
    assert dict(result.counts) == {"fused": 1, "statistics recorded": 0}
    assert result.diagnostics == ()
    moments = model.moments[model.graph.outputs[0]]
    np.testing.assert_array_equal(moments.mean, [10, 20])
    np.testing.assert_array_equal(moments.std, [3, 1])
    assert (moments.axis, moments.origin) == (1, "BatchNormalization 'bn'")


def test_a_layer_without_bias_gets_one() -> None:
    text = BEFORE.replace("Conv (x, w, b)", "Conv (x, w)")
    model = parse(text)
    before = model.to_proto()
    apply(FuseConvBn(), model)
    assert [n.op_type for n in model.graph] == ["Conv"]
    assert_same_numbers(before, model, {"x": RNG.normal(size=(1, 1, 4, 4)).astype(np.float32)})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("op", "shape", "group", "channels"),
    [
        ("Conv", (4, 3, 3, 3), 1, 4),
        ("Conv", (6, 1, 3, 3), 3, 6),
        ("ConvTranspose", (3, 4, 2, 2), 1, 4),
        ("ConvTranspose", (4, 3, 2, 2), 2, 6),
        ("ConvTranspose", (4, 1, 2, 2), 4, 4),
    ],
)
def test_numbers_stay(op: str, shape: tuple[int, ...], group: int, channels: int, bias: bool) -> None:
    model = conv_bn(RNG.normal(size=shape), RNG.normal(size=channels), op=op, group=group, bias=bias)
    before = model.to_proto()
    assert apply(FuseConvBn(), model).counts["fused"] == 1
    rows = shape[1] * group if op == "Conv" else shape[0]
    assert_same_numbers(before, model, {"x": RNG.normal(size=(2, rows, 5, 5)).astype(np.float32)})
    assert [n.op_type for n in model.graph] == [op]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_trained_integers_survive_bit_for_bit(data: st.DataObject) -> None:
    channels = data.draw(st.integers(1, 5))
    op = data.draw(st.sampled_from(["Conv", "ConvTranspose"]))
    axis = 0 if op == "Conv" else 1
    positive = st.floats(2.0**-18, 64.0, width=32)
    per_channel = data.draw(st.booleans())
    steps = data.draw(st.lists(positive, min_size=channels, max_size=channels))
    gamma = np.array(
        data.draw(
            st.lists(
                st.floats(-8, 8, width=32).filter(lambda g: g == 0 or abs(g) > 2**-20),
                min_size=channels,
                max_size=channels,
            )
        ),
        np.float32,
    )
    grid = QuantParams.make(steps if per_channel else steps[0], 0, INT8, axis=axis if per_channel else None)
    shape = (channels, 2, 3, 3) if op == "Conv" else (2, channels, 3, 3)
    seed = data.draw(st.integers(0, 1000))
    levels = np.random.default_rng(seed).integers(-127, 128, shape)
    model = conv_bn(trained(levels, grid), gamma, grid=grid, op=op)
    link = batch_norm_link(model, list(model.graph)[1])
    result = apply(FuseConvBn(), model)
    after, signs = of(model, "w"), np.sign(link.affine.factor).astype(int)
    spread = signs.reshape((-1, 1, 1, 1) if axis == 0 else (1, -1, 1, 1))
    np.testing.assert_array_equal(after.quantize(array(model, "w")), levels * spread)
    np.testing.assert_array_equal(after.dequantize(levels * spread), array(model, "w"))
    expected = np.broadcast_to(grid.scale, channels) * np.where(signs == 0, 1, np.abs(link.affine.factor))
    np.testing.assert_allclose(np.broadcast_to(after.scale, channels), expected, rtol=1e-6)
    assert after.symmetric
    assert after.source is Provenance.TRAINED
    assert result.diagnostics == ()


def with_grid(grid: QuantParams, text: str = BEFORE) -> tuple[Model, PassResult]:
    model = parse(text)
    model.scales.set(model.values()["w"], grid)
    return model, apply(FuseConvBn(), model)


def test_a_grid_for_the_whole_tensor_becomes_one_per_channel() -> None:
    model, _ = with_grid(QuantParams.make(0.5, origin="DequantizeLinear 'd'"))
    grid = of(model, "w")
    assert (grid.axis, grid.scale.tolist()) == (0, [0.5, 0.25])
    assert grid.origin == "DequantizeLinear 'd', scaled by BatchNormalization 'bn'"
    np.testing.assert_array_equal(grid.quantize(array(model, "w")).reshape(-1), [4, -8])


def test_a_grid_for_the_whole_tensor_stays_one_where_all_channels_scale_alike() -> None:
    model, _ = with_grid(QuantParams.make(0.5), BEFORE.replace("{3, -1}", "{-6, -4}"))
    grid = of(model, "w")
    assert (grid.axis, float(grid.scale)) == (None, 1.0)
    np.testing.assert_array_equal(grid.quantize(array(model, "w")).reshape(-1), [-4, -8])


def test_a_channel_multiplied_by_zero_keeps_its_step() -> None:
    model, result = with_grid(QuantParams.make([0.5, 2.0], axis=0), BEFORE.replace("{3, -1}", "{0, -1}"))
    assert of(model, "w").scale.tolist() == [0.5, 1.0]
    assert array(model, "w").reshape(-1).tolist() == [0, -2]
    assert array(model, "b").tolist() == [10, 20.5]
    assert result.diagnostics == ()


def test_the_lowest_level_has_no_mirror_image() -> None:
    """Channel 0 keeps its sign and may hold -128; channel 1 changes sign and holds it too."""
    text = BEFORE.replace("w = {2, 4}", "w = {-128, -256}")
    model, result = with_grid(QuantParams.make([1.0, 2.0], axis=0), text)
    grid = of(model, "w")
    np.testing.assert_array_equal(grid.scale, np.array([1, 128 / 127], np.float32))
    np.testing.assert_array_equal(array(model, "w").reshape(-1), [-128, 128])
    np.testing.assert_array_equal(grid.quantize(array(model, "w")).reshape(-1), [-128, 127])
    (note,) = result.diagnostics
    assert (note.code, note.node, note.value) == (Code.WEIGHT_REQUANTIZED, "conv", "w")
    assert note.severity is Severity.WARNING
    assert "1 of 2 channels" in note.reason


def test_only_the_channels_that_hold_the_lowest_level_lose_their_step() -> None:
    text = BEFORE.replace("w = {2, 4}", "w = {2, -256}").replace("{3, -1}", "{-3, -1}")
    model, result = with_grid(QuantParams.make([1.0, 2.0], axis=0), text)
    np.testing.assert_array_equal(of(model, "w").scale, np.array([1, 128 / 127], np.float32))
    assert "1 of 2 channels" in result.diagnostics[0].reason


def test_a_step_that_overflows_is_a_reason_not_to_fold() -> None:
    text = BEFORE.replace("w = {2, 4}", "w = {0, 4}").replace("{3, -1}", "{1e10, -1}")
    model, result = with_grid(QuantParams.make([1e30, 2.0], axis=0), text)
    assert "weight scale overflows" in result.diagnostics[0].reason
    assert of(model, "w").scale.tolist() == np.array([1e30, 2.0], np.float32).tolist()


def test_parameters_of_another_length_are_left_alone() -> None:
    model = parse(BEFORE)
    for name in ("gamma", "beta", "mean", "var"):
        model.values()[name].const_value = oir.tensor(np.ones(3, np.float32), name=name)
    (note,) = FuseConvBn().run(model, Context(TARGET)).diagnostics
    assert "do not run along the output channels" in note.reason


def test_a_narrow_grid_mirrors_exactly() -> None:
    text = BEFORE.replace("w = {2, 4}", "w = {-127, -254}")
    narrow = QuantDType(8, signed=True, narrow_range=True)
    model, result = with_grid(QuantParams.make([1.0, 2.0], 0, narrow, axis=0), text)
    assert of(model, "w").scale.tolist() == [1.0, 1.0]
    assert of(model, "w").quantize(array(model, "w")).reshape(-1).tolist() == [-127, 127]
    assert result.diagnostics == ()


def test_an_unsigned_grid_mirrors_its_zero_point() -> None:
    """uint8 weights with zero point 3: level q stands for -(q - 3) after the fold, as level 255 - q."""
    text = BEFORE.replace("w = {2, 4}", "w = {252, -3}")
    model, result = with_grid(QuantParams.make(1.0, 3, UINT8), text)
    grid = of(model, "w")
    assert (grid.dtype, grid.scale.tolist(), grid.zero_point.tolist()) == (UINT8, [1.0, 0.5], [3, 252])
    assert grid.quantize(array(model, "w")).reshape(-1).tolist() == [255, 255]
    np.testing.assert_array_equal(
        grid.dequantize(np.array([255, 255]).reshape(2, 1, 1, 1)).reshape(-1), [252, 1.5]
    )
    assert result.diagnostics == ()


def test_a_channel_too_small_for_a_step_becomes_zero_and_is_reported() -> None:
    model, result = with_grid(QuantParams.make([0.5, 2.0], axis=0), BEFORE.replace("{3, -1}", "{1e-38, -1}"))
    assert of(model, "w").scale.tolist() == [0.5, 1.0]
    assert array(model, "w").reshape(-1).tolist() == [0, -2]
    assert [(d.code, d.node) for d in result.diagnostics] == [(Code.WEIGHT_REQUANTIZED, "conv")]


def test_weights_that_are_on_no_grid_are_not_rounded_to_one() -> None:
    weights = RNG.normal(size=(4, 3, 3, 3)).astype(np.float32)
    model = conv_bn(weights, np.array([1, 2, -3, 4.0]), grid=QuantParams.make(0.25))
    before = model.to_proto()
    apply(FuseConvBn(), model)
    assert_same_numbers(before, model, {"x": RNG.normal(size=(2, 3, 5, 5)).astype(np.float32)})


def test_a_weight_shared_with_another_layer_is_copied() -> None:
    text = """
    g (float[N, 1, 4, 4] x) => (float[N, 2, 4, 4] y, float[N, 2, 4, 4] z)
      <float[2, 1, 1, 1] w = {2, 4}, float[2] b = {1, 2},
       float[2] gamma = {3, -1}, float[2] beta = {10, 20}, float[2] mean = {1, 3}, float[2] var = {8, 3}> {
      [conv] c = Conv (x, w, b)
      [bn] y = BatchNormalization <epsilon = 1.0> (c, gamma, beta, mean, var)
      [other] z = Conv (x, w, b)
    }
    """
    model = parse(text)
    before, grid = model.to_proto(), QuantParams.make([0.5, 2.0], axis=0)
    model.scales.set(model.values()["w"], grid)
    apply(FuseConvBn(), model)
    conv, other = model.graph
    assert named([*other.inputs]) == ["x", "w", "b"]
    assert named([*conv.inputs]) == ["x", "conv.weight", "conv.bias"]
    assert of(model, "w") is grid
    assert array(model, "w").reshape(-1).tolist() == [2, 4]
    assert of(model, "conv.weight").scale.tolist() == [0.5, 1.0]
    assert_same_numbers(before, model, {"x": RNG.normal(size=(1, 1, 4, 4)).astype(np.float32)})


def test_a_weight_that_is_a_graph_output_is_copied() -> None:
    text = BEFORE.replace("(float[N, 2, 4, 4] y)", "(float[N, 2, 4, 4] y, float[2, 1, 1, 1] w)")
    model = parse(text)
    before = model.to_proto()
    apply(FuseConvBn(), model)
    feeds = {"x": RNG.normal(size=(1, 1, 4, 4)).astype(np.float32)}
    np.testing.assert_array_equal(run(before, feeds)[1], run(model, feeds)[1])


@pytest.mark.parametrize(
    "layer",
    [
        "Gemm (x, w)",
        "Gemm (x, w, b)",
        "Gemm <alpha = 0.5, beta = 2.0> (x, w, b)",
        "Gemm <beta = 2.0> (x, w, one)",
        "Gemm (x, w, row)",
        "Gemm <transB = 1> (x, v, b)",
        "MatMul (x, w)",
    ],
)
def test_a_gemm_or_matmul_takes_it_in_too(layer: str) -> None:
    model = parse(
        f"""
        g (float[N, 2] x) => (float[N, 3] y)
          <float[2, 3] w = {{1, 2, 3, 4, 5, 6}}, float[3, 2] v = {{1, 2, 3, 4, 5, 6}}, float[3] b = {{7, 8, 9}},
           float[1, 3] row = {{7, 8, 9}}, float one = {{5}}, float[3] gamma = {{1, -2, 3}},
           float[3] beta = {{1, 2, 3}}, float[3] mean = {{4, 5, 6}}, float[3] var = {{1, 2, 3}}>
          {{ [mm] c = {layer} [bn] y = BatchNormalization (c, gamma, beta, mean, var) }}
        """
    )
    before = model.to_proto()
    name = "v" if "v" in layer else "w"
    grid = QuantParams.make(1.0)
    model.scales.set(model.values()[name], grid)
    levels = grid.quantize(array(model, name))
    assert apply(FuseConvBn(), model).counts["fused"] == 1
    assert [n.op_type for n in model.graph] == ["Gemm"]
    after = of(model, name)
    assert after.axis == (0 if name == "v" else 1)
    signs = np.array([1, -1, 1])
    expected = levels * (signs[:, None] if name == "v" else signs)
    np.testing.assert_array_equal(after.quantize(array(model, name)), expected)
    assert_same_numbers(before, model, {"x": RNG.normal(size=(4, 2)).astype(np.float32)})


def test_a_matmul_that_needs_no_offset_stays_one() -> None:
    model = parse(
        """
        g (float[N, 2] x) => (float[N, 1] y)
          <float[2, 1] w = {1, 2}, float[1] gamma = {2}, float[1] zero = {0}, float[1] var = {1}>
          { [mm] c = MatMul (x, w) [bn] y = BatchNormalization <epsilon = 0.0> (c, gamma, zero, zero, var) }
        """
    )
    apply(FuseConvBn(), model)
    assert [n.op_type for n in model.graph] == ["MatMul"]
    assert array(model, "w").reshape(-1).tolist() == [2, 4]


def test_the_normalized_tensor_keeps_its_grid_and_the_other_one_is_dropped() -> None:
    model = parse(BEFORE)
    values = model.values()
    kept = QuantParams.make(0.25)
    model.scales.set(values["y"], kept)
    model.scales.set(values["c"], QuantParams.make(0.5, origin="FakeQuant 'f'"))
    result = apply(FuseConvBn(), model)
    assert of(model, "y") is kept
    assert [v.name for v in model.scales] == ["y"]
    (note,) = result.diagnostics
    assert (note.code, note.value, note.severity) == (Code.FAKE_QUANT_DROPPED, "c", Severity.NOTE)
    assert "FakeQuant 'f'" in note.reason


def test_dropping_the_only_grid_is_a_warning() -> None:
    """The grid belongs to the values before the normalization: the result must not inherit it."""
    model = parse(BEFORE)
    model.scales.set(model.values()["c"], QuantParams.make(0.5))
    (note,) = apply(FuseConvBn(), model).diagnostics
    assert (note.code, note.severity) == (Code.FAKE_QUANT_DROPPED, Severity.WARNING)
    assert len(model.scales) == 0


def test_the_grid_of_a_bias_that_is_rewritten_is_forgotten() -> None:
    model = parse(BEFORE)
    model.scales.set(model.values()["b"], QuantParams.make(0.5))
    apply(FuseConvBn(), model)
    assert len(model.scales) == 0


def test_two_normalizations_in_a_row_are_both_folded() -> None:
    text = BEFORE.replace("[bn] y = Batch", "[first] m = Batch").replace(
        "\n}", "\n  [bn] y = BatchNormalization (m, gamma, beta, mean, var)\n}"
    )
    model = parse(text)
    before = model.to_proto()
    assert apply(FuseConvBn(), model).counts["fused"] == 2
    assert model.moments[model.graph.outputs[0]].origin == "BatchNormalization 'bn'"
    assert_same_numbers(before, model, {"x": RNG.normal(size=(1, 1, 4, 4)).astype(np.float32)})


def test_readers_inside_a_subgraph_follow_the_result() -> None:
    text = """
    g (float[1, 1, 4, 4] x, bool flag) => (float[1, 2, 4, 4] out)
      <float[2, 1, 1, 1] w = {2, 4}, float[2] b = {1, 2},
       float[2] gamma = {3, -1}, float[2] beta = {10, 20}, float[2] mean = {1, 3}, float[2] var = {8, 3}> {
      [conv] c = Conv (x, w, b)
      [bn] y = BatchNormalization <epsilon = 1.0> (c, gamma, beta, mean, var)
      [if] out = If (flag) <
        then_branch = t () => (float[1, 2, 4, 4] p) { p = Neg (y) },
        else_branch = e () => (float[1, 2, 4, 4] q) { q = Abs (y) }
      >
    }
    """
    model = parse(text)
    before = model.to_proto()
    assert apply(FuseConvBn(), model).counts["fused"] == 1
    feeds = {"x": RNG.normal(size=(1, 1, 4, 4)).astype(np.float32), "flag": np.array(True)}
    assert_same_numbers(before, model, feeds)


def head(
    body: str, *, inputs: str = "", outputs: str = "", weight: str = "w = {2, 4}", var: str = "{8, 3}"
) -> str:
    weights = f"float[2, 1, 1, 1] {weight}, " if weight else ""
    return f"""
    g (float[1, 1, 4, 4] x{inputs}) => (float[1, 2, 4, 4] y{outputs})
      <{weights}float[2] b = {{1, 2}}, float[2] gamma = {{3, -1}}, float[2] beta = {{10, 20}},
       float[2] mean = {{1, 3}}, float[2] var = {var}>
      {{ {body} }}
    """


BN = "[bn] y = BatchNormalization (c, gamma, beta, mean, var)"
TRAINING = BN.replace("] y =", "] y, m, v =")
NEAR_MISSES = {
    "training": (
        head("[conv] c = Conv (x, w) " + TRAINING.replace("(c", "<training_mode = 1> (c")),
        "training mode",
    ),
    "training before opset 14": (
        '<ir_version: 7, opset_import: ["" : 9]>'
        + head("[conv] c = Conv (x, w) " + TRAINING.replace("y, m, v", "y, m, v, sm, sv")),
        "training mode",
    ),
    "computed parameters": (
        head("gg = Neg (gamma) [conv] c = Conv (x, w) " + BN.replace("gamma", "gg")),
        "parameters are not constant",
    ),
    "negative variance": (
        head("[conv] c = Conv (x, w) " + BN, var="{8, -3}"),
        "a variance is negative",
    ),
    "graph output": (
        head("[conv] c = Conv (x, w) " + BN, outputs=", float[1, 2, 4, 4] c"),
        "'c' is a graph output",
    ),
    "second reader": (
        head("[conv] c = Conv (x, w) z = Neg (c) " + BN, outputs=", float[1, 2, 4, 4] z"),
        "'c' is read by other nodes",
    ),
    "reader in a subgraph": (
        head(
            "[conv] c = Conv (x, w) z = If (flag) <then_branch = t () => (float[1, 2, 4, 4] p) { p = Neg (c) },"
            " else_branch = e () => (float[1, 2, 4, 4] q) { q = Conv (x, w) }> " + BN,
            inputs=", bool flag",
            outputs=", float[1, 2, 4, 4] z",
        ),
        "'c' is read by other nodes",
    ),
    "behind a Relu": (
        head("[conv] k = Conv (x, w) [relu] c = Relu (k) " + BN),
        "comes from Relu 'relu'",
    ),
    "weight is an input": (
        head("[conv] c = Conv (x, w) " + BN, inputs=", float[2, 1, 1, 1] w", weight=""),
        "weight of the layer before it is not a constant",
    ),
    "bias is an input": (
        head("[conv] c = Conv (x, w, d) " + BN, inputs=", float[2] d"),
        "bias of the layer before it is not a constant",
    ),
    "overflow": (
        head("[conv] c = Conv (x, w) " + BN, weight="w = {3e38, 4}", var="{0, 3}"),
        "overflow float32",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_left_alone_and_explained(name: str) -> None:
    text, reason = NEAR_MISSES[name]
    model = parse(text)
    before = graph_text(model)
    result = apply(FuseConvBn(), model)
    assert result.counts["fused"] == 0
    assert graph_text(model) == before
    (note,) = result.diagnostics
    assert (note.code, note.severity, note.node) == (Code.NOT_FUSED, Severity.NOTE, "bn")
    assert reason in note.reason
    output = model.values()["y"]
    if name == "computed parameters":
        assert output not in model.moments
    else:
        assert result.counts["statistics recorded"] == 1
        assert model.moments[output].mean.tolist() == [10, 20]
        assert model.moments[output].std.tolist() == [3, 1]


def test_an_input_that_is_no_layer_is_named() -> None:
    model = parse(
        "g (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y) <float[2] p = {1, 2}>"
        "{ [bn] y = BatchNormalization (x, p, p, p, p) }"
    )
    (note,) = apply(FuseConvBn(), model).diagnostics
    assert "not computed by a layer" in note.reason


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        ("MatMul (x, w)", "2, 3, 2", "not known to be two-dimensional"),
        ("Gemm (x, w, rows)", "3, 2", "differs from row to row"),
        ("Gemm (x, w, column)", "3, 2", "differs from row to row"),
    ],
)
def test_channels_have_to_be_the_columns(layer: str, shape: str, reason: str) -> None:
    model = parse(
        f"""
        g (float[{shape}] x) => (float[{shape[:-1]}3] y)
          <float[2, 3] w = {{1, 2, 3, 4, 5, 6}}, float[3, 3] rows = {{1, 2, 3, 4, 5, 6, 7, 8, 9}},
           float[3, 1] column = {{1, 2, 3}}, float[3] p = {{1, 2, 3}}>
          {{ [mm] c = {layer} [bn] y = BatchNormalization (c, p, p, p, p) }}
        """
    )
    before = graph_text(model)
    (note,) = apply(FuseConvBn(), model).diagnostics
    assert reason in note.reason
    assert graph_text(model) == before


def test_steps_along_the_input_channels_cannot_follow() -> None:
    weights = np.ones((2, 3, 1, 1))
    grid = QuantParams.make([1.0, 0.5, 0.25], axis=1)
    model = conv_bn(weights, np.array([1.0, -2.0]), grid=grid)
    before = graph_text(model)
    (note,) = apply(FuseConvBn(), model).diagnostics
    assert "along axis 1" in note.reason
    assert of(model, "w") is grid
    assert graph_text(model) == before


def test_groups_that_share_their_steps_cannot_follow_different_factors() -> None:
    weights, grid = np.ones((4, 1, 2, 2)), QuantParams.make(0.5)
    model = conv_bn(weights, np.array([1.0, 2, 3, 4]), grid=grid, op="ConvTranspose", group=4)
    before = graph_text(model)
    (note,) = apply(FuseConvBn(), model).diagnostics
    assert "groups of the layer share" in note.reason
    assert graph_text(model) == before
