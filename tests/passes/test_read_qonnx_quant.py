import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as oir
import pytest
from support import TARGET, apply, check_pass, parse, run

from qat2int8.ir import INT8, UINT8, Code, InvalidModel, Model, QuantDType, UnsupportedModel
from qat2int8.passes import Context
from qat2int8.passes.canonicalize import Canonicalize
from qat2int8.passes.fake_quant import FakeQuant, fake_quants
from qat2int8.passes.fold_constants import FoldConstants
from qat2int8.passes.read_qonnx_quant import ReadQonnxQuant

CTX = Context(TARGET)
HEADER = """<ir_version: 8, opset_import: ["" : 17, "qonnx.custom_op.general" : 2, "finn.custom_op.general" : 1,
 "onnx.brevitas" : 1, "my" : 1]>"""
ROUNDING: dict[str, Callable[[Any], Any]] = {
    "ROUND": np.round,
    "HALF_EVEN": np.round,
    "CEIL": np.ceil,
    "FLOOR": np.floor,
    "UP": lambda v: np.where(v < 0, np.floor(v), np.ceil(v)),
    "DOWN": np.fix,
    "ROUND_TO_ZERO": np.fix,
    "HALF_UP": lambda v: np.where(v < 0, np.ceil(v - 0.5), np.floor(v + 0.5)),
    "HALF_DOWN": lambda v: np.where(v < 0, np.floor(v + 0.5), np.ceil(v - 0.5)),
}
TIES = np.arange(-24, 24, dtype=np.float32).reshape(4, 12) / 4


def quantized(x: Any, scale: Any, zero: Any, bits: float, signed: int, narrow: int, mode: str = "ROUND") -> Any:
    """What the definition of the format says."""
    low = -(2 ** (bits - 1)) + narrow if signed else 0
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1 - narrow
    levels = ROUNDING[mode](np.clip(x / scale + zero, low, high))
    if signed and bits == 1:
        levels = np.where(x / scale + zero >= 0, 1, -1)
    return (levels - zero) * scale


def model_of(
    *,
    weight: npt.NDArray[np.float32] | None = None,
    scale: npt.ArrayLike = 0.5,
    zero: npt.ArrayLike = 0,
    bits: float = 8,
    signed: int = 1,
    narrow: int = 0,
    mode: str = "ROUND",
    shape: tuple[int, ...] = (4, 12),
) -> Model:
    """``y = x + Quant(weight)``, or ``y = Quant(x)``."""
    source = "x" if weight is None else "w"
    nodes = [
        onnx.helper.make_node(
            "Quant",
            [source, "s", "z", "b"],
            ["y" if weight is None else "q"],
            name="fq",
            domain="qonnx.custom_op.general",
            signed=signed,
            narrow=narrow,
            rounding_mode=mode,
        )
    ]
    parameters = {"s": scale, "z": zero, "b": bits}
    if weight is not None:
        nodes.append(onnx.helper.make_node("Add", ["x", "q"], ["y"]))
        shape = weight.shape
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.asarray(v, np.float32), name) for name, v in parameters.items()]
        + ([] if weight is None else [onnx.numpy_helper.from_array(weight, "w")]),
    )
    imports = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("qonnx.custom_op.general", 2)]
    return Model.from_proto(onnx.helper.make_model(graph, opset_imports=imports, ir_version=8))


def op_types(model: Model) -> list[str]:
    return [node.op_type for node in model.graph]


def only(model: Model) -> FakeQuant:
    (fake,) = fake_quants(model)
    assert isinstance(fake, FakeQuant)
    return fake


def test_an_activation_of_few_bits_is_quantized_clipped_and_dequantized() -> None:
    _, result = check_pass(
        ReadQonnxQuant(),
        f"""{HEADER} g (float[2,3] x) => (float[2,3] y) <float s = {{0.5}}, float z = {{0}}, float b = {{4}}> {{
          [fq] q = qonnx.custom_op.general.Quant <signed = 1, narrow = 0, rounding_mode = "ROUND"> (x, s, z, b)
          [relu] y = Relu (q)
        }}""",
        """g (float[2,3] x) => (float[2,3] y)
        <float q_scale = {0.5}, int8 q_zero_point = {0}, int8 q_low = {-8}, int8 q_high = {7}> {
          [q_quantized] q_quantized = QuantizeLinear (x, q_scale, q_zero_point)
          [q_clipped] q_clipped = Clip (q_quantized, q_low, q_high)
          [fq] q = DequantizeLinear (q_clipped, q_scale, q_zero_point)
          [relu] y = Relu (q)
        }""",
    )
    assert result.counts == {"quantizers read": 1, "quantizers written in float": 0}
    assert not result.diagnostics


def test_eight_unsigned_bits_with_a_zero_point_need_no_clip() -> None:
    check_pass(
        ReadQonnxQuant(),
        f"""{HEADER} g (float[2,3] x) => (float[2,3] y) <float s = {{0.5}}, float z = {{7}}, float b = {{8}}> {{
          [fq] y = qonnx.custom_op.general.Quant <signed = 0, narrow = 0, rounding_mode = "ROUND"> (x, s, z, b)
        }}""",
        """g (float[2,3] x) => (float[2,3] y) <float y_scale = {0.5}, uint8 y_zero_point = {7}> {
          [y_quantized] y_quantized = QuantizeLinear (x, y_scale, y_zero_point)
          [fq] y = DequantizeLinear (y_quantized, y_scale, y_zero_point)
        }""",
    )


def test_a_weight_becomes_its_integers() -> None:
    check_pass(
        ReadQonnxQuant(),
        f"""{HEADER} g (float[2,3] x) => (float[2,3] y)
        <float[2,3] w = {{0.5, -9, 0.3, 1, 0.125, 9}}, float[2,1] s = {{0.5, 0.25}}, float z = {{0}},
         float b = {{4}}> {{
          [fq] q = qonnx.custom_op.general.Quant <signed = 1, narrow = 1, rounding_mode = "ROUND"> (w, s, z, b)
          [add] y = Add (x, q)
        }}""",
        """g (float[2,3] x) => (float[2,3] y)
        <int8[2,3] q_quantized = {1, -7, 1, 4, 0, 7}, float[2] q_scale = {0.5, 0.25},
         int8[2] q_zero_point = {0, 0}, int8 q_low = {-7}, int8 q_high = {7}> {
          [q_clipped] q_clipped = Clip (q_quantized, q_low, q_high)
          [fq] q = DequantizeLinear <axis = 0> (q_clipped, q_scale, q_zero_point)
          [add] y = Add (x, q)
        }""",
    )


@pytest.mark.parametrize("mode", sorted(ROUNDING))
@pytest.mark.parametrize(
    ("bits", "signed", "narrow", "zero"), [(8, 1, 0, 0), (3, 1, 1, 0), (2, 0, 0, 1), (4, 0, 1, 3)]
)
def test_constants_are_rounded_by_every_mode(mode: str, bits: int, signed: int, narrow: int, zero: int) -> None:
    model = model_of(weight=TIES, zero=zero, bits=bits, signed=signed, narrow=narrow, mode=mode)
    assert not apply(ReadQonnxQuant(), model).diagnostics
    (actual,) = run(model, {"x": np.zeros_like(TIES)})
    np.testing.assert_array_equal(actual, quantized(TIES, 0.5, zero, bits, signed, narrow, mode))
    assert "Round" not in op_types(model)


@pytest.mark.parametrize("mode", sorted(ROUNDING))
@pytest.mark.parametrize(
    ("bits", "signed", "narrow", "zero"), [(8, 1, 0, 0), (3, 1, 1, 0), (2, 0, 0, 2), (4, 0, 1, 4)]
)
def test_activations_compute_what_the_format_says(
    mode: str, bits: int, signed: int, narrow: int, zero: int
) -> None:
    model = model_of(zero=zero, bits=bits, signed=signed, narrow=narrow, mode=mode)
    result = apply(ReadQonnxQuant(), model)
    (actual,) = run(model, {"x": TIES})
    np.testing.assert_array_equal(actual, quantized(TIES, 0.5, zero, bits, signed, narrow, mode))
    exact = mode in ("ROUND", "HALF_EVEN")
    assert ("QuantizeLinear" in op_types(model)) == exact
    assert [note.code for note in result.diagnostics] == [] if exact else [Code.UNSUPPORTED_FAKE_QUANT]
    assert exact or mode in result.diagnostics[0].reason


def test_the_mode_is_read_in_any_case() -> None:
    model = model_of(mode="floor")
    apply(ReadQonnxQuant(), model)
    np.testing.assert_array_equal(run(model, {"x": TIES})[0], quantized(TIES, 0.5, 0, 8, 1, 0, "FLOOR"))


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"bits": 16}, "16 bits wide"),
        ({"bits": 3.5}, "3.5 bits wide"),
        ({"zero": 0.25}, "not a whole number"),
        ({"zero": -129}, "does not fit int8"),
        ({"zero": 256, "signed": 0}, "does not fit uint8"),
        ({"zero": -1, "signed": 0}, "does not fit uint8"),
        ({"bits": 1}, "two levels"),
        ({"bits": 1, "zero": 0.5}, "two levels"),
        ({"scale": np.full((4, 12), 0.5)}, "along several axes"),
        ({"scale": np.full((1, 1, 12), 0.5)}, "3 dimensions"),
    ],
    ids=lambda case: str(case)[:30],
)
def test_what_is_no_grid_stays_float_and_is_reported(parameters: dict[str, Any], reason: str) -> None:
    model = model_of(**parameters)
    result = apply(ReadQonnxQuant(), model)
    (note,) = result.diagnostics
    assert (note.code, note.node, note.value) == (Code.UNSUPPORTED_FAKE_QUANT, "fq", "y")
    assert reason in note.reason
    assert note.remedy
    assert result.counts == {"quantizers read": 0, "quantizers written in float": 1}
    assert "QuantizeLinear" not in op_types(model)
    given = {"scale": 0.5, "zero": 0, "bits": 8, "signed": 1, "narrow": 0} | parameters
    np.testing.assert_allclose(run(model, {"x": TIES})[0], quantized(TIES, **given), rtol=1e-6)


@pytest.mark.parametrize("parameters", [{"bits": 16}, {"bits": 32}, {"zero": 0.25}, {"bits": 2.5}], ids=str)
def test_a_weight_that_is_no_grid_becomes_the_numbers_it_stands_for(
    parameters: dict[str, Any],
) -> None:
    weight = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    model = model_of(weight=weight, scale=2.0**-6, **parameters)
    result = apply(ReadQonnxQuant(), model)
    assert [note.code for note in result.diagnostics] == [Code.UNSUPPORTED_FAKE_QUANT]
    assert op_types(model) == ["Add"]
    assert len(model.graph.initializers) == 1
    given = {"scale": 2.0**-6, "zero": 0, "bits": 8, "signed": 1, "narrow": 0} | parameters
    np.testing.assert_array_equal(run(model, {"x": np.zeros_like(weight)})[0], quantized(weight, **given))


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_a_bias_becomes_float_without_a_word(bits: int) -> None:
    bias = np.array([1.26, -3.1, 0.49], np.float32)
    model = model_of(weight=bias, scale=[0.5, 0.25, 2.0**-9], bits=bits)
    assert not apply(ReadQonnxQuant(), model).diagnostics
    np.testing.assert_array_equal(run(model, {"x": np.zeros(3, np.float32)})[0], [1.5, -3.0, 251 / 512])


def test_a_vector_of_few_bits_that_is_no_grid_is_reported() -> None:
    model = model_of(weight=np.array([1.26, -3.1], np.float32), zero=0.5)
    assert len(apply(ReadQonnxQuant(), model).diagnostics) == 1


def test_a_bipolar_level_is_that_of_the_input_however_large_the_scale() -> None:
    model = parse(
        f"""{HEADER} g (float[3] x) => (float[3] y) <float[3] w = {{-1, 0, 1}}, float s = {{3}}> {{
          q = qonnx.custom_op.general.BipolarQuant (w, s)
          y = Add (q, x)
        }}"""
    )
    tiny = np.array([-np.finfo(np.float32).smallest_subnormal, 0, 1], np.float32)
    model.graph.initializers["w"].const_value = oir.tensor(tiny)
    apply(ReadQonnxQuant(), model)
    np.testing.assert_array_equal(run(model, {"x": np.zeros(3, np.float32)})[0], [-3, 3, 3])


def test_a_bias_of_eight_bits_is_a_grid() -> None:
    model = model_of(weight=np.array([1.26, -3.1], np.float32))
    apply(ReadQonnxQuant(), model)
    assert only(model).params.dtype == INT8


@pytest.mark.parametrize(
    ("shape", "scale_shape", "axis"),
    [((2, 3, 4, 4), (1, 3, 1, 1), 1), ((3, 2, 4, 4), (3, 1, 1, 1), 0), ((2, 3), (3,), 1), ((2, 3, 4), (3, 1), 1)],
)
def test_the_axis_is_the_one_that_broadcasting_aligns(
    shape: tuple[int, ...], scale_shape: tuple[int, ...], axis: int
) -> None:
    scale = np.array([0.5, 0.25, 0.125], np.float32).reshape(scale_shape)
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for model in (model_of(weight=weight, scale=scale), model_of(shape=shape, scale=scale)):
        apply(ReadQonnxQuant(), model)
        dequantize = next(node for node in model.graph if node.op_type == "DequantizeLinear")
        assert dequantize.attributes.get_int("axis") == axis
        (actual,) = run(model, {"x": np.zeros_like(weight) if model.values().get("q") else weight})
        np.testing.assert_array_equal(actual, quantized(weight, scale, 0, 8, 1, 0))


def test_a_zero_point_per_channel_goes_with_one_scale() -> None:
    zero = np.array([[1.0], [2.0], [250.0]], np.float32)
    model = model_of(weight=TIES[:3], zero=zero, signed=0)
    apply(ReadQonnxQuant(), model)
    assert only(model).params.zero_point.tolist() == [1, 2, 250]
    np.testing.assert_array_equal(
        run(model, {"x": TIES[:3] * 0})[0], quantized(TIES[:3], 0.5, zero, 8, 0, 0).astype(np.float32)
    )


def test_the_axis_counts_from_the_back_where_the_rank_is_not_known() -> None:
    """Shapes end at the first quantizer: the pass finds them behind it only when it is done."""
    text = f"""{HEADER} g (float[1,2,2,2] x) => (float[1,2,2,2] y)
    <float s = {{0.5}}, float[2,1,1] t = {{0.5, 0.25}}, float z = {{0}}, float b = {{8}}> {{
      [a] p = qonnx.custom_op.general.Quant <signed = 1, narrow = 0> (x, s, z, b)
      r = Relu (p)
      [b] y = qonnx.custom_op.general.Quant <signed = 1, narrow = 0> (r, t, z, b)
    }}"""
    model = parse(text)
    apply(ReadQonnxQuant(), model)
    dequantizers = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    assert dequantizers[1].attributes.get_int("axis") == -3
    assert model.values()["r"].shape == (1, 2, 2, 2)
    x = TIES.reshape(-1)[:8].reshape(1, 2, 2, 2) + 4
    np.testing.assert_array_equal(
        run(model, {"x": x})[0], quantized(np.maximum(x, 0), np.array([0.5, 0.25]).reshape(2, 1, 1), 0, 8, 1, 0)
    )


def test_the_attributes_default_to_signed_narrow_and_half_even() -> None:
    text = f"""{HEADER} g (float[4] x) => (float[4] y) <float s = {{0.5}}, float z = {{0}}, float b = {{3}}> {{
      y = qonnx.custom_op.general.Quant (x, s, z, b)
    }}"""
    model = parse(text)
    apply(ReadQonnxQuant(), model)
    assert only(model).params.dtype == QuantDType(3, signed=True, narrow_range=True)
    np.testing.assert_array_equal(
        run(model, {"x": np.array([-9, 9, 0.25, 0.75], np.float32)})[0], [-1.5, 1.5, 0, 1]
    )


@pytest.mark.parametrize(
    ("domain", "op_type", "known"),
    [
        ("onnx.brevitas", "Quant", True),
        ("finn.custom_op.general", "Quant", True),
        ("qonnx.custom_op.general", "IntQuant", True),
        ("my", "Quant", False),
    ],
)
def test_what_belongs_to_the_format(domain: str, op_type: str, known: bool) -> None:
    model = parse(
        f"""{HEADER} g (float[4] x) => (float[4] y) <float s = {{0.5}}, float z = {{0}}, float b = {{8}}> {{
          y = {domain}.{op_type} <signed = 0, narrow = 0> (x, s, z, b)
        }}"""
    )
    assert apply(ReadQonnxQuant(), model).modified == known
    if known:
        assert only(model).params.dtype == UINT8


def test_one_weight_quantized_twice_and_read_elsewhere_keeps_all_three() -> None:
    model = parse(
        f"""{HEADER} g (float[3] x) => (float[3] y, float[3] u)
        <float[3] w = {{0.3, -0.3, 1}}, float s = {{0.5}}, float t = {{0.25}}, float z = {{0}}, float b = {{8}}> {{
          p = qonnx.custom_op.general.Quant <narrow = 0> (w, s, z, b)
          q = qonnx.custom_op.general.Quant <narrow = 0> (w, t, z, b)
          u = Add (w, p)
          v = Add (p, q)
          y = Add (v, x)
        }}"""
    )
    apply(ReadQonnxQuant(), model)
    y, u = run(model, {"x": np.zeros(3, np.float32)})
    np.testing.assert_allclose(y, [0.75, -0.75, 2])
    np.testing.assert_allclose(u, [0.8, -0.8, 2])


def test_parameters_that_nothing_reads_any_more_go_and_others_stay() -> None:
    model = parse(
        f"""{HEADER} g (float[3] x) => (float[3] y) <float s = {{0.5}}, float z = {{0}}, float b = {{8}}> {{
          p = qonnx.custom_op.general.Quant <narrow = 0> (x, s, z, b)
          y = Mul (p, s)
        }}"""
    )
    apply(ReadQonnxQuant(), model)
    assert set(model.graph.initializers) == {"s", "p_scale", "p_zero_point"}


@pytest.mark.parametrize("bits", [4, 32])
def test_a_constant_that_is_a_graph_output_keeps_its_name(bits: int) -> None:
    model = parse(
        f"""{HEADER} g (float[3] x) => (float[3] q, float[3] y)
        <float[3] w = {{0.3, -0.3, 1}}, float s = {{0.5}}, float z = {{0}}, float b = {{{bits}}}> {{
          q = qonnx.custom_op.general.Quant (w, s, z, b)
          y = Add (q, x)
        }}"""
    )
    apply(ReadQonnxQuant(), model)
    for actual in run(model, {"x": np.zeros(3, np.float32)}):
        np.testing.assert_array_equal(actual, [0.5, -0.5, 1])


def test_a_quantizer_in_a_branch_is_written_there() -> None:
    model = parse(
        f"""{HEADER} g (bool c, float[3] x) => (float[3] y)
        <float s = {{0.5}}, float z = {{0}}, float b = {{8}}> {{
          y = If (c) <
            then_branch = t () => (float[3] p) {{ p = qonnx.custom_op.general.Quant (x, s, z, b) }},
            else_branch = e () => (float[3] q) {{ q = Neg (x) }}
          >
        }}"""
    )
    assert apply(ReadQonnxQuant(), model).counts["quantizers read"] == 1
    x = np.array([0.3, -90, 2], np.float32)
    np.testing.assert_array_equal(run(model, {"c": np.array(True), "x": x})[0], [0.5, -63.5, 2])


@pytest.mark.parametrize(
    ("parameters", "levels"),
    [({"s": "float s = {0.5}"}, [-0.5, 0.5, 0.5]), ({"s": "float[3] s = {1,2,3}"}, [-1, 2, 3])],
)
@pytest.mark.parametrize("constant", [True, False])
def test_bipolar_levels_follow_the_sign(parameters: dict[str, str], levels: list[float], constant: bool) -> None:
    source = "w" if constant else "x"
    model = parse(
        f"""{HEADER} g (float[3] x) => (float[3] y)
        <float[3] w = {{-0.1, 0, 7}}, float zero = {{0}}, {parameters["s"]}> {{
          [fq] q = qonnx.custom_op.general.BipolarQuant ({source}, s)
          other = Mul (x, zero)
          t = Add (other, q)
          u = Mul (w, zero)
          y = Add (t, u)
        }}"""
    )
    result = apply(ReadQonnxQuant(), model)
    np.testing.assert_array_equal(run(model, {"x": np.array([-0.1, 0, 7], np.float32)})[0], levels)
    assert bool(result.diagnostics) != constant
    if constant:
        assert only(model).params.dtype == QuantDType(2, signed=True, narrow_range=True)


def test_a_scale_that_the_model_computes_stays_arithmetic() -> None:
    model = parse(
        f"""{HEADER} g (float[3] x, float s) => (float[3] y) <float[3] w = {{0.3, -3, 7}}, float z = {{1}},
        float b = {{4}}> {{
          [fq] p = qonnx.custom_op.general.Quant <narrow = 0> (w, s, z, b)
          [fs] q = qonnx.custom_op.general.BipolarQuant (w, s)
          t = Add (p, q)
          y = Add (t, x)
        }}"""
    )
    notes = apply(ReadQonnxQuant(), model).diagnostics
    assert [note.node for note in notes] == ["fq", "fs"]
    assert all("computed while the model runs" in note.reason for note in notes)
    w, s = np.array([0.3, -3, 7], np.float32), np.array(-0.5, np.float32)
    expected = quantized(w, s, 1, 4, 1, 0) + np.where(w >= 0, s, -s)
    np.testing.assert_allclose(run(model, {"x": np.zeros(3, np.float32), "s": s})[0], expected)


@pytest.mark.parametrize(
    ("node", "error", "message"),
    [
        ("Trunc (x, s, z, b, b)", UnsupportedModel, "node 'fq': op 'Trunc' of domain"),
        ("Quant (x, s, z)", InvalidModel, r"Quant 'fq': has 3 inputs where 4 are needed"),
        ("BipolarQuant (x)", InvalidModel, r"has 1 inputs where 2"),
        ("Quant (x, s, z, dynamic)", UnsupportedModel, "bit width is not one constant"),
        ("Quant (x, s, z, wide)", UnsupportedModel, "bit width is not one constant"),
        ("Quant (x, s, z, zero)", UnsupportedModel, "bit width 0 is unknown"),
        ('Quant <rounding_mode = "STOCHASTIC"> (x, s, z, b)', UnsupportedModel, "'STOCHASTIC'"),
        ("Quant (x, zero, z, b)", InvalidModel, r"Quant 'fq' \[zero\]: a scale is not a positive"),
        ("Quant (x, nan, z, b)", InvalidModel, r"Quant 'fq' \[nan\]: a scale is not a positive"),
        ("Quant (x, inf, z, b)", InvalidModel, r"Quant 'fq' \[inf\]: a scale is not a positive"),
        ("Quant (half, s, z, b)", UnsupportedModel, "FLOAT16 tensor"),
    ],
    ids=lambda case: case if isinstance(case, str) else None,
)
def test_errors_name_the_node(node: str, error: type[Exception], message: str) -> None:
    model = parse(
        f"""{HEADER} g (float[3] x, float dynamic, float16[3] half) => (float[3] y)
        <float s = {{0.5}}, float z = {{0}}, float b = {{8}}, float zero = {{0}}, float[2] wide = {{8, 8}},
         float nan = {{nan}}, float inf = {{inf}}> {{
          [fq] q = qonnx.custom_op.general.{node}
          y = Relu (q)
        }}"""
    )
    with pytest.raises(error, match=message):
        ReadQonnxQuant().run(model, CTX)


def test_an_opset_without_the_ops_it_needs_is_refused() -> None:
    model = model_of()
    model.ir.opset_imports[""] = 12
    with pytest.raises(UnsupportedModel, match=r"node 'fq': .* in opset 12.*raise-opset"):
        ReadQonnxQuant().run(model, CTX)


def test_an_op_of_the_format_that_cannot_be_read_stops_before_anything_is_changed() -> None:
    model = parse(
        f"""{HEADER} g (float[3] x) => (float[3] y) <float s = {{0.5}}, float z = {{0}}, float b = {{8}}> {{
          q = qonnx.custom_op.general.Quant (x, s, z, b)
          [lstm] y = qonnx.custom_op.general.QuantLSTMCell (q)
        }}"""
    )
    with pytest.raises(UnsupportedModel, match="'lstm'"):
        ReadQonnxQuant().run(model, CTX)
    assert op_types(model) == ["Quant", "QuantLSTMCell"]


MODELS = os.environ.get("QAT2INT8_ZOO", "")


@pytest.mark.zoo
@pytest.mark.skipif(not MODELS, reason="QAT2INT8_ZOO names no folder of models")
@pytest.mark.parametrize("path", sorted(Path(MODELS).glob("*qonnx*.onnx")) if MODELS else [], ids=lambda p: p.stem)
def test_exported_models_compute_what_their_framework_did(path: Path) -> None:
    model = Model.from_proto(onnx.load(path))
    Canonicalize().run(model, CTX)
    FoldConstants().run(model, CTX)
    if any(node.op_type == "QuantLSTMCell" for node in model.graph):
        with pytest.raises(UnsupportedModel, match="QuantLSTMCell"):
            ReadQonnxQuant().run(model, CTX)
        return
    assert not apply(ReadQonnxQuant(), model).diagnostics
    stored = np.load(path.with_suffix(".npz"))
    (actual,) = run(model, {model.graph.inputs[0].name or "": stored["input_0"]})
    np.testing.assert_allclose(actual, stored["output_0"], rtol=0, atol=1e-6 * np.ptp(stored["output_0"]))
    assert all(isinstance(fake, FakeQuant) for fake in fake_quants(model))
