"""GELU in its spellings, and what looks like one."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import apply, assert_same_numbers, check_pass, parse, run

from qat2int8.ir import Model, Provenance, QuantParams
from qat2int8.passes.fuse_gelu import FuseGelu

HEADER = '<ir_version: 9, opset_import: ["" : 20]>'
CONSTANTS = (
    "float r = {1.4142135}, float i = {0.70710677}, float one = {1}, float half = {0.5}, float two = {2},"
    " float three = {3}, float k = {0.7978846}, float c = {0.044715}, float[3] row = {1, 1, 1},"
    " float rough = {1.4140625}, float odd = {1.5}, float[1] uno = {1}, float[1, 1, 1] deep = {0.5}"
)
GATES = {
    "a = Div (x, r) e = Erf (a) g = Add (e, one)": "none",
    "a = Mul (i, x) e = Erf (a) g = Add (one, e)": "none",
    "a = Div (x, rough) e = Erf (a) g = Add (e, one)": "none",
    "s = Pow (x, three) t = Mul (s, c) u = Add (x, t) a = Mul (u, k) e = Tanh (a) g = Add (e, one)": "tanh",
    "s = Mul (x, x) t = Mul (s, x) v = Mul (c, t) u = Add (v, x) a = Mul (k, u) e = Tanh (a)"
    " g = Add (e, one)": "tanh",
    "s = Mul (x, x) t = Mul (c, s) u = Add (t, one) v = Mul (x, k) a = Mul (v, u) e = Tanh (a)"
    " g = Add (e, one)": "tanh",
}
PRODUCTS = [
    "h = Mul (x, g) [last] y = Mul (h, half)",
    "h = Mul (g, x) [last] y = Div (h, two)",
    "h = Mul (half, x) [last] y = Mul (h, g)",
    "h = Div (x, two) [last] y = Mul (g, h)",
    "h = Mul (g, half) [last] y = Mul (x, h)",
]


def gelu(body: str, *, shape: str = "N, 3", extra: str = "", header: str = HEADER) -> str:
    return f"{header} g (float[{shape}] x) => (float[{shape}] y{extra}) <{CONSTANTS}> {{ {body} }}"


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("gate", GATES)
def test_every_spelling_becomes_one_gelu(gate: str, product: str) -> None:
    approximate = "" if GATES[gate] == "none" else '<approximate = "tanh">'
    before = gelu(f"{gate} {product}")
    model, result = check_pass(FuseGelu(), before, gelu(f"[last] y = Gelu {approximate} (x)"))
    assert dict(result.counts) == {"fused": 1}
    x = np.linspace(-5, 5, 60, dtype=np.float32).reshape(20, 3)
    assert_same_numbers(parse(before).to_proto(), model, {"x": x}, atol=2e-4)


ERF = "a = Div (x, r) e = Erf (a) g = Add (e, one) h = Mul (x, g) y = Mul (h, half)"


@pytest.mark.parametrize(
    "body",
    [
        ERF.replace("(x, r)", "(x, odd)"),
        ERF.replace("(x, r)", "(r, x)"),
        ERF.replace("(e, one)", "(e, half)"),
        ERF.replace("(h, half)", "(h, two)"),
        ERF.replace("Mul (h, half)", "Div (half, h)"),
        ERF.replace("Mul (h, half)", "Div (two, h)"),
        ERF.replace("y = Mul (h, half)", "y = Add (h, half)"),
        ERF.replace("(x, g)", "(a, g)"),
        ERF.replace("(e, one)", "(e, row)"),
        ERF.replace("Erf", "Tanh"),
        ERF.replace("(h, half)", "(h, x)"),
        "s = Pow (x, two) t = Mul (s, c) u = Add (x, t) a = Mul (u, k) e = Tanh (a) g = Add (e, one)"
        " h = Mul (x, g) y = Mul (h, half)",
        "a = Div (x, r) e = Erf (a) h = Mul (x, e) y = Mul (h, half)",
    ],
)
def test_other_functions_stay(body: str) -> None:
    model = parse(gelu(body))
    assert not apply(FuseGelu(), model).modified


@pytest.mark.parametrize("tensor", ["a", "e", "g", "h"])
def test_a_tensor_that_others_read_stays(tensor: str) -> None:
    model = parse(gelu(f"{ERF} z = Abs ({tensor})", extra=", float[N, 3] z"))
    assert not apply(FuseGelu(), model).modified


@pytest.mark.parametrize("tensor", ["a", "e", "g", "h"])
def test_a_graph_output_in_the_middle_stays(tensor: str) -> None:
    model = parse(gelu(ERF, extra=f", float[N, 3] {tensor}"))
    assert not apply(FuseGelu(), model).modified


@pytest.mark.parametrize(("source", "fused"), [(Provenance.TRAINED, False), (Provenance.DERIVED, True)])
def test_a_trained_grid_in_the_middle_keeps_the_chain(source: Provenance, fused: bool) -> None:
    model = parse(gelu(ERF))
    model.scales.set(model.values()["e"], QuantParams.make(0.1, source=source))
    assert apply(FuseGelu(), model).modified is fused
    assert len(model.scales) == (0 if fused else 1)


def test_the_grids_of_both_ends_stay() -> None:
    model = parse(gelu(ERF))
    grids = {name: QuantParams.make(step, source=Provenance.TRAINED) for name, step in (("x", 0.1), ("y", 0.2))}
    for name, grid in grids.items():
        model.scales.set(model.values()[name], grid)
    apply(FuseGelu(), model)
    assert {value.name: grid for value, grid in model.scales.items()} == grids


@pytest.mark.parametrize(
    ("body", "fused"), [(ERF.replace("one", "uno"), True), (ERF.replace("half", "deep"), False)]
)
def test_only_a_constant_that_leaves_the_rank_as_it_is_takes_part(body: str, fused: bool) -> None:
    shape = "2, 3" if fused else "1, 2, 3"
    text = f"{HEADER} g (float[2, 3] x) => (float[{shape}] y) <{CONSTANTS}> {{ {body} }}"
    model = parse(text)
    assert not apply(FuseGelu(), model).modified
    proto = onnx.shape_inference.infer_shapes(model.to_proto())
    assert apply(FuseGelu(), Model.from_proto(proto)).modified is fused


def test_an_opset_without_gelu_is_left_alone() -> None:
    model = parse(gelu(ERF, header='<ir_version: 9, opset_import: ["" : 19]>'))
    assert not apply(FuseGelu(), model).modified


def test_two_in_a_row() -> None:
    second = re.sub(r"\b([aeghxy])\b", lambda name: {"x": "y", "y": "w"}.get(name[1], name[1] * 2), ERF)
    text = f"{HEADER} g (float[N, 3] x) => (float[N, 3] w) <{CONSTANTS}> {{ {ERF} {second} }}"
    model = Model.from_proto(onnx.shape_inference.infer_shapes(parse(text).to_proto()))
    assert apply(FuseGelu(), model).counts["fused"] == 2
    assert [node.op_type for node in model.graph] == ["Gelu", "Gelu"]


@given(st.sampled_from(sorted(GATES)), st.sampled_from(PRODUCTS), st.floats(0.3, 3.0), st.integers(0, 2))
def test_a_constant_that_is_off_never_changes_the_numbers(
    gate: str, product: str, factor: float, which: int
) -> None:
    name, value = (("half", 0.5), ("i", 0.70710677), ("k", 0.7978846))[which]
    text = gelu(f"{gate} {product}").replace(f"float {name} = {{{value}}}", f"float {name} = {{{value * factor}}}")
    model = parse(text)
    x = np.linspace(-4, 4, 30, dtype=np.float32).reshape(10, 3)
    before = run(model, {"x": x})[0]
    apply(FuseGelu(), model)
    np.testing.assert_allclose(run(model, {"x": x})[0], before, atol=1e-3)


def test_a_model_in_double_is_left_alone() -> None:
    text = gelu(ERF).replace("float", "double")
    assert not apply(FuseGelu(), parse(text)).modified
