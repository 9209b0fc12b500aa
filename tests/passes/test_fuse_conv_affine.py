import numpy as np
import pytest
from support import apply, assert_same_numbers, check_pass, parse

from qat2int8.ir import INT8, Code, QuantParams, Severity
from qat2int8.passes.fuse_conv_affine import FuseConvAffine

FEED = {"x": np.random.default_rng(3).normal(size=(2, 1, 4, 4)).astype(np.float32)}
WEIGHTS = "float[2, 1, 1, 1] w = {-128, 4}, float[2] b = {1, 2}, float[1, 2, 1, 1] k = {-2, 4}"


def chain(body: str, extra: str = "") -> str:
    return f"g (float[N, 1, 4, 4] x) => (float[N, 2, 4, 4] y) <{WEIGHTS}{extra}> {{ {body} }}"


def test_a_chain_becomes_one_layer() -> None:
    check_pass(
        FuseConvAffine(),
        chain("[conv] c = Conv (x, w, b) [m] d = Mul (c, k) [a] e = Add (d, k) [s] y = Sub (k, e)"),
        """
        g (float[N, 1, 4, 4] x) => (float[N, 2, 4, 4] y)
          <float[2, 1, 1, 1] w = {-256, -16}, float[2] b = {2, -8}, float[1, 2, 1, 1] k = {-2, 4}>
          { [conv] y = Conv (x, w, b) }
        """,
    )


@pytest.mark.parametrize(
    "op", ["Mul (c, k)", "Mul (k, c)", "Add (c, k)", "Add (k, c)", "Sub (c, k)", "Sub (k, c)", "Div (c, k)"]
)
def test_every_op_and_order_keeps_the_numbers(op: str) -> None:
    model = parse(chain(f"[conv] c = Conv (x, w, b) [e] y = {op}"))
    before = model.to_proto()
    assert apply(FuseConvAffine(), model).counts["folded"] == 1
    assert [n.op_type for n in model.graph] == ["Conv"]
    assert_same_numbers(before, model, FEED)


def test_a_normalization_that_undoes_the_division_leaves_the_integers_alone() -> None:
    stats = (
        ", float[2] gamma = {-2, 4}, float[2] beta = {5, 6}, float[2] mean = {0, 1}, float[2] var = {0.75, 0.75}"
    )
    model = parse(
        chain(
            "[conv] c = Conv (x, w) [div] d = Div (c, k)"
            "[bn] y = BatchNormalization <epsilon = 0.25> (d, gamma, beta, mean, var)",
            stats,
        )
    )
    before = model.to_proto()
    grid = QuantParams.make([1.0, 0.5], 0, INT8, axis=0)
    model.scales.set(model.values()["w"], grid)
    result = apply(FuseConvAffine(), model)
    assert dict(result.counts) == {"folded": 2}
    assert result.diagnostics == ()
    after = model.scales[model.values()["w"]]
    np.testing.assert_array_equal(after.scale, grid.scale)
    np.testing.assert_array_equal(model.constant(model.values()["w"]).reshape(-1), [-128, 4])
    moments = model.moments[model.graph.outputs[0]]
    np.testing.assert_array_equal(moments.mean, [5, 6])
    assert_same_numbers(before, model, FEED)
