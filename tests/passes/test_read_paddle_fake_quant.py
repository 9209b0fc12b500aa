from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper, numpy_helper
from support import TARGET, apply, check_pass, run

from qat2int8.ir import Code, InvalidModel, Model, Severity, UnsupportedModel
from qat2int8.passes import Context
from qat2int8.passes.canonicalize import Canonicalize
from qat2int8.passes.fake_quant import FakeQuant, fake_quants
from qat2int8.passes.gather_input_scales import GatherInputScales
from qat2int8.passes.gather_output_scales import GatherOutputScales
from qat2int8.passes.read_paddle_fake_quant import ReadPaddleFakeQuant

CTX = Context(TARGET)
HEADER = '<ir_version: 8, opset_import: ["" : 17, "paddle" : 1, "my.own" : 3]>'
MOVING = "fake_quantize_moving_average_abs_max"

Array = npt.NDArray[Any]


def rounded_away(values: Array) -> Array:
    return np.sign(values) * np.floor(np.abs(values.astype(np.float64)) + 0.5)


def faked(x: Array, threshold: npt.ArrayLike, round_type: int = 1) -> Array:
    """Quantized and dequantized, as Paddle defines it."""
    t = np.asarray(threshold, np.float32)
    if round_type == 1:
        return (rounded_away(np.clip(x, -t, t) / t * 127) * t / 127).astype(np.float32)
    return (np.clip(np.rint(x / t * 127), -128, 127) * t / 127).astype(np.float32)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, npt.ArrayLike],
    shape: Sequence[int] = (2, 4),
    outputs: Sequence[str] = ("y",),
) -> Model:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
        [
            numpy_helper.from_array(
                np.asarray(array) if isinstance(array, np.ndarray) else np.asarray(array, np.float32), name
            )
            for name, array in constants.items()
        ],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("paddle", 1)]
    model = Model.from_proto(helper.make_model(graph, ir_version=8, opset_imports=imports))
    Canonicalize().run(model, CTX)
    return model


def paddle(op_type: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs, outputs, name=outputs[0], domain="paddle", **attributes)


def quantizers(model: Model) -> list[FakeQuant]:
    return [fake for fake in fake_quants(model) if isinstance(fake, FakeQuant)]


X = np.array([[0.0, 0.26, -0.9, 1.7], [-3.0, 0.5, 2.2, -0.013]], np.float32)


def test_a_quantizer_with_its_dequantizer_becomes_one_pair() -> None:
    before = f"""{HEADER} g (float[2] x) => (float[2] y) <float t = {{1.27}}> {{
      [fake] q, s = paddle.{MOVING} <bit_length = 8, round_type = 0> (x, t)
      y = paddle.fake_dequantize_max_abs <max_range = 127.0> (q, s)
    }}"""
    after = """g (float[2] x) => (float[2] y) <float y_scale = {0.01}, int8 y_zero_point = {0}> {
      [y_quantized] y_quantized = QuantizeLinear (x, y_scale, y_zero_point)
      [fake] y = DequantizeLinear (y_quantized, y_scale, y_zero_point)
    }"""
    _, result = check_pass(ReadPaddleFakeQuant(), before, after)
    assert result.counts == {"quantizers read": 1}
    assert result.diagnostics == ()


@pytest.mark.parametrize("round_type", [0, 1])
@pytest.mark.parametrize(
    "op_type",
    ["fake_quantize_dequantize_moving_average_abs_max", "fake_quantize_dequantize_abs_max"],
)
def test_one_op_may_do_both(op_type: str, round_type: int) -> None:
    model = model_of([paddle(op_type, ["x", "t"], ["y"], round_type=round_type)], {"t": [2.0]})
    result = apply(ReadPaddleFakeQuant(), model)
    np.testing.assert_allclose(run(model, {"x": X})[0], faked(X, 2.0, round_type), atol=1e-6)
    (fake,) = quantizers(model)
    assert fake.params.dtype.narrow_range == (round_type == 1)
    codes = [(note.code, note.severity) for note in result.diagnostics]
    assert codes == ([(Code.GRID_REQUANTIZED, Severity.NOTE)] if round_type == 1 else [])


def test_rounding_away_from_zero_is_the_default_of_the_older_ops_only() -> None:
    old = model_of([paddle("fake_quantize_dequantize_moving_average_abs_max", ["x", "t"], ["y"])], {"t": 1.0})
    new = model_of(
        [paddle("quantize_linear", ["x", "t", "z"], ["q"]), paddle("dequantize_linear", ["q", "t", "z"], ["y"])],
        {"t": 1.0, "z": np.zeros((), np.int32)},
    )
    for model in (old, new):
        apply(ReadPaddleFakeQuant(), model)
    assert [quantizers(model)[0].params.dtype.narrow_range for model in (old, new)] == [True, False]


@pytest.mark.parametrize("given", ["InScale", "Scale", "Scales"])
def test_a_threshold_may_be_an_attribute(given: str) -> None:
    node = paddle("fake_quantize_dequantize_moving_average_abs_max", ["x"], ["y"], **{given: [1.27]})
    model = model_of([node], {})
    apply(ReadPaddleFakeQuant(), model)
    assert quantizers(model)[0].params.scale == np.float32(1.27) / np.float32(127)


@pytest.mark.parametrize("domain", ["paddle", "my.own", "ai.paddlepaddle", "custom_domain"])
def test_the_domain_is_any_but_those_of_onnx(domain: str) -> None:
    node = paddle("fake_quantize_dequantize_moving_average_abs_max", ["x", "t"], ["y"])
    node.domain = domain
    model = model_of([node], {"t": 1.0})
    assert apply(ReadPaddleFakeQuant(), model).modified


def test_an_op_of_onnx_domains_is_none_of_paddle() -> None:
    node = paddle("dequantize_linear", ["x", "t"], ["y"])
    node.domain = "com.microsoft"
    model = model_of([node], {"t": 1.0})
    assert not ReadPaddleFakeQuant().run(model, CTX).modified


# -- weights ----------------------------------------------------------------------------------------------------

W = np.random.default_rng(3).normal(size=(4, 6)).astype(np.float32)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_a_weight_with_fake_quant_in_front_of_its_layer_keeps_its_integers(axis: int | None) -> None:
    if axis is None:
        fakes = [
            paddle("fake_quantize_abs_max", ["w"], ["q", "s"]),
            paddle("fake_dequantize_max_abs", ["q", "s"], ["d"], max_range=127.0),
        ]
        thresholds = np.abs(W).max()
    else:
        fakes = [
            paddle("fake_channel_wise_quantize_abs_max", ["w"], ["q", "s"], quant_axis=axis),
            paddle("fake_channel_wise_dequantize_max_abs", ["q", "s"], ["d"], quant_axis=axis, quant_bits=[8]),
        ]
        thresholds = np.abs(W).max(axis=1 - axis, keepdims=True)
    model = model_of([*fakes, helper.make_node("MatMul", ["x", "d"], ["y"])], {"w": W})
    result = apply(ReadPaddleFakeQuant(), model)
    assert result.counts == {"weights read": 1}
    (fake,) = quantizers(model)
    assert fake.constant
    assert fake.params.axis == axis
    np.testing.assert_allclose(run(model, {"x": X})[0], X @ faked(W, thresholds), rtol=1e-5, atol=1e-6)


def test_constants_round_ties_as_paddle_does() -> None:
    ties = np.array([[0.5, 1.5, 2.5, -2.5, 127, -128]], np.float32)
    for round_type, expected in ((0, [0, 2, 2, -2, 127, -128]), (1, [1, 2, 3, -3, 127, -127])):
        node = paddle("fake_quantize_dequantize_abs_max", ["w", "t"], ["d"], round_type=round_type)
        model = model_of([node, helper.make_node("Add", ["x", "d"], ["y"])], {"w": ties, "t": 127.0}, (1, 6))
        apply(ReadPaddleFakeQuant(), model)
        np.testing.assert_array_equal(run(model, {"x": np.zeros((1, 6), np.float32)})[0], [expected])


def frozen(
    weight: Array,
    thresholds: npt.ArrayLike,
    layer: str = "MatMul",
    *,
    activation: float = 2.0,
    told: float | None = None,
    move: bool = False,
    **attributes: Any,
) -> Model:
    """``x -> quantize -> layer -> dequantize -> y``."""
    t = np.asarray(thresholds, np.float32)
    nodes = [paddle(MOVING, ["x", "a"], ["q", "s"], bit_length=8)]
    constants: dict[str, npt.ArrayLike] = {"w": weight.astype(np.float32), "a": [activation]}
    read = "q"
    if move:
        nodes.append(helper.make_node("Reshape", ["q", "shape"], ["r"]))
        constants["shape"], read = np.array([-1, weight.shape[0]]), "r"
    nodes.append(helper.make_node(layer, [read, "w"], ["z"], **attributes))
    constants["told"] = activation if told is None else told
    if t.ndim:
        constants["t"] = t
        nodes.append(paddle("fake_channel_wise_dequantize_max_abs", ["z", "t", "told"], ["y"], quant_bits=[8, 8]))
    else:
        nodes.append(paddle("fake_dequantize_max_abs", ["z", "told"], ["y"], max_range=float(127 * 127 / t)))
    return model_of(nodes, constants, (2, weight.shape[0]) if weight.ndim == 2 else (1, weight.shape[1], 4, 4))


LEVELS = np.random.default_rng(0).integers(-127, 128, (4, 6))


@pytest.mark.parametrize("move", [False, True])
@pytest.mark.parametrize("thresholds", [0.7, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
def test_a_frozen_layer_reads_real_numbers_again(thresholds: Any, move: bool) -> None:
    model = frozen(LEVELS, thresholds, move=move)
    result = apply(ReadPaddleFakeQuant(), model)
    assert result.counts == {"weights read": 1, "quantizers read": 1}
    (weight,) = (fake for fake in quantizers(model) if fake.constant)
    np.testing.assert_array_equal(model.constant(weight.source), LEVELS)
    assert weight.params.axis == (None if isinstance(thresholds, float) else 1)
    expected = faked(X, 2.0) @ (LEVELS / 127 * np.asarray(thresholds))
    np.testing.assert_allclose(run(model, {"x": X})[0], expected, rtol=1e-5, atol=1e-6)
    assert not list(model.nodes("Mul"))


def test_the_published_example() -> None:
    model = frozen(np.ones((3, 5)), [1, 2, 3, 4, 5])
    apply(ReadPaddleFakeQuant(), model)
    (weight,) = (fake for fake in quantizers(model) if fake.constant)
    levels = model.constant(weight.source)
    assert levels is not None
    np.testing.assert_allclose(
        weight.params.dequantize(levels), np.tile(np.arange(1, 6, dtype=np.float32) / 127, (3, 1)), rtol=1e-6
    )


@pytest.mark.parametrize(("shape", "layer"), [((3, 5), "MatMul"), ((1, 1), "MatMul"), ((3, 2, 1, 1), "Conv")])
def test_as_many_thresholds_as_fit_no_channels_are_an_error(shape: tuple[int, ...], layer: str) -> None:
    model = frozen(np.ones(shape), [1, 2, 3, 4], layer)
    with pytest.raises(InvalidModel, match=r"size of weight scales vector \(4\) does not match .* w"):
        ReadPaddleFakeQuant().run(model, CTX)


def test_thresholds_of_a_square_matrix_belong_to_its_columns() -> None:
    model = frozen(np.ones((4, 4)), [1, 2, 3, 4])
    apply(ReadPaddleFakeQuant(), model)
    (weight,) = (fake for fake in quantizers(model) if fake.constant)
    assert weight.params.axis == 1


def test_a_convolution_has_its_thresholds_on_the_first_axis() -> None:
    kernel = np.random.default_rng(1).integers(-127, 128, (3, 2, 3, 3))
    thresholds = np.array([0.5, 0.25, 0.0], np.float32)
    kernel[2] = 0
    model = frozen(kernel, thresholds, "Conv", pads=[1, 1, 1, 1])
    x = np.random.default_rng(2).normal(size=(1, 2, 4, 4)).astype(np.float32)
    apply(ReadPaddleFakeQuant(), model)
    (weight,) = (fake for fake in quantizers(model) if fake.constant)
    assert weight.params.axis == 0
    real = (kernel / 127 * thresholds.reshape(3, 1, 1, 1)).astype(np.float32)
    plain = model_of([helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])], {"w": real}, (1, 2, 4, 4))
    np.testing.assert_allclose(run(model, {"x": x})[0], run(plain, {"x": faked(x, 2.0)})[0], rtol=1e-4, atol=1e-5)


def test_a_weight_two_layers_share_is_read_once() -> None:
    nodes = [paddle(MOVING, ["x", "a"], ["q"])]
    for branch in "lr":
        nodes.append(helper.make_node("MatMul", ["q", "w"], [f"z{branch}"]))
        result = [f"y{branch}"]
        nodes.append(paddle("fake_dequantize_max_abs", [f"z{branch}", "a"], result, max_range=127 * 127 / 0.5))
    nodes.append(helper.make_node("Add", ["yl", "yr"], ["y"]))
    model = model_of(nodes, {"w": LEVELS.astype(np.float32), "a": 2.0})
    apply(ReadPaddleFakeQuant(), model)
    assert len(quantizers(model)) == 2
    np.testing.assert_allclose(run(model, {"x": X})[0], 2 * faked(X, 2.0) @ (LEVELS / 254), rtol=1e-5, atol=1e-6)


def test_a_weight_that_is_not_whole_becomes_a_float_constant() -> None:
    model = frozen(LEVELS + 0.25, 0.7)
    apply(ReadPaddleFakeQuant(), model)
    assert [fake.constant for fake in quantizers(model)] == [False]
    expected = faked(X, 2.0) @ ((LEVELS + 0.25) / 127 * 0.7)
    np.testing.assert_allclose(run(model, {"x": X})[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.int8])
def test_weights_of_the_linear_ops_are_stored_as_levels(dtype: Any) -> None:
    model = model_of(
        [
            paddle("dequantize_linear", ["w", "t", "z"], ["d"], quant_axis=1, bit_length=8),
            helper.make_node("MatMul", ["x", "d"], ["y"]),
        ],
        {"w": LEVELS.astype(dtype), "t": np.arange(1, 7, dtype=np.float32), "z": np.zeros(6, np.int32)},
    )
    apply(ReadPaddleFakeQuant(), model)
    (fake,) = quantizers(model)
    np.testing.assert_array_equal(model.constant(fake.source), LEVELS)
    np.testing.assert_allclose(run(model, {"x": X})[0], X @ (LEVELS / 127 * np.arange(1, 7)), rtol=1e-5, atol=1e-5)


# -- what is not a grid -----------------------------------------------------------------------------------------


def test_a_threshold_of_zero_takes_the_quantizer_off() -> None:
    model = frozen(LEVELS, 0.7, activation=0.0)
    result = apply(ReadPaddleFakeQuant(), model)
    assert [note.code for note in result.diagnostics] == [Code.FAKE_QUANT_DROPPED]
    np.testing.assert_allclose(run(model, {"x": X})[0], X @ (LEVELS / 127 * 0.7), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("both", [False, True])
def test_a_threshold_measured_on_each_input_is_no_grid(both: bool) -> None:
    nodes = (
        [paddle("fake_quantize_dequantize_abs_max", ["x"], ["y"])]
        if both
        else [
            paddle("fake_quantize_abs_max", ["x"], ["q", "s"]),
            paddle("fake_dequantize_max_abs", ["q", "s"], ["y"], max_range=127.0),
        ]
    )
    model = model_of(nodes, {})
    result = apply(ReadPaddleFakeQuant(), model)
    assert [note.code for note in result.diagnostics] == [Code.UNSUPPORTED_FAKE_QUANT]
    np.testing.assert_array_equal(run(model, {"x": X})[0], X)


def test_levels_that_something_else_reads_are_made_of_real_numbers() -> None:
    model = model_of(
        [
            paddle(MOVING, ["x", "a"], ["q"]),
            helper.make_node("Relu", ["q"], ["r"]),
            paddle("fake_dequantize_max_abs", ["r", "a"], ["y"], max_range=127.0),
            helper.make_node("Identity", ["q"], ["levels"]),
        ],
        {"a": 2.0},
        outputs=["y", "levels"],
    )
    result = apply(ReadPaddleFakeQuant(), model)
    y, levels = run(model, {"x": X})
    np.testing.assert_allclose(levels, faked(X, 2.0) / 2 * 127, atol=1e-4)
    np.testing.assert_allclose(y, np.maximum(faked(X, 2.0), 0), atol=1e-5)
    assert Code.UNSUPPORTED_FAKE_QUANT in [note.code for note in result.diagnostics]


def test_a_dequantizer_that_was_told_another_threshold_computes_what_it_says() -> None:
    model = frozen(LEVELS, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], told=4.0)
    apply(ReadPaddleFakeQuant(), model)
    expected = 2 * faked(X, 2.0) @ (LEVELS / 127 * np.linspace(0.1, 0.6, 6))
    np.testing.assert_allclose(run(model, {"x": X})[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("op_type", "attributes"), [
    ("fake_quantize_dequantize_moving_average_abs_max", {"bit_length": 4}),
    ("fake_channel_wise_dequantize_max_abs", {"quant_bits": [8, 16]}),
])  # fmt: skip
def test_another_width_than_eight_bits_is_an_error(op_type: str, attributes: dict[str, Any]) -> None:
    model = model_of([paddle(op_type, ["x", "t"], ["y"], **attributes)], {"t": 1.0})
    with pytest.raises(UnsupportedModel, match="only 8 are read"):
        ReadPaddleFakeQuant().run(model, CTX)


@pytest.mark.parametrize("threshold", [-1.0, np.nan, np.inf])
def test_a_threshold_that_is_no_magnitude_is_an_error(threshold: float) -> None:
    node = paddle("fake_quantize_dequantize_moving_average_abs_max", ["x", "t"], ["y"])
    with pytest.raises(InvalidModel, match="not a magnitude"):
        ReadPaddleFakeQuant().run(model_of([node], {"t": threshold}), CTX)


@pytest.mark.parametrize(
    "attributes",
    [{"bit_length": "eight"}, {"InScale": "one"}, {"round_type": []}, {"Scales": [b"x"]}],
)
def test_an_attribute_that_is_no_number_is_an_error(attributes: dict[str, Any]) -> None:
    node = paddle("fake_quantize_dequantize_moving_average_abs_max", ["x"], ["y"])
    for key, value in ({"InScale": 1.0} | attributes).items():
        kind = onnx.AttributeProto.INTS if value == [] else None
        node.attribute.append(helper.make_attribute(key, value, attr_type=kind))
    if "Scales" in attributes:
        node.attribute.remove(next(each for each in node.attribute if each.name == "InScale"))
    with pytest.raises(InvalidModel, match="not a number"):
        ReadPaddleFakeQuant().run(model_of([node], {}), CTX)


def test_an_axis_from_the_back_is_an_error() -> None:
    node = paddle("fake_channel_wise_quantize_dequantize_abs_max", ["w"], ["d"], quant_axis=-1)
    model = model_of([node, helper.make_node("MatMul", ["x", "d"], ["y"])], {"w": W})
    with pytest.raises(InvalidModel, match="quant_axis is -1"):
        ReadPaddleFakeQuant().run(model, CTX)


def test_no_threshold_is_an_error() -> None:
    node = paddle("fake_quantize_dequantize_moving_average_abs_max", ["x"], ["y"])
    with pytest.raises(InvalidModel, match="has no threshold"):
        ReadPaddleFakeQuant().run(model_of([node], {}), CTX)


def test_a_record_of_training_that_is_read_is_an_error() -> None:
    node = paddle("fake_quantize_dequantize_moving_average_abs_max", ["x", "t"], ["y", "s"])
    model = model_of([node], {"t": 1.0}, outputs=["y", "s"])
    with pytest.raises(UnsupportedModel, match="'s', which only training needs, is read"):
        ReadPaddleFakeQuant().run(model, CTX)


# -- observers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fake", [False, True])
def test_an_observer_leaves_its_threshold_which_a_fake_quant_overrules(fake: bool) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="relu"),
        paddle("quantize_linear", ["r", "t", "z"], ["q"], only_observer=1),
        paddle("dequantize_linear", ["q", "t", "z"], ["d"], only_observer=1),
    ]
    last = "d"
    if fake:
        nodes.append(paddle("fake_quantize_dequantize_moving_average_abs_max", ["d", "u"], ["e"]))
        last = "e"
    nodes.append(helper.make_node("Neg", [last], ["y"]))
    model = model_of(nodes, {"t": 1.27, "u": 2.54, "z": np.zeros((), np.int32)})
    apply(ReadPaddleFakeQuant(), model)
    for pass_ in (GatherOutputScales(), GatherInputScales()):
        pass_.run(model, CTX)
    ((value, grid),) = model.scales.items()
    assert value.name == "r"
    assert grid.scale == np.float32(2.54 if fake else 1.27) / np.float32(127)
