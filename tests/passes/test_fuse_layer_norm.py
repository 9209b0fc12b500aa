"""LayerNormalization in its spellings, and what looks like one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import apply, assert_same_numbers, check_pass, parse, run

from qat2int8.ir import Provenance, QuantParams
from qat2int8.passes.fuse_layer_norm import FuseLayerNorm

CONSTANTS = (
    "float two = {2}, float three = {3}, float eps = {0.01}, float[1] tiny = {0.00001}, float half = {0.5},"
    " float less = {-0.5}, float one = {1}, float none = {0}, float[4] gamma = {1, 2, 3, 4},"
    " float[4] beta = {5, 6, 7, 8}, float[1, 1, 4] deep = {1, 2, 3, 4}, float[3, 1] column = {1, 2, 3},"
    " float[3, 4] block = {1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 7, 6}"
)
NORM = (
    "m = ReduceMean <axes = [-1]> (x) d = Sub (x, m) q = Pow (d, two) v = ReduceMean <axes = [-1]> (q)"
    " e = Add (v, eps) s = Sqrt (e) n = Div (d, s) g = Mul (n, gamma) [last] y = Add (g, beta)"
)
FUSED = "[last] y = LayerNormalization <axis = -1, epsilon = 0.01> (x, gamma, beta)"


def norm(body: str, *, extra: str = "", more: str = "", header: str = "", shape: str = "N, 3, 4") -> str:
    return f"{header} g (float[{shape}] x) => (float[{shape}] y{extra}) <{CONSTANTS}{more}> {{ {body} }}"


SPELLINGS = {
    "as torch": NORM,
    "square by Mul": NORM.replace("Pow (d, two)", "Mul (d, d)"),
    "operands turned": NORM.replace("(n, gamma)", "(gamma, n)").replace("(g, beta)", "(beta, g)"),
    "epsilon first": NORM.replace("(v, eps)", "(eps, v)"),
    "positive axes": NORM.replace("[-1]", "[2]"),
    "root by Pow": NORM.replace("Sqrt (e)", "Pow (e, half)"),
    "reciprocal root": NORM.replace("Sqrt (e)", "Pow (e, less)").replace("Div (d, s)", "Mul (d, s)"),
    "reciprocal": NORM.replace("n = Div (d, s)", "r = Reciprocal (s) n = Mul (d, r)"),
    "one over": NORM.replace("n = Div (d, s)", "r = Div (one, s) n = Mul (r, d)"),
    "centred twice": NORM.replace("n = Div (d, s)", "c = Sub (x, m) n = Div (c, s)"),
    "all twice": NORM.replace("n = Div (d, s)", "o = ReduceMean <axes = [2]> (x) c = Sub (x, o) n = Div (c, s)"),
}
X = np.random.default_rng(3).normal(2, 3, (2, 3, 4)).astype(np.float32)


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_one_layer_normalization(name: str) -> None:
    model, result = check_pass(FuseLayerNorm(), norm(SPELLINGS[name]), norm(FUSED))
    assert dict(result.counts) == {"fused": 1}
    assert_same_numbers(parse(norm(SPELLINGS[name])).to_proto(), model, {"x": X})


def test_axes_as_an_input() -> None:
    header, axes = '<ir_version: 8, opset_import: ["" : 18]>', ", int64[1] axes = {-1}"
    body = NORM.replace("<axes = [-1]> (x)", "(x, axes)").replace("<axes = [-1]> (q)", "(q, axes)")
    check_pass(FuseLayerNorm(), norm(body, more=axes, header=header), norm(FUSED, more=axes, header=header))


TAIL = "g = Mul (n, gamma) [last] y = Add (g, beta)"
OTHERS = {
    "two axes": (
        NORM.replace("[-1]", "[1, 2]").replace("gamma", "block").replace("(g, beta)", "(g, block)"),
        (-2, "block", "block"),
        [],
    ),
    "leading ones": (NORM.replace("gamma", "deep"), (-1, "deep.flat", "beta"), []),
    "no beta": (NORM.replace(TAIL, "[last] y = Mul (gamma, n)"), (-1, "gamma"), []),
    "no gamma": (NORM.replace(TAIL, "[last] y = Add (beta, n)"), (-1, "last.ones", "beta"), []),
    "parameters of a smaller shape": (NORM.replace("[-1]", "[1, 2]"), (-2, ".ones"), ["Mul", "Add"]),
    "other parameters": (NORM.replace("gamma", "half").replace("beta", "column"), (-1, ".ones"), ["Mul", "Add"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_parameters_join_where_they_have_the_shape_of_the_row(name: str) -> None:
    body, (axis, *parameters), rest = OTHERS[name]
    model = parse(norm(body))
    before = model.to_proto()
    assert apply(FuseLayerNorm(), model).counts["fused"] == 1
    assert [node.op_type for node in model.graph] == ["LayerNormalization", *rest]
    assert model.graph[0].attributes.get_int("axis") == axis
    inputs = [value.name or "" for value in model.graph[0].inputs if value is not None]
    assert len(inputs) == 1 + len(parameters)
    assert all(found.endswith(str(wanted)) for found, wanted in zip(inputs[1:], parameters, strict=True))
    assert_same_numbers(before, model, {"x": X})


@pytest.mark.parametrize(
    "body",
    [
        NORM.replace("[-1]", "[1]"),
        NORM.replace("[-1]", "[0, 2]"),
        NORM.replace("<axes = [-1]> (q)", "<axes = [1]> (q)"),
        NORM.replace("<axes = [-1]> (x)", "<axes = [1, 2]> (x)"),
        NORM.replace("<axes = [-1]> (x)", "(x)"),
        NORM.replace("Pow (d, two)", "Pow (d, three)"),
        NORM.replace("Pow (d, two)", "Mul (d, x)"),
        NORM.replace("Pow (d, two)", "Mul (x, x)"),
        NORM.replace("Sub (x, m)", "Sub (m, x)"),
        NORM.replace("Sub (x, m)", "Add (x, m)"),
        NORM.replace("(v, eps)", "(v, none)"),
        NORM.replace("(v, eps)", "(v, column)"),
        NORM.replace("Add (v, eps)", "Max (v, eps)"),
        NORM.replace("Div (d, s)", "Div (s, d)"),
        NORM.replace("Div (d, s)", "Mul (d, s)"),
        NORM.replace("Div (d, s)", "Div (x, s)"),
        NORM.replace("Sqrt (e)", "Pow (e, less)"),
        NORM.replace("n = Div (d, s)", "c = Sub (m, x) n = Div (c, s)"),
        NORM.replace("n = Div (d, s)", "o = ReduceMean <axes = [1]> (x) c = Sub (x, o) n = Div (c, s)"),
        NORM.replace("n = Div (d, s)", "r = Div (two, s) n = Mul (r, d)"),
    ],
)
def test_other_functions_stay(body: str) -> None:
    model = parse(norm(body))
    assert not apply(FuseLayerNorm(), model).modified


def test_statistics_without_the_axis_stay() -> None:
    body = NORM.replace("<axes = [-1]> (x)", "<axes = [-1], keepdims = 0> (x) m1 = Unsqueeze (m, last_axis)")
    body = body.replace("Sub (x, m)", "Sub (x, m1)")
    assert not apply(FuseLayerNorm(), parse(norm(body, more=", int64[1] last_axis = {2}"))).modified


@pytest.mark.parametrize("tensor", ["m", "d", "q", "v", "e", "s", "n", "g"])
def test_a_tensor_that_is_needed_elsewhere_stays(tensor: str) -> None:
    shape = "N, 3, 1" if tensor in "mves" else "N, 3, 4"
    for name, more in ((tensor, ""), ("z", f" z = Abs ({tensor})")):
        model = parse(norm(NORM + more, extra=f", float[{shape}] {name}"))
        before = model.to_proto()
        # What comes before gamma is a whole normalization already.
        assert apply(FuseLayerNorm(), model).modified is (tensor in "ng")
        assert_same_numbers(before, model, {"x": X})


@pytest.mark.parametrize("tensor", ["m", "d", "q", "v", "e", "s", "n", "g"])
def test_no_trained_grid_is_lost(tensor: str) -> None:
    model = parse(norm(NORM))
    grid = QuantParams.make(0.1, source=Provenance.TRAINED)
    model.scales.set(model.values()[tensor], grid)
    assert apply(FuseLayerNorm(), model).modified is (tensor in "ng")
    assert model.scales[model.values()[tensor]] == grid


def test_an_unknown_row_and_an_old_opset_are_left_alone() -> None:
    assert not apply(FuseLayerNorm(), parse(norm(NORM, shape="N, 3, M"))).modified
    old = norm(NORM, header='<ir_version: 8, opset_import: ["" : 16]>')
    assert not apply(FuseLayerNorm(), parse(old)).modified


@given(
    st.sampled_from(sorted(SPELLINGS)),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(1, 4),
    st.sampled_from(["gamma beta", "gamma", "beta", ""]),
    st.integers(0, 99),
)
def test_numbers_stay_for_all_shapes(name: str, dims: list[int], count: int, present: str, seed: int) -> None:
    rng, rank = np.random.default_rng(seed), len(dims)
    axes = list(range(rank - min(count, rank), rank))
    row = [dims[axis] for axis in axes]
    shape = ", ".join(str(dim) for dim in row)
    body = SPELLINGS[name].replace("[-1]", str(axes)).replace("[2]", str(axes))
    for parameter, other, op in (("gamma", "n", "Mul"), ("beta", "g", "Add")):
        if parameter not in present:
            for operands in (f"{parameter}, {other}", f"{other}, {parameter}"):
                body = body.replace(f"{op} ({operands})", f"Identity ({other})")
    numbers = [", ".join(f"{number:.3f}" for number in rng.normal(size=int(np.prod(row)))) for _ in range(2)]
    text = norm(body, shape=", ".join(str(dim) for dim in dims))
    for parameter, values in zip(("gamma", "beta"), numbers, strict=True):
        start = text.index(f"float[4] {parameter} = ")
        end = text.index("}", start) + 1
        text = text[:start] + f"float[{shape}] {parameter} = {{{values}}}" + text[end:]
    model = parse(text)
    x = rng.normal(1, 2, dims).astype(np.float32)
    expected = run(model, {"x": x})[0]
    assert apply(FuseLayerNorm(), model).counts["fused"] == 1
    np.testing.assert_allclose(run(model, {"x": x})[0], expected, rtol=1e-3, atol=1e-4)
