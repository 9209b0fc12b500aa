import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import apply, assert_same_numbers, check_pass, parse, run

from qat2int8.ir import INT8, UINT8, Code, Model, Provenance, QuantDType, QuantParams, Severity
from qat2int8.passes.affine_chain import batch_norm_link
from qat2int8.passes.fuse_conv_bn import FuseConvBn

NARROW = QuantDType(8, signed=True, narrow_range=True)
RNG = np.random.default_rng(7)
IMAGE = {"x": RNG.normal(size=(2, 3, 5, 5)).astype(np.float32)}

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


def test_a_grid_for_the_whole_tensor_becomes_one_per_channel() -> None:
    model, _ = check_pass_with_grid(QuantParams.make(0.5, origin="DequantizeLinear 'd'"))
    grid = of(model, "w")
    assert (grid.axis, grid.scale.tolist()) == (0, [0.5, 0.25])
    assert grid.origin == "DequantizeLinear 'd', scaled by BatchNormalization 'bn'"
    np.testing.assert_array_equal(grid.quantize(array(model, "w")).reshape(-1), [4, -8])


def check_pass_with_grid(grid: QuantParams, text: str = BEFORE) -> tuple[Model, object]:
    model = parse(text)
    model.scales.set(model.values()["w"], grid)
    return model, apply(FuseConvBn(), model)
