"""Fake quant in float arithmetic: what is rewritten, what is left, and that both compute the same."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TARGET, apply, assert_same_numbers, check_pass, graph_text, parse, run

from qat2int8.ir import Code, Model, Severity
from qat2int8.passes import Context
from qat2int8.passes.canonicalize import Canonicalize
from qat2int8.passes.fake_quant import FakeQuant, fake_quants
from qat2int8.passes.read_primitive_fake_quant import ReadPrimitiveFakeQuant

CTX = Context(TARGET)

CONSTANTS = """float s = {0.25}, float inv = {4}, float z = {10}, float half = {0.5}, float zh = {10.5},
    float lo = {0}, float hi = {255}, float slo = {-128}, float shi = {127}, float nlo = {-7}, float nhi = {7},
    float clo = {-10}, float chi = {245}, float none = {-1}"""


def chain(body: str, constants: str = CONSTANTS, shape: str = "2,6") -> str:
    return f"g (float[{shape}] x) => (float[{shape}] y) <{constants}> {{ {body} }}"


def dense(shape: tuple[int, ...] = (2, 6)) -> dict[str, np.ndarray]:
    """Values inside and outside of every grid used here, none of them halfway between two levels."""
    values = np.random.default_rng(0).normal(size=shape) * 40
    return {"x": (np.floor(values * 4) / 4 + 0.07).astype(np.float32)}


def read(model: Model) -> FakeQuant:
    (fake,) = fake_quants(model)
    assert isinstance(fake, FakeQuant), fake.reason
    return fake


def test_golden() -> None:
    model, result = check_pass(
        ReadPrimitiveFakeQuant(),
        chain("a = Div (x, s) b = Add (a, z) c = Round (b) d = Clip (c, lo, hi) e = Sub (d, z) y = Mul (e, s)"),
        """g (float[2,6] x) => (float[2,6] y) <float inv = {4}, float half = {0.5}, float zh = {10.5},
          float slo = {-128}, float shi = {127}, float nlo = {-7}, float nhi = {7}, float clo = {-10},
          float chi = {245}, float none = {-1}, float x_scale = {0.25}, uint8 x_zero_point = {10}> {
          [x_QuantizeLinear_node] x_QuantizeLinear = QuantizeLinear (x, x_scale, x_zero_point)
          [x_QuantizeLinear_DequantizeLinear_node]
            y = DequantizeLinear (x_QuantizeLinear, x_scale, x_zero_point)
        }""",
    )
    assert result.counts == {"fake quants read": 1, "integer weights read": 0}
    assert not result.diagnostics
    assert str(read(model).params) == "uint8 scale=0.25 zp=10 (trained)"


U8 = "uint8 scale=0.25 zp=10 (trained)"
S8 = "int8 scale=0.25 (trained)"


@pytest.mark.parametrize(
    ("body", "grid"),
    [
        ("a = Mul (x, inv) b = Add (z, a) c = Round (b) d = Clip (c, lo, hi) e = Sub (d, z) y = Mul (s, e)", U8),
        ("a = Div (x, s) b = Add (a, z) c = Clip (b, lo, hi) d = Round (c) e = Sub (d, z) y = Div (e, inv)", U8),
        ("a = Div (x, s) b = Clip (a, clo, chi) c = Round (b) y = Mul (c, s)", U8),
        ("a = Div (x, s) b = Clip (a, clo, chi) c = Round (b) d = Add (c, z) e = Sub (d, z) y = Mul (e, s)", U8),
        ("a = Div (x, s) b = Round (a) c = Add (b, z) d = Clip (c, lo, hi) e = Sub (d, z) y = Mul (e, s)", U8),
        ("a = Div (x, s) b = Clip (a, clo, chi) c = Add (b, z) d = Round (c) e = Sub (d, z) y = Mul (e, s)", U8),
        (
            "a = Div (x, s) b = Clip (a, clo, chi) c = Add (b, z) d = Round (c) e = Clip (d, lo, hi) "
            "f = Sub (e, z) y = Mul (f, s)",
            U8,
        ),
        ("a = Div (x, s) b = Round (a) c = Clip (b, none, lo) y = Mul (c, s)", "uint1 scale=0.25 zp=1 (trained)"),
        ("a = Div (x, s) b = Add (a, z) c = Round (b) d = Sub (c, z) e = Clip (d, clo, chi) y = Mul (e, s)", U8),
        ("a = Div (x, s) b = Round (a) c = Max (b, slo) d = Min (shi, c) y = Mul (d, s)", S8),
        ("a = Div (x, s) b = Max (a, slo) c = Round (b) d = Min (c, shi) y = Mul (d, s)", S8),
        ("a = Div (x, s) b = Round (a) c = Relu (b) d = Min (c, hi) y = Mul (d, s)", "uint8 scale=0.25 (trained)"),
        (
            "a = Div (x, s) b = Round (a) c = Relu (b) d = Min (c, shi) y = Mul (d, s)",
            "uint7 scale=0.25 (trained)",
        ),
        ("a = Div (x, s) b = Round (a) c = Clip (b, nlo, nhi) y = Mul (c, s)", "int4 narrow scale=0.25 (trained)"),
        (
            "a = Div (x, s) b = Round (a) c = Clip (b, slo, hi) d = Clip (c, lo, shi) y = Mul (d, s)",
            "uint7 scale=0.25 (trained)",
        ),
    ],
)
def test_every_order_and_spelling(body: str, grid: str) -> None:
    model = parse(chain(body))
    before = model.to_proto()
    result = apply(ReadPrimitiveFakeQuant(), model)
    assert result.counts["fake quants read"] == 1
    assert {node.op_type for node in model.graph} <= {"QuantizeLinear", "Clip", "DequantizeLinear"}
    assert str(read(model).params) == grid
    assert_same_numbers(before, model, dense(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "body",
    [
        "a = Div (x, s) b = Add (a, z) c = Add (b, half) d = Floor (c) e = Clip (d, lo, hi) "
        "f = Sub (e, z) y = Mul (f, s)",
        "a = Div (x, s) b = Add (a, zh) c = Floor (b) d = Clip (c, lo, hi) e = Sub (d, z) y = Mul (e, s)",
        "a = Div (x, s) b = Add (a, z) c = Clip (b, lo, hi) d = Add (c, half) e = Floor (d) "
        "f = Sub (e, z) y = Mul (f, s)",
    ],
)
def test_floor_of_a_half_more_rounds_and_its_ties_are_reported(body: str) -> None:
    model = parse(chain(body))
    before = model.to_proto()
    (note,) = apply(ReadPrimitiveFakeQuant(), model).diagnostics
    assert (note.code, note.severity, note.value) == (Code.GRID_REQUANTIZED, Severity.NOTE, "x")
    assert "half up" in note.reason
    assert str(read(model).params) == U8
    assert_same_numbers(before, model, dense(), rtol=1e-6, atol=0)
    ties = {"x": (np.arange(12, dtype=np.float32) + 0.5).reshape(2, 6) * np.float32(0.25)}
    moved = (run(model, ties)[0] - run(before, ties)[0]) / 0.25
    np.testing.assert_array_equal(moved, np.where(np.arange(12) % 2, 0, -1).reshape(2, 6))


def test_ties_that_an_odd_zero_point_turns_are_reported() -> None:
    body = "a = Div (x, s) b = Add (a, z) c = Round (b) d = Clip (c, lo, hi) e = Sub (d, z) y = Mul (e, s)"
    odd = CONSTANTS.replace("float z = {10}", "float z = {11}")
    (note,) = apply(ReadPrimitiveFakeQuant(), parse(chain(body, odd))).diagnostics
    assert (note.code, note.severity) == (Code.GRID_REQUANTIZED, Severity.NOTE)
    behind = "a = Div (x, s) b = Round (a) c = Add (b, z) d = Clip (c, lo, hi) e = Sub (d, z) y = Mul (e, s)"
    assert not apply(ReadPrimitiveFakeQuant(), parse(chain(behind, odd))).diagnostics


def test_bounds_before_rounding_are_rounded_with_the_values() -> None:
    body = "a = Div (x, s) b = Clip (a, l, h) c = Round (b) y = Mul (c, s)"
    model = parse(chain(body, "float s = {0.25}, float l = {-127.5}, float h = {127.4}"))
    before = model.to_proto()
    apply(ReadPrimitiveFakeQuant(), model)
    assert str(read(model).params) == S8
    assert_same_numbers(before, model, dense(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("a = Div (x, s) b = Round (a) y = Mul (b, s)", "nothing clamps it on both sides"),
        ("a = Div (x, s) b = Round (a) c = Max (b, slo) y = Mul (c, s)", "nothing clamps it on both sides"),
        ("a = Div (x, s) b = Floor (a) c = Clip (b, lo, hi) y = Mul (c, s)", "rounds down"),
        ("a = Div (x, s) b = Add (a, half) c = Round (b) d = Clip (c, lo, hi) y = Mul (d, s)", "fraction"),
        ("a = Div (x, s) b = Round (a) c = Clip (b, lo, z) y = Mul (c, s)", "those of no grid"),
        ("a = Div (x, s) b = Round (a) c = Clip (b, lo, big) y = Mul (c, s)", "those of no grid"),
        ("a = Div (x, s) b = Round (a) c = Clip (b, half, hi) y = Mul (c, s)", "no levels"),
        ("a = Div (x, s) b = Round (a) c = Clip (b, z, hi) y = Mul (c, s)", "lies outside"),
        (
            "a = Div (x, s) b = Add (a, z) c = Round (b) d = Clip (c, lo, hi) y = Mul (d, s)",
            "zero point taken away",
        ),
        (
            "a = Div (x, s) b = Add (a, z) c = Round (b) d = Clip (c, lo, hi) e = Sub (d, one) y = Mul (e, s)",
            "zero point taken away",
        ),
        ("a = Div (x, m) b = Round (a) c = Clip (b, slo, shi) y = Mul (c, m)", "not a positive finite number"),
        ("a = Div (x, w) b = Round (a) c = Clip (b, slo, shi) y = Mul (c, w)", "not one number a channel"),
        (
            "a = Div (x, s) b = Clip (a, clo, chi) c = Add (b, p) d = Round (c) e = Sub (d, p) y = Mul (e, s)",
            "differ from channel to channel",
        ),
        ("a = Div (x, s) b = Add (a, p) c = Round (b) d = Clip (c, lo, hi) e = Sub (d, p) y = Mul (e, q)", "axes"),
    ],
)
def test_what_is_no_grid_is_left_and_reported(body: str, reason: str) -> None:
    if "(e, q)" in body:
        body = body.replace("Div (x, s)", "Div (x, q)")
    more = ", float big = {511}, float one = {1}, float m = {-0.25}, float[2,6] w = {1,2,3,4,5,6,7,8,9,10,11,12}"
    more += ", float[2,1] p = {1,2}, float[6] q = {1,2,3,4,5,6}"
    model = parse(chain(body, CONSTANTS + more))
    before = graph_text(model)
    result = apply(ReadPrimitiveFakeQuant(), model)
    (note,) = result.diagnostics
    assert note.code == Code.UNSUPPORTED_FAKE_QUANT
    assert reason in note.reason
    assert note.remedy
    assert graph_text(model) == before


@pytest.mark.parametrize("tensor", ["a", "b", "c"])
@pytest.mark.parametrize("how", ["output", "reader"])
def test_what_lies_between_must_be_read_by_nobody_else(tensor: str, how: str) -> None:
    body = "a = Div (x, s) b = Round (a) c = Clip (b, slo, shi) y = Mul (c, s)"
    text = chain(body + (f" u = Neg ({tensor})" if how == "reader" else ""))
    text = text.replace("(float[2,6] y)", f"(float[2,6] y, float[2,6] {'u' if how == 'reader' else tensor})")
    model = parse(text)
    (note,) = apply(ReadPrimitiveFakeQuant(), model).diagnostics
    assert note.code == Code.UNSUPPORTED_FAKE_QUANT
    assert f"'{tensor}' is read elsewhere" in note.reason


@pytest.mark.parametrize(
    "body",
    [
        "y = Round (x)",
        "a = Div (x, s) y = Round (a)",
        "a = Round (x) y = Mul (a, s)",
        "a = Div (x, s) b = Round (a) c = Clip (b, slo, shi) y = Mul (c, inv)",
        "a = Div (s, x) b = Round (a) c = Clip (b, slo, shi) y = Mul (c, s)",
        "a = Div (x, s) b = Round (a) c = Sub (z, b) d = Clip (c, slo, shi) y = Mul (d, s)",
        "a = Div (x, s) b = Ceil (a) c = Clip (b, slo, shi) y = Mul (c, s)",
        "a = Div (x, s) b = Round (a) c = Clip (b, slo, shi) d = Neg (c) y = Mul (d, s)",
        "a = Div (x, x) b = Round (a) c = Clip (b, slo, shi) y = Mul (c, x)",
        "a = Div (x, s) b = Round (a) c = Clip (b, slo, shi) y = Mul (c, t)",
        "a = Div (x, p) b = Round (a) c = Clip (b, slo, shi) y = Mul (c, q)",
    ],
)
def test_other_uses_of_rounding_are_no_fake_quant(body: str) -> None:
    more = ", float t = {0.2501}, float[2,1] p = {1,2}, float[6] q = {1,2,3,4,5,6}"
    model = parse(chain(body, CONSTANTS + more))
    before = graph_text(model)
    result = apply(ReadPrimitiveFakeQuant(), model)
    assert not result.modified
    assert not result.diagnostics
    assert graph_text(model) == before


def test_other_float_types_are_left() -> None:
    model = parse(
        """g (float16[2] x) => (float16[2] y)
        <float16 s = {1}, float16 lo = {-128}, float16 hi = {127}> {
          a = Div (x, s) b = Round (a) c = Clip (b, lo, hi) y = Mul (c, s)
        }"""
    )
    assert not apply(ReadPrimitiveFakeQuant(), model).modified


def test_an_opset_without_a_quantizer_is_left_and_reported() -> None:
    text = chain("a = Div (x, s) b = Round (a) c = Clip (b, slo, shi) y = Mul (c, s)")
    model = parse('<ir_version: 8, opset_import: ["" : 12]>\n' + text)
    (note,) = apply(ReadPrimitiveFakeQuant(), model).diagnostics
    assert "opset 12" in note.reason


def test_a_parameter_that_adds_a_dimension_is_left() -> None:
    text = """g (float[6] x) => (float[1,6] y) <float[1,1] s = {0.25}, float lo = {-128}, float hi = {127}> {
      a = Div (x, s) b = Round (a) c = Clip (b, lo, hi) y = Mul (c, s)
    }"""
    (note,) = apply(ReadPrimitiveFakeQuant(), parse(text)).diagnostics
    assert "dimensions" in note.reason


def test_a_tensor_with_several_fake_quants_and_a_graph_output() -> None:
    text = """g (float[2,6] x) => (float[2,6] y, float[2,6] v)
    <float s = {0.25}, float t = {0.5}, float lo = {-128}, float hi = {127}> {
      a = Div (x, s) b = Round (a) c = Clip (b, lo, hi) y = Mul (c, s)
      d = Div (x, t) e = Round (d) f = Clip (e, lo, hi) u = Mul (f, t)
      v = Relu (u)
    }"""
    model = parse(text)
    before = model.to_proto()
    assert apply(ReadPrimitiveFakeQuant(), model).counts["fake quants read"] == 2
    assert [node.op_type for node in model.graph] == ["QuantizeLinear", "DequantizeLinear"] * 2 + ["Relu"]
    assert_same_numbers(before, model, dense(), rtol=0, atol=0)


WEIGHT = """g (float[1,3] x) => (float[1,2] y)
<float[2,3] w = {{0.3, -5, 1.25, 100, -0.125, 0.375}}, {constants}> {{ {body} y = Gemm <transB = 1> (x, v) }}"""


@pytest.mark.parametrize(
    ("constants", "body", "integers", "scale"),
    [
        (
            "float[2,1] s = {0.25, 0.5}, float lo = {-128}, float hi = {127}",
            "a = Div (w, s) b = Round (a) c = Clip (b, lo, hi) v = Mul (c, s)",
            [[1, -20, 5], [127, 0, 1]],
            [0.25, 0.5],
        ),
        (
            "float s = {0.25}, float h = {0.5}, float lo = {-127}, float hi = {127}",
            "a = Div (w, s) b = Add (a, h) c = Floor (b) d = Clip (c, lo, hi) v = Mul (d, s)",
            [[1, -20, 5], [127, 0, 2]],
            0.25,
        ),
        (
            "float s = {0.25}, float z = {101}, float lo = {0}, float hi = {255}",
            "a = Div (w, s) b = Add (a, z) c = Round (b) d = Clip (c, lo, hi) e = Sub (d, z) v = Mul (e, s)",
            [[102, 81, 106], [255, 100, 102]],
            0.25,
        ),
    ],
)
def test_a_weight_keeps_the_integers_of_the_source(
    constants: str, body: str, integers: list[list[int]], scale: float | list[float]
) -> None:
    """The second and third round ties otherwise than QuantizeLinear: 1.5 up to 2, -0.5 + 101 down to 100."""
    model = parse(WEIGHT.format(constants=constants, body=body))
    before = model.to_proto()
    result = apply(ReadPrimitiveFakeQuant(), model)
    assert not result.diagnostics
    assert [node.op_type for node in model.graph] == ["DequantizeLinear", "Gemm"]
    fake = read(model)
    assert fake.constant
    assert model.constant(fake.source).tolist() == integers  # type: ignore[union-attr]
    assert fake.params.scale.tolist() == scale
    assert fake.params.axis == (0 if isinstance(scale, list) else None)
    assert_same_numbers(before, model, {"x": np.array([[1, -2, 3]], np.float32)}, rtol=0, atol=0)


def test_a_reciprocal_that_stands_first_is_the_factor_of_a_weight() -> None:
    body = "a = Mul (inv, w) b = Round (a) c = Clip (b, lo, hi) v = Mul (s, c)"
    constants = "float s = {0.25}, float inv = {4}, float lo = {-128}, float hi = {127}"
    model = parse(WEIGHT.format(constants=constants, body=body))
    assert apply(ReadPrimitiveFakeQuant(), model).counts["fake quants read"] == 1
    assert model.constant(read(model).source).tolist() == [[1, -20, 5], [127, 0, 2]]  # type: ignore[union-attr]


def test_a_weight_is_divided_in_float32() -> None:
    """In float64 this quotient is below the tie that float32 rounds it to."""
    weight, step = np.float32(0.35), np.float32(0.1)
    assert np.rint(weight / step) == 4
    assert np.rint(np.float64(weight) / np.float64(step)) == 3
    body = "a = Div (w, s) b = Round (a) c = Clip (b, lo, hi) v = Mul (c, s)"
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]> g (float[1] x) => (float[1] y) {{ {body} y = Mul (x, v) }}"""
    )
    for name, value in {"w": [weight], "s": step, "lo": -128, "hi": 127}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value, np.float32), name))
    model = Model.from_proto(proto)
    apply(ReadPrimitiveFakeQuant(), model)
    assert_same_numbers(proto, model, {"x": np.ones(1, np.float32)}, rtol=0, atol=0)


def test_a_weight_with_nan_is_left_and_reported() -> None:
    body = "a = Div (w, s) b = Round (a) c = Clip (b, lo, hi) v = Mul (c, s)"
    text = WEIGHT.format(constants="float s = {0.25}, float lo = {-128}, float hi = {127}", body=body)
    proto = parse(text).to_proto()
    next(t for t in proto.graph.initializer if t.name == "w").CopyFrom(
        onnx.numpy_helper.from_array(np.full((2, 3), np.nan, np.float32), "w")
    )
    (note,) = apply(ReadPrimitiveFakeQuant(), Model.from_proto(proto)).diagnostics
    assert "NaN" in note.reason


@pytest.mark.parametrize(
    ("constants", "body", "axis", "zero"),
    [
        ("float s = {0.25}", "c = Cast <to = 1> (w) v = Mul (c, s)", None, 0),
        ("float[2,1] s = {0.25, 0.5}", "c = Cast <to = 1> (w) v = Mul (s, c)", 0, 0),
        ("float s = {0.25}, float z = {3}", "c = Cast <to = 1> (w) d = Sub (c, z) v = Mul (d, s)", None, 3),
        (
            "float[2,1] s = {0.25, 0.5}, int8[2,1] z = {3, -4}",
            "c = Cast <to = 1> (w) e = Cast <to = 1> (z) d = Sub (c, e) v = Mul (d, s)",
            0,
            3,
        ),
    ],
)
def test_integers_cast_to_float_and_scaled(constants: str, body: str, axis: int | None, zero: int) -> None:
    model = parse(
        f"""g (float[1,3] x) => (float[1,2] y) <int8[2,3] w = {{1, -20, 5, 127, 0, -128}}, {constants}> {{
          {body} y = Gemm <transB = 1> (x, v)
        }}"""
    )
    before = model.to_proto()
    assert apply(ReadPrimitiveFakeQuant(), model).counts == {"fake quants read": 0, "integer weights read": 1}
    assert [node.op_type for node in model.graph] == ["DequantizeLinear", "Gemm"]
    params = read(model).params
    assert params.axis == axis
    assert int(params.zero_point.reshape(-1)[0]) == zero
    assert_same_numbers(before, model, {"x": np.array([[1, -2, 3]], np.float32)}, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("weight", "constants", "body"),
    [
        ("int8[2,3] w", "float s = {0.25}", "c = Cast <to = 1> (w) t = Neg (c) v = Mul (t, s)"),
        ("int32[2,3] w", "float s = {0.25}", "c = Cast <to = 1> (w) v = Mul (c, s)"),
        (
            "int8[2,3] w",
            "float s = {0.25}, float z = {0.5}",
            "c = Cast <to = 1> (w) d = Sub (c, z) v = Mul (d, s)",
        ),
        (
            "int8[2,3] w",
            "float s = {0.25}, float z = {500}",
            "c = Cast <to = 1> (w) d = Sub (c, z) v = Mul (d, s)",
        ),
        ("int8[2,3] w", "float s = {-0.25}", "c = Cast <to = 1> (w) v = Mul (c, s)"),
        ("int8[2,3] w", "float s = {0.25}", "c = Cast <to = 1> (w) t = Mul (c, s) v = Add (t, c)"),
        ("int8[2,3] w", "float s = {0.25}", "c = Cast <to = 1> (w) d = Relu (c) v = Mul (d, s)"),
        ("int8[2,3] w", "float16 s = {1}", "c = Cast <to = 10> (w) t = Mul (c, s) v = Cast <to = 1> (t)"),
    ],
)
def test_other_integers_are_left_to_constant_folding(weight: str, constants: str, body: str) -> None:
    model = parse(
        f"""g (float[1,3] x) => (float[1,2] y) <{weight} = {{1, -20, 5, 100, 0, -128}}, {constants}> {{
          {body} y = Gemm <transB = 1> (x, v)
        }}"""
    )
    before = graph_text(model)
    result = apply(ReadPrimitiveFakeQuant(), model)
    assert not result.modified
    assert not result.diagnostics
    assert graph_text(model) == before


@pytest.mark.parametrize("tensor", ["c", "d"])
def test_floats_between_integers_and_scale_that_are_an_output_stay(tensor: str) -> None:
    model = parse(
        f"""g (float[3] x) => (float[3] y, float[3] {tensor})
        <int8[3] w = {{1, 2, 3}}, float s = {{0.25}}, float z = {{1}}> {{
          c = Cast <to = 1> (w) d = Sub (c, z) v = Mul (d, s) y = Mul (x, v)
        }}"""
    )
    assert not apply(ReadPrimitiveFakeQuant(), model).modified


def test_integers_that_are_read_elsewhere_stay_there() -> None:
    model = parse(
        """g (float[3] x) => (float[3] y, int8[3] u) <int8[3] w = {1, 2, 3}, float s = {0.25}> {
          c = Cast <to = 1> (w) v = Mul (c, s) y = Mul (x, v) u = Identity (w)
        }"""
    )
    before = model.to_proto()
    assert apply(ReadPrimitiveFakeQuant(), model).counts["integer weights read"] == 1
    assert_same_numbers(before, model, {"x": np.ones(3, np.float32)}, rtol=0, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    scale=st.floats(2**-10, 2**4, width=32),
    zero=st.integers(0, 255),
    bits=st.integers(2, 8),
    clamp_first=st.booleans(),
    multiply=st.booleans(),
    channels=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_grid_computes_the_same_up_to_ties(
    scale: float, zero: int, bits: int, clamp_first: bool, multiply: bool, channels: bool, seed: int
) -> None:
    """Off the ties bit for bit, so values are put 0.3 of a step beside a level."""
    zero %= 1 << bits
    steps = np.asarray([scale, scale * 3], np.float32).reshape(2, 1) if channels else np.float32(scale)
    into, onto = ("Mul", 1 / steps) if multiply else ("Div", steps)
    order = "b = Clip (a, lo, hi) c = Round (b)" if clamp_first else "b = Round (a) c = Clip (b, lo, hi)"
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2,40] x) => (float[2,40] y) {{
          t = {into} (x, i) a = Add (t, z) {order} d = Sub (c, z) y = Mul (d, s)
        }}"""
    )
    for name, array in {"i": onto, "s": steps, "z": zero, "lo": 0, "hi": (1 << bits) - 1}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array, np.float32), name))
    model = Model.from_proto(proto)
    assert apply(ReadPrimitiveFakeQuant(), model).counts["fake quants read"] == 1
    levels = np.random.default_rng(seed).integers(-400, 400, (2, 40)) + 0.3
    feeds = {"x": (levels * steps).astype(np.float32)}
    np.testing.assert_array_equal(run(model, feeds)[0], run(proto, feeds)[0])


MODELS = os.environ.get("QAT2INT8_ZOO", "")
PRIMITIVE = ["hand_manual_round", "hand_manual_floor_half"]


@pytest.mark.zoo
@pytest.mark.skipif(not MODELS, reason="QAT2INT8_ZOO names no folder of models")
@pytest.mark.parametrize("name", PRIMITIVE)
def test_exported_models_are_read_completely(name: str) -> None:
    model = Model.from_proto(onnx.load(Path(MODELS) / f"{name}.onnx"))
    Canonicalize().run(model, CTX)
    data = np.load(Path(MODELS) / f"{name}.npz")
    assert apply(ReadPrimitiveFakeQuant(), model).counts["fake quants read"] == 6
    assert all(isinstance(fake, FakeQuant) for fake in fake_quants(model))
    assert {node.op_type for node in model.graph}.isdisjoint({"Round", "Floor", "Clip"})
    feeds = {value.name or "": data["input_0"] for value in model.graph.inputs}
    agreement = np.mean(run(model, feeds)[0].argmax(-1) == data["output_0"].argmax(-1))
    assert agreement >= 0.99


@pytest.mark.zoo
@pytest.mark.skipif(not MODELS, reason="QAT2INT8_ZOO names no folder of models")
@pytest.mark.parametrize("path", sorted(Path(MODELS).glob("*.onnx")) if MODELS else [], ids=lambda path: path.stem)
def test_other_exported_models_are_left_alone(path: Path) -> None:
    model = Model.from_proto(onnx.load(path))
    Canonicalize().run(model, CTX)
    assert ReadPrimitiveFakeQuant().run(model, CTX).modified == (path.stem in PRIMITIVE)
