import numpy as np
import pytest
from support import apply, assert_same_numbers, check_pass, graph_text, parse

from qat2int8.ir import Code, QuantParams
from qat2int8.passes.fuse_conv_bias import FuseConvBias

FEED = {"x": np.random.default_rng(5).normal(size=(2, 1, 4, 4)).astype(np.float32)}
PLANE = ", ".join(map(str, range(32)))
CONSTANTS = (
    "float[2, 1, 1, 1] w = {3, 4}, float[1, 2, 1, 1] v = {3, 4}, float[2] b = {1, 2},"
    f" float[1, 2, 1, 1] k = {{5, 6}}, float one = {{7}}, float[1] uno = {{7}},"
    f" float[2, 4, 4] plane = {{{PLANE}}}, float[4] row = {{1, 2, 3, 4}}"
)


def model_of(body: str, outputs: str = "") -> str:
    return f"g (float[2, 1, 4, 4] x) => (float[2, 2, 4, 4] y{outputs}) <{CONSTANTS}> {{ {body} }}"


@pytest.mark.parametrize("shape", ["1, 2, 1, 1", "2, 1, 1"])
@pytest.mark.parametrize("order", ["c, k", "k, c"])
def test_an_added_constant_becomes_the_bias(shape: str, order: str) -> None:
    constants = f"float[2, 1, 1, 1] w = {{3, 4}}, float[{shape}] k = {{5, 6}}"
    _, result = check_pass(
        FuseConvBias(),
        f"""
        g (float[N, 1, 4, 4] x) => (float[N, 2, 4, 4] y) <{constants}>
          {{ [conv] c = Conv (x, w) [add] y = Add ({order}) }}
        """,
        f"""
        g (float[N, 1, 4, 4] x) => (float[N, 2, 4, 4] y) <{constants}, float[2] "conv.bias" = {{5, 6}}>
          {{ [conv] y = Conv (x, w, "conv.bias") }}
        """,
    )
    assert dict(result.counts) == {"fused": 1}
    assert result.diagnostics == ()


@pytest.mark.parametrize(
    "body",
    [
        "c = Conv (x, w) y = Add (c, k)",
        "c = Conv (x, w, b) y = Add (c, k)",
        "c = Conv (x, w, b) y = Add (one, c)",
        "c = Conv (x, w) y = Add (c, uno)",
        "c = ConvTranspose (x, v, b) y = Add (c, k)",
        "c = Conv (x, w, b) d = Add (c, k) y = Add (d, one)",
    ],
)
def test_numbers_stay(body: str) -> None:
    model = parse(model_of(body))
    before = model.to_proto()
    assert apply(FuseConvBias(), model).modified
    assert len(model.graph) == 1
    assert_same_numbers(before, model, FEED)


def test_a_shared_bias_is_copied_and_the_weight_with_its_grid_is_not_touched() -> None:
    model = parse(model_of("[p] c = Conv (x, w, b) d = Conv (x, w, b) e = Add (c, k) y = Mul (d, e)"))
    before, weight = model.to_proto(), model.values()["w"]
    grid = QuantParams.make([1.0, 2.0], axis=0)
    model.scales.set(weight, grid)
    apply(FuseConvBias(), model)
    first, second = list(model.graph)[:2]
    assert [v.name for v in first.inputs] == ["x", "w", "p.bias"]
    assert [v.name for v in second.inputs] == ["x", "w", "b"]
    assert dict(model.scales.items()) == {weight: grid}
    assert_same_numbers(before, model, FEED)


def test_the_sum_keeps_its_grid() -> None:
    model = parse(model_of("c = Conv (x, w) y = Add (c, k)"))
    kept = QuantParams.make(0.5)
    model.scales.set(model.values()["y"], kept)
    model.scales.set(model.values()["c"], QuantParams.make(0.25))
    result = apply(FuseConvBias(), model)
    assert [(v.name, g) for v, g in model.scales.items()] == [("y", kept)]
    assert [(d.code, d.value) for d in result.diagnostics] == [(Code.FAKE_QUANT_DROPPED, "c")]


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("c = Conv (x, w) y = Add (c, plane)", ""),
        ("c = Conv (x, w) y = Add (c, row)", ""),
        ("c = Conv (x, w) y = Add (c, x)", ""),
        ("c = Conv (x, w) y = Add (c, c)", ""),
        ("c = Conv (x, w) d = Add (c, k) y = Add (c, d)", ""),
        ("c = Conv (x, w) y = Add (c, k)", ", float[2, 2, 4, 4] c"),
        ("c = Conv (x, w) y = Mul (c, k)", ""),
        ("c = Conv (x, w) y = Sub (c, k)", ""),
        ("n = Neg (w) c = Conv (x, n) y = Add (c, k)", ""),
        ("n = Neg (b) c = Conv (x, w, n) y = Add (c, k)", ""),
        ("c = Conv (x, w) r = Relu (c) y = Add (r, k)", ""),
    ],
)
def test_near_misses(body: str, outputs: str) -> None:
    model = parse(model_of(body, outputs))
    before = graph_text(model)
    result = apply(FuseConvBias(), model)
    assert not result.modified
    assert result.diagnostics == ()
    assert graph_text(model) == before
