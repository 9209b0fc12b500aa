"""Weights become unsigned exactly where sums of two products would leave 16 bits, and every number stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TARGET, X86, apply, check_pass, parse, run

from qat2int8.ir import Model
from qat2int8.passes import Context
from qat2int8.passes.avoid_overflow import AvoidOverflow
from qat2int8.passes.overflow import overflowing_products
from qat2int8.pipelines.exact_products import overflow_warning, products_overflow
from qat2int8.pipelines.sessions import reference_session, run_session, session

NARROW = Context(replace(TARGET, product_sums="narrow"))
GRID = "float s = {0.5}, uint8 z = {128}"


def conv(weights: str, *, levels: str = "", grids: str = "float t = {0.25}, int8 n = {0}", tail: str = "") -> str:
    """A convolution of two input channels, ``levels`` between its Quantize and its Dequantize."""
    read = "xc" if levels else "xq"
    return (
        f"g (float[1, 2, 3, 3] x) => (float[1, 1, 3, 3] y) <{GRID}, {grids}, {weights}>"
        f" {{ xq = QuantizeLinear (x, s, z) {levels} xd = DequantizeLinear ({read}, s, z)"
        f" wd = DequantizeLinear (w, t, n) y = Conv (xd, wd) {tail} }}"
    )


def clip(top: int) -> str:
    return f"xc = Clip (xq, bottom, top) [{top}]"


def clipped(weights: str, top: int) -> str:
    return conv(
        weights,
        levels="xc = Clip (xq, bottom, top)",
        grids=f"float t = {{0.25}}, int8 n = {{0}}, uint8 bottom = {{0}}, uint8 top = {{{top}}}",
    )


def found(text: str) -> int:
    return len(overflowing_products(parse(text)))


def test_the_weight_and_its_zero_point_move_up_by_128() -> None:
    check_pass(
        AvoidOverflow(),
        conv("int8[1, 2, 1, 1] w = {100, 127}"),
        conv(
            "int8[1, 2, 1, 1] w = {100, 127}, uint8[1, 2, 1, 1] w_unsigned = {228, 255},"
            " uint8 w_zero_point = {128}",
        ).replace("(w, t, n)", "(w_unsigned, t, w_zero_point)"),
        ctx=NARROW,
    )


@pytest.mark.parametrize(
    ("first", "second", "height", "overflows"),
    [
        # 255 * 128 is 32,640, 255 * 129 is 32,895.
        (127, 1, 255, False),
        (127, 2, 255, True),
        (-128, 0, 255, False),
        (-127, -2, 255, True),
        # Of different signs they cancel.
        (127, -127, 255, False),
        (127, 127, 129, False),
        (127, 127, 130, True),
        (-128, -128, 128, False),
        (-128, -128, 129, True),
        (64, 64, 255, False),
    ],
)
def test_what_overflows_is_what_leaves_16_bits(first: int, second: int, height: int, overflows: bool) -> None:
    limits = np.iinfo(np.int16)
    assert overflows == (not limits.min <= height * (first + second) <= limits.max)
    assert found(clipped(f"int8[1, 2, 1, 1] w = {{{first}, {second}}}", height)) == overflows


def test_levels_are_followed_through_what_moves_them() -> None:
    moved = (
        "xc = Clip (xq, bottom, top) xm = MaxPool <kernel_shape = [1, 1]> (xc) xf = Concat <axis = 1> (xm, xm)"
        " xt = Transpose <perm = [0, 1, 3, 2]> (xf) xp = Pad (xt, pads, filler)"
    )

    def text(filler: int) -> str:
        return (
            f"g (float[1, 1, 3, 3] x) => (float[1, 1, 3, 3] y) <{GRID}, uint8 bottom = {{0}}, uint8 top = {{127}},"
            f" int64[8] pads = {{0, 0, 0, 0, 0, 0, 0, 0}}, uint8 filler = {{{filler}}}, float t = {{0.25}},"
            " int8 n = {0}, int8[1, 2, 1, 1] w = {127, 127}>"
            f" {{ xq = QuantizeLinear (x, s, z) {moved} xd = DequantizeLinear (xp, s, z)"
            " wd = DequantizeLinear (w, t, n) y = Conv (xd, wd) }"
        )

    assert found(text(0)) == 0
    assert found(text(128)) == 0
    assert found(text(200)) == 1


def test_one_filter_a_channel_never_overflows() -> None:
    text = (
        "g (float[1, 2, 3, 3] x) => (float[1, {out}, 1, 1] y) <{grid}, float t = {{0.25}}, int8 n = {{0}}>"
        " {{ xq = QuantizeLinear (x, s, z) xd = DequantizeLinear (xq, s, z)"
        " w = Constant <value = int8[{out}, 1, 3, 3] {{{levels}}}> ()"
        " wd = DequantizeLinear (w, t, n) y = Conv <group = 2> (xd, wd) }}"
    )
    for outputs, overflows in ((2, 0), (4, 1)):
        levels = ", ".join(["127"] * 9 * outputs)
        assert found(text.format(out=outputs, grid=GRID, levels=levels)) == overflows


def test_weights_of_different_outputs_are_never_added() -> None:
    gemm = (
        "g (float[1, 2] x) => (float[1, 2] y) <{grid}, float t = {{0.25}}, int8 n = {{0}},"
        " int8[2, 2] w = {{{levels}}}>"
        " {{ xq = QuantizeLinear (x, s, z) xd = DequantizeLinear (xq, s, z)"
        " wd = DequantizeLinear (w, t, n) y = {op} (xd, wd) }}"
    )
    rows, columns = "127, 127, 0, 0", "127, 0, 127, 0"
    for op, added, apart in (
        ("Gemm", columns, rows),
        ("Gemm <transB = 1>", rows, columns),
        ("MatMul", columns, rows),
    ):
        assert found(gemm.format(grid=GRID, op=op, levels=added)) == 1
        assert found(gemm.format(grid=GRID, op=op, levels=apart)) == 0


def test_other_targets_are_told_and_left_alone() -> None:
    text = conv("int8[1, 2, 1, 1] w = {100, 100}")
    _, result = check_pass(AvoidOverflow(), text, text)
    (finding,) = result.diagnostics
    assert finding.code == "Q204"
    assert finding.reason == "1 layer overflows on x86 processors without VNNI: wrong numbers"
    safe = conv("int8[1, 2, 1, 1] w = {64, 64}")
    assert check_pass(AvoidOverflow(), safe, safe)[1].diagnostics == ()
    for other in ({"activation": "int8"}, {"runtime": "tensorrt"}):
        quiet = Context(replace(TARGET, product_sums="narrow", **other))  # type: ignore[arg-type]
        assert check_pass(AvoidOverflow(), text, text, ctx=quiet)[1].diagnostics == ()


def test_layers_that_share_a_weight_and_others_that_read_its_integers() -> None:
    text = (
        "g (float[1, 2] x) => (float[1, 1] y, float[1, 1] u, int8[2, 1] kept) <" + GRID + ", float t = {0.25},"
        " int8 n = {0}, int8[2, 1] w = {100, 100}>"
        " { xq = QuantizeLinear (x, s, z) xd = DequantizeLinear (xq, s, z) wd = DequantizeLinear (w, t, n)"
        " y = MatMul (xd, wd) u = Gemm (xd, wd) kept = Identity (w) }"
    )
    model = parse(text)
    before = model.to_proto()
    assert apply(AvoidOverflow(), model, NARROW).counts == {"weights": 1}
    assert overflowing_products(model) == []
    feeds = {"x": np.full((1, 2), 60, np.float32)}
    for expected, actual in zip(run(before, feeds), run(model, feeds), strict=True):
        np.testing.assert_array_equal(actual, expected)


OPERATORS = {
    "QLinearConv": "y = QLinearConv (xq, s, z, w4, t, n, o, z)",
    "QLinearMatMul": "y = QLinearMatMul (xr, s, z, w, t, n, o, z)",
    "QGemm": "y = com.microsoft.QGemm <transB = 0> (xr, s, z, w, t, n, , o, z)",
    "MatMulInteger": "i = MatMulInteger (xr, w, z, n) f = Cast <to = 1> (i) y = QuantizeLinear (f, big, z)",
    "without zero points": "i = MatMulInteger (xr, w) f = Cast <to = 1> (i) y = QuantizeLinear (f, big, z)",
    "MatMulIntegerToFloat": (
        "f = com.microsoft.MatMulIntegerToFloat (xr, w, s, t, z, n) y = QuantizeLinear (f, o, z)"
    ),
    "DynamicQuantizeMatMul": (
        "d = DequantizeLinear (xr, s, z) f = com.microsoft.DynamicQuantizeMatMul (d, w, t, n)"
        " y = QuantizeLinear (f, o, z)"
    ),
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_on_integers_keep_their_numbers(operator: str) -> None:
    body = OPERATORS[operator]
    shapes = ", int8[1, 4, 1, 1] w4 = {100, 100, -100, -100}" if "w4" in body else ""
    weights = shapes or ", int8[4, 1] w = {100, 100, -100, -100}"
    parameters = {
        "s": "float s = {0.5}",
        "z": "uint8 z = {128}",
        "t": "float t = {0.25}",
        "n": "int8 n = {0}",
        "o": "float o = {500}",
        "big": "float big = {2000}",
    }
    used = [text for name, text in parameters.items() if f" {name}" in body.replace("(", " ").replace(",", " ")]
    model = (
        parse(
            '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>'
            f" g (uint8[1, 4, 1, 1] xq) => (uint8[1, 1] y) <int64[2] flat = {{1, 4}}, {', '.join(used)}{weights}>"
            f" {{ xr = Reshape (xq, flat) {body} }}"
        )
        if operator != "QLinearConv"
        else parse(f"g (uint8[1, 4, 1, 1] xq) => (uint8[1, 1, 1, 1] y) <{', '.join(used)}{weights}> {{ {body} }}")
    )
    assert len(overflowing_products(model)) == 1
    before = model.to_proto()
    feeds = {"xq": np.asarray([250, 255, 10, 0], np.uint8).reshape(1, 4, 1, 1)}
    changed = AvoidOverflow().run(model, NARROW)
    assert changed.counts == {"weights": 1}
    assert overflowing_products(model) == []
    # Both sides are exact here; the plain session of the changed model has to agree on every processor.
    (expected,) = run(before, feeds)
    (actual,) = run_session(session(model.to_proto().SerializeToString()), feeds)
    np.testing.assert_array_equal(actual, expected)


def test_a_signed_operand_that_is_computed_becomes_unsigned_where_it_is_made() -> None:
    text = (
        "g (float[1, 64, 8] a, float[1, 64, 8] b) => (float[1, 64, 64] y)"
        " <float s = {{0.5}}, uint8 z = {{128}}, {zero}>"
        " {{ aq = QuantizeLinear (a, s, z) ad = DequantizeLinear (aq, s, z)"
        " bq = QuantizeLinear (b, s, {n}) bt = Transpose <perm = [0, 2, 1]> (bq)"
        " bd = DequantizeLinear (bt, s, {n}) y = MatMul (ad, bd) }}"
    )
    check_pass(
        AvoidOverflow(),
        text.format(zero="int8 n = {0}", n="n"),
        text.format(zero="int8 n = {0}, uint8 zero_point = {128}", n="zero_point"),
        ctx=NARROW,
    )


LEVELS = st.sampled_from([-128, -127, -64, -1, 0, 1, 63, 64, 65, 100, 127])


@given(
    weights=st.lists(LEVELS, min_size=8, max_size=8),
    pixels=st.lists(st.sampled_from([0, 1, 100, 127, 128, 129, 200, 255]), min_size=36, max_size=36),
    top=st.sampled_from([64, 127, 128, 129, 130, 200, 255]),
    kind=st.sampled_from(["Conv", "Gemm", "MatMul"]),
)
@settings(max_examples=60, deadline=None)
def test_what_is_left_signed_is_exact_in_the_runtime_as_it_comes(
    weights: list[int], pixels: list[int], top: int, kind: str
) -> None:
    """On a processor without VNNI this fails with the pass, or with a rule that is too loose."""
    model = _network(kind, np.asarray(weights, np.int8), top)
    expected = run(model, feeds := {"x": np.asarray(pixels, np.uint8)})
    AvoidOverflow().run(model, Context(replace(X86, product_sums="narrow")))
    actual = run_session(session(model.to_proto().SerializeToString()), feeds)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-6)


def _network(kind: str, weights: npt.NDArray[np.int8], top: int) -> Model:
    """36 levels, cut off at ``top``, times ``weights``, on a grid fine enough to see every sum."""
    text = (
        "g (uint8[36] x) => (float[{out}] y) <uint8 bottom = {{0}}, uint8 top = {{{top}}}, float s = {{1}},"
        " uint8 z = {{0}},"
        " float t = {{1}}, int8 n = {{0}}, int64[{rank}] shape = {{{shape}}}, int8[{dims}] w = {{{weights}}}>"
        " {{ c = Clip (x, bottom, top) r = Reshape (c, shape) d = DequantizeLinear (r, s, z)"
        " wd = DequantizeLinear (w, t, n) y = {kind} (d, wd) }}"
    )
    shape, dims, out = ("1, 4, 3, 3", "2, 4, 1, 1", "1, 2, 3, 3") if kind == "Conv" else ("9, 4", "4, 2", "9, 2")
    return parse(
        text.format(
            top=top,
            rank=shape.count(",") + 1,
            shape=shape,
            dims=dims,
            out=out,
            weights=", ".join(str(int(level)) for level in weights),
            kind=kind,
        )
    )


@pytest.mark.skipif(not products_overflow(), reason="integer kernels are exact on this processor")
def test_the_runtime_does_overflow_here() -> None:
    model = parse(
        "g (uint8[1, 4] x) => (int32[1, 1] y) <int8[4, 1] w = {127, 127, 127, 127}> { y = MatMulInteger (x, w) }"
    )
    feeds = {"x": np.full((1, 4), 255, np.uint8)}
    content = model.to_proto().SerializeToString()
    assert run_session(session(content), feeds)[0].item() < 4 * 127 * 255
    assert run_session(reference_session(content), feeds)[0].item() == 4 * 127 * 255


def test_a_model_on_disk_is_read_with_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = parse(
        "g (uint8[1, 4] x) => (int32[1, 1] y) <int8[4, 1] w = {127, 127, 127, 127}> { y = MatMulInteger (x, w) }"
    )
    onnx.save(model.to_proto(), path, save_as_external_data=True, location="model.data", size_threshold=0)
    feeds = {"x": np.full((1, 4), 255, np.uint8)}
    assert run_session(reference_session(path), feeds)[0].item() == 4 * 127 * 255


def test_a_user_of_a_file_is_warned_where_it_overflows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    for name, weights in (("bad", "100, 100"), ("good", "64, 64")):
        paths.append(tmp_path / f"{name}.onnx")
        onnx.save(parse(conv(f"int8[1, 2, 1, 1] w = {{{weights}}}")).to_proto(), paths[-1])
    monkeypatch.setattr("qat2int8.pipelines.exact_products.products_overflow", lambda: True)
    told = overflow_warning(paths[0])
    assert told is not None
    assert told.startswith(f"{paths[0]}: 1 layer overflows on this processor")
    assert overflow_warning(paths[1]) is None
    monkeypatch.setattr("qat2int8.pipelines.exact_products.products_overflow", lambda: False)
    assert overflow_warning(paths[0]) is None
