import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from support import TARGET, apply, check_pass, parse, run

from qat2int8.ir import INT8, UINT8, Code, InvalidModel, Model, QuantDType, UnsupportedModel
from qat2int8.passes import Context
from qat2int8.passes.canonicalize import Canonicalize
from qat2int8.passes.fake_quant import FakeQuant, Refusal, fake_quants
from qat2int8.passes.fold_constants import FoldConstants
from qat2int8.passes.read_openvino_fake_quantize import ReadOpenvinoFakeQuantize

CTX = Context(TARGET)
HEADER = '<ir_version: 8, opset_import: ["" : 17, "org.openvinotoolkit" : 1, "my" : 1]>'
NOISE = np.random.default_rng(0).normal(scale=4, size=(4, 12)).astype(np.float32)


def quantized(x: Any, low: Any, high: Any, out_low: Any, out_high: Any, levels: int) -> Any:
    """What the definition of the op says, in double precision."""
    low, high, out_low, out_high = (
        np.asarray(bound, np.float32).astype(np.float64) for bound in (low, high, out_low, out_high)
    )
    counted = np.round((np.minimum(np.maximum(x, low), high) - low) / (high - low) * (levels - 1))
    return counted / (levels - 1) * (out_high - out_low) + out_low


def model_of(
    low: npt.ArrayLike,
    high: npt.ArrayLike,
    levels: int,
    *,
    out: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
    weight: npt.NDArray[np.float32] | None = None,
) -> Model:
    """``y = x + FakeQuantize(weight)``, or ``y = FakeQuantize(x)``."""
    bounds = {"il": low, "ih": high, "ol": low if out is None else out[0], "oh": high if out is None else out[1]}
    source, output = ("x", "y") if weight is None else ("w", "q")
    fake = onnx.helper.make_node(
        "FakeQuantize", [source, *bounds], [output], name="fq", domain="org.openvinotoolkit", levels=levels
    )
    add = [] if weight is None else [onnx.helper.make_node("Add", ["x", "q"], ["y"])]
    arrays = {name: np.asarray(bound, np.float32) for name, bound in bounds.items()}
    arrays |= {} if weight is None else {"w": weight}
    graph = onnx.helper.make_graph(
        [fake, *add],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, NOISE.shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    imports = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("org.openvinotoolkit", 1)]
    return Model.from_proto(onnx.helper.make_model(graph, opset_imports=imports, ir_version=8))


def op_types(model: Model) -> list[str]:
    return [node.op_type for node in model.graph]


def only(model: Model) -> FakeQuant | Refusal:
    (fake,) = fake_quants(model)
    return fake


def test_an_activation_of_256_levels_from_zero_is_uint8() -> None:
    _, result = check_pass(
        ReadOpenvinoFakeQuantize(),
        f"""{HEADER} g (float[2,3] x) => (float[2,3] y) <float[1] l = {{0}}, float[1] h = {{127.5}}> {{
          [fq] q = org.openvinotoolkit.FakeQuantize <levels = 256> (x, l, h, l, h)
          [relu] y = Relu (q)
        }}""",
        """g (float[2,3] x) => (float[2,3] y) <float q_scale = {0.5}, uint8 q_zero_point = {0}> {
          [q_quantized] q_quantized = QuantizeLinear (x, q_scale, q_zero_point)
          [fq] q = DequantizeLinear (q_quantized, q_scale, q_zero_point)
          [relu] y = Relu (q)
        }""",
    )
    assert result.counts == {"quantizers read": 1, "quantizers written in float": 0}
    assert not result.diagnostics


def test_a_weight_of_255_levels_is_narrow_int8_per_channel() -> None:
    check_pass(
        ReadOpenvinoFakeQuantize(),
        f"""{HEADER} g (float[2,2] x) => (float[2,2] y)
        <float[2,2] w = {{1.3, -99, 0.3, 99}}, float[2,1] l = {{-63.5, -31.75}}, float[2,1] h = {{63.5, 31.75}}> {{
          [fq] q = org.openvinotoolkit.FakeQuantize <levels = 255> (w, l, h, l, h)
          [add] y = Add (x, q)
        }}""",
        """g (float[2,2] x) => (float[2,2] y)
        <int8[2,2] q_quantized = {3, -127, 1, 127}, float[2] q_scale = {0.5, 0.25}, int8[2] q_zero_point = {0, 0},
         int8 q_low = {-127}, int8 q_high = {127}> {
          [q_clipped] q_clipped = Clip (q_quantized, q_low, q_high)
          [fq] q = DequantizeLinear <axis = 0> (q_clipped, q_scale, q_zero_point)
          [add] y = Add (x, q)
        }""",
    )


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize(
    ("low", "high", "levels", "dtype", "zero_point"),
    [
        (-64, 63.5, 256, INT8, 0),
        (-63.5, 63.5, 255, QuantDType(8, signed=True, narrow_range=True), 0),
        (-62.5, 65, 256, UINT8, 125),
        (-127.5, 0, 256, UINT8, 255),
        (0, 7.5, 16, QuantDType(4, signed=False), 0),
        (-4, 3.5, 16, QuantDType(4, signed=True), 0),
        (-3.5, 3.5, 15, QuantDType(4, signed=True, narrow_range=True), 0),
        (-32, 31.5, 128, QuantDType(7, signed=True), 0),
        (-1, 0.5, 4, QuantDType(2, signed=True), 0),
    ],
)
def test_levels_and_range_decide_the_grid(
    constant: bool, low: float, high: float, levels: int, dtype: QuantDType, zero_point: int
) -> None:
    model = model_of(low, high, levels, weight=NOISE if constant else None)
    assert not apply(ReadOpenvinoFakeQuantize(), model).diagnostics
    fake = only(model)
    assert isinstance(fake, FakeQuant)
    assert fake.constant == constant
    assert (fake.params.dtype, fake.params.scale, fake.params.zero_point) == (dtype, 0.5, zero_point)
    (actual,) = run(model, {"x": NOISE * (not constant)})
    np.testing.assert_array_equal(actual, quantized(NOISE, low, high, low, high, levels).astype(np.float32))


def test_an_unsigned_grid_without_its_top_level_computes_and_is_no_grid_to_carry() -> None:
    model = model_of(0, 127, 255)
    apply(ReadOpenvinoFakeQuantize(), model)
    assert isinstance(only(model), Refusal)
    np.testing.assert_array_equal(run(model, {"x": NOISE * 50})[0].max(), 127)


@pytest.mark.parametrize("levels", [255, 256])
def test_a_zero_point_between_two_levels_is_rounded_and_reported(levels: int) -> None:
    step = 8 / (levels - 1)
    low, high = -10.4 * step, 8 - 10.4 * step
    model = model_of(low, high, levels)
    result = apply(ReadOpenvinoFakeQuantize(), model)
    (note,) = result.diagnostics
    assert (note.code, note.node, note.value) == (Code.GRID_REQUANTIZED, "fq", "y")
    assert "by 0.4 of a step" in note.reason
    fake = next(iter(fake_quants(model)))
    (actual,) = run(model, {"x": NOISE})
    expected = quantized(NOISE, low, high, low, high, levels)
    assert np.abs(actual - expected).max() < 1.01 * step
    assert fake.output.name == "y"
    dequantize = next(node for node in model.graph if node.op_type == "DequantizeLinear")
    zero_point = model.constant(dequantize.inputs[2])
    assert zero_point is not None
    assert zero_point.item() == 10
    np.testing.assert_allclose(model.constant(dequantize.inputs[1]), np.float32(step), rtol=1e-6)


@pytest.mark.parametrize(("shift", "reported"), [(0.0008, False), (0.0013, True)])
def test_rounding_of_the_bounds_themselves_is_no_shift(shift: float, reported: bool) -> None:
    step = 1 / 32
    low = -(16 + shift) * step
    result = apply(ReadOpenvinoFakeQuantize(), model_of(low, low + 255 * step, 256))
    assert [note.code for note in result.diagnostics] == [Code.GRID_REQUANTIZED] * reported


@pytest.mark.parametrize(
    ("low", "high", "levels", "out", "reason"),
    [
        (-4.1, 3.4, 16, None, "half a step of 16 levels"),
        (-1.3, 62.2, 128, None, "half a step of 128 levels"),
        (1, 128.5, 256, None, "does not hold 0"),
        (-128.5, -1, 256, None, "does not hold 0"),
        (0, 128, 257, None, "it has 257 levels"),
        (0, 511, 512, None, "it has 512 levels"),
        (0, 50, 101, None, "it has 101 levels"),
        (-1, 1, 3, None, "it has 3 levels"),
        (-1, 1, 2, None, "it has 2 levels"),
        (0, 127.5, 256, (0, 255), "another range"),
        (0, 127.5, 256, (1, 127.5), "another range"),
        (0, 127.5, 256, (np.zeros((4, 1)), np.full((4, 1), 3.0)), "another range"),
        (np.zeros((4, 12)), np.full((4, 12), 127.5), 256, None, "along several axes"),
        (np.zeros((1, 1, 12)), np.full((1, 1, 12), 127.5), 256, None, "3 dimensions"),
    ],
    ids=lambda case: case if isinstance(case, str) else None,
)
@pytest.mark.parametrize("constant", [True, False])
def test_what_is_no_grid_stays_float_and_is_reported(
    low: Any, high: Any, levels: int, out: Any, reason: str, constant: bool
) -> None:
    model = model_of(low, high, levels, out=out, weight=NOISE if constant else None)
    result = apply(ReadOpenvinoFakeQuantize(), model)
    (note,) = result.diagnostics
    assert (note.code, note.node, note.value) == (Code.UNSUPPORTED_FAKE_QUANT, "fq", "q" if constant else "y")
    assert (reason in note.reason) or (constant and "of a constant" in note.reason)
    assert note.remedy
    assert result.counts == {"quantizers read": 0, "quantizers written in float": 1}
    assert "DequantizeLinear" not in op_types(model)
    assert not constant or op_types(model) == ["Add"]
    (actual,) = run(model, {"x": NOISE * (not constant)})
    out_low, out_high = (low, high) if out is None else out
    expected = quantized(NOISE, low, high, out_low, out_high, levels)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.ptp(expected))


def test_a_weight_whose_zero_point_lies_between_two_levels_keeps_its_numbers() -> None:
    model = model_of(-1.003, 0.997, 256, weight=NOISE / 8)
    (note,) = apply(ReadOpenvinoFakeQuantize(), model).diagnostics
    assert note.code is Code.UNSUPPORTED_FAKE_QUANT
    assert "constant" in note.reason
    expected = quantized(NOISE / 8, -1.003, 0.997, -1.003, 0.997, 256)
    np.testing.assert_allclose(run(model, {"x": NOISE * 0})[0], expected, atol=1e-6)


def test_an_activation_per_channel_is_written_along_its_axis_and_refused_later() -> None:
    low = -np.array([16, 32, 0, 255], np.float32).reshape(4, 1) / 32
    model = model_of(low, low + np.float32(255 / 32), 256)
    assert not apply(ReadOpenvinoFakeQuantize(), model).diagnostics
    dequantize = next(node for node in model.graph if node.op_type == "DequantizeLinear")
    assert dequantize.attributes.get_int("axis") == 0
    np.testing.assert_array_equal(model.constant(dequantize.inputs[2]), np.array([16, 32, 0, 255], np.uint8))
    expected = quantized(NOISE, low, low + np.float32(255 / 32), low, low + np.float32(255 / 32), 256)
    np.testing.assert_array_equal(run(model, {"x": NOISE})[0], expected.astype(np.float32))
    assert isinstance(only(model), Refusal)


def test_channels_with_zero_in_the_middle_are_signed_only_when_all_are() -> None:
    low = np.array([-64, -64, -64, 0], np.float32).reshape(4, 1)
    model = model_of(low, low + 127.5, 256, weight=NOISE)
    apply(ReadOpenvinoFakeQuantize(), model)
    fake = only(model)
    assert isinstance(fake, FakeQuant)
    assert fake.params.dtype == UINT8
    assert fake.params.zero_point.tolist() == [128, 128, 128, 0]
    expected = quantized(NOISE, low, low + 127.5, low, low + 127.5, 256)
    np.testing.assert_array_equal(run(model, {"x": NOISE * 0})[0], expected.astype(np.float32))


def test_bounds_of_different_shapes_are_the_same_where_their_numbers_are() -> None:
    model = model_of(-64, np.full((4, 1), 63.5), 256, out=(np.full((4, 1), -64), 63.5))
    assert not apply(ReadOpenvinoFakeQuantize(), model).diagnostics


def test_a_shared_weight_and_a_quantizer_with_several_readers() -> None:
    model = parse(
        f"""{HEADER} g (float[3] x) => (float[3] y, float[3] u)
        <float[3] w = {{0.3, -0.3, 1}}, float l = {{-64}}, float h = {{63.5}}, float k = {{-32}},
         float i = {{31.75}}> {{
          p = org.openvinotoolkit.FakeQuantize <levels = 256> (w, l, h, l, h)
          q = org.openvinotoolkit.FakeQuantize <levels = 256> (w, k, i, k, i)
          u = Add (w, p)
          v = Add (p, q)
          y = Add (v, x)
        }}"""
    )
    apply(ReadOpenvinoFakeQuantize(), model)
    y, u = run(model, {"x": np.zeros(3, np.float32)})
    np.testing.assert_allclose(y, [0.75, -0.75, 2])
    np.testing.assert_allclose(u, [0.8, -0.8, 2])
    assert not {"l", "h", "k", "i"} & set(model.graph.initializers)


def test_bounds_that_the_model_computes_stay_arithmetic() -> None:
    model = parse(
        f"""{HEADER} g (float[3] x, float[1] h) => (float[3] y) <float l = {{-1}}> {{
          [fq] y = org.openvinotoolkit.FakeQuantize <levels = 256> (x, l, h, l, h)
        }}"""
    )
    (note,) = apply(ReadOpenvinoFakeQuantize(), model).diagnostics
    assert "computed while the model runs" in note.reason
    x = np.array([-3, 0.3, 7], np.float32)
    np.testing.assert_allclose(
        run(model, {"x": x, "h": np.array([3], np.float32)})[0], quantized(x, -1, 3, -1, 3, 256), rtol=1e-6
    )


def test_a_quantizer_in_a_branch_is_written_there() -> None:
    model = parse(
        f"""{HEADER} g (bool c, float[3] x) => (float[3] y) <float l = {{-64}}, float h = {{63.5}}> {{
          y = If (c) <
            then_branch = t () => (float[3] p) {{
              p = org.openvinotoolkit.FakeQuantize <levels = 256> (x, l, h, l, h)
            }},
            else_branch = e () => (float[3] q) {{ q = Neg (x) }}
          >
        }}"""
    )
    apply(ReadOpenvinoFakeQuantize(), model)
    x = np.array([0.3, -90, 2], np.float32)
    np.testing.assert_array_equal(run(model, {"c": np.array(True), "x": x})[0], [0.5, -64, 2])


@pytest.mark.parametrize("op", ["org.openvinotoolkit.Swish", "my.FakeQuantize"])
def test_other_ops_are_left_alone(op: str) -> None:
    text = f"""{HEADER} g (float[3] x) => (float[3] y) <float l = {{-64}}, float h = {{63.5}}> {{
      y = {op} <levels = 256> (x, l, h, l, h)
    }}"""
    assert not apply(ReadOpenvinoFakeQuantize(), parse(text)).modified


@pytest.mark.parametrize(
    ("node", "error", "message"),
    [
        ("<levels = 256> (x, l, h)", InvalidModel, "FakeQuantize 'fq': has 2 bounds where 4"),
        ("<levels = 256> ()", InvalidModel, "input 0 is missing"),
        ("(x, l, h, l, h)", InvalidModel, "FakeQuantize 'fq': has 0 levels"),
        ("<levels = 1> (x, l, h, l, h)", InvalidModel, "has 1 levels"),
        ("<levels = 256> (x, l, l, l, l)", InvalidModel, "empty or not finite"),
        ("<levels = 256> (x, h, l, h, l)", InvalidModel, "empty or not finite"),
        ("<levels = 256> (x, l, inf, l, inf)", InvalidModel, "empty or not finite"),
        ("<levels = 256> (half, l, h, l, h)", UnsupportedModel, "FLOAT16 tensor"),
    ],
    ids=lambda case: case if isinstance(case, str) else None,
)
def test_errors_name_the_node(node: str, error: type[Exception], message: str) -> None:
    model = parse(
        f"""{HEADER} g (float[3] x, float16[3] half) => (float[3] y)
        <float l = {{-64}}, float h = {{63.5}}, float inf = {{inf}}> {{
          [fq] q = org.openvinotoolkit.FakeQuantize {node}
          y = Add (q, x)
        }}"""
    )
    with pytest.raises(error, match=message):
        ReadOpenvinoFakeQuantize().run(model, CTX)


def test_an_opset_without_the_ops_it_needs_is_refused() -> None:
    model = model_of(-64, 63.5, 256)
    model.ir.opset_imports[""] = 12
    with pytest.raises(UnsupportedModel, match=r"node 'fq': .* in opset 12.*raise-opset"):
        ReadOpenvinoFakeQuantize().run(model, CTX)


MODELS = os.environ.get("QAT2INT8_ZOO", "")


@pytest.mark.zoo
@pytest.mark.skipif(not MODELS, reason="QAT2INT8_ZOO names no folder of models")
@pytest.mark.parametrize("path", sorted(Path(MODELS).glob("nncf*.onnx")) if MODELS else [], ids=lambda p: p.stem)
def test_exported_models_compute_what_their_framework_did(path: Path) -> None:
    model = Model.from_proto(onnx.load(path))
    Canonicalize().run(model, CTX)
    FoldConstants().run(model, CTX)
    result = apply(ReadOpenvinoFakeQuantize(), model)
    assert {note.code for note in result.diagnostics} <= {Code.GRID_REQUANTIZED}
    stored = np.load(path.with_suffix(".npz"))
    (actual,) = run(model, {model.graph.inputs[0].name or "": stored["input_0"]})
    expected = stored["output_0"]
    step = np.ptp(expected) / 255
    # Each grid that moved lets single levels flip on its way to the output.
    bound = step * (1.5 + 0.5 * len(result.diagnostics))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)
    assert np.mean(actual.argmax(-1) == expected.argmax(-1)) > 0.99
