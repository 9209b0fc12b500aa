import numpy as np
import onnx_ir as oir
import pytest
from support import TARGET, apply, assert_same_numbers, check_pass, graph_text, parse

from qat2int8.ir import INT8, ChannelMoments, Code, Model, QuantParams, Severity
from qat2int8.passes import Context
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


@pytest.mark.parametrize("constant", ["2, 1, 1", "1, 2, 1, 1"])
def test_a_trained_grid_follows(constant: str) -> None:
    model = parse(chain("[conv] c = Conv (x, w, b) [m] y = Mul (c, f)", f", float[{constant}] f = {{0.5, -2}}"))
    model.scales.set(model.values()["w"], QuantParams.make(2.0))
    result = apply(FuseConvAffine(), model)
    grid = model.scales[model.values()["w"]]
    assert (grid.axis, grid.scale.tolist()) == (0, [1.0, 4.0])
    assert array(model, "w") == [-64, -8]
    assert result.diagnostics == ()


def test_one_factor_for_all_channels_keeps_one_step() -> None:
    model = parse(chain("[conv] c = Conv (x, w, b) [m] y = Div (c, f)", ", float f = {-2}"))
    model.scales.set(model.values()["w"], QuantParams.make(4.0))
    assert apply(FuseConvAffine(), model).diagnostics == ()
    grid = model.scales[model.values()["w"]]
    assert (grid.axis, float(grid.scale)) == (None, 2.0)
    assert array(model, "w") == [64, -2]


def test_a_sum_leaves_the_weight_and_its_grid_alone_even_when_they_are_shared() -> None:
    model = parse(
        chain(
            "[conv] c = Conv (x, w) [a] d = Add (c, k) [other] e = Conv (x, w) [n] f = Neg (e) [s] y = Sum (d, f)"
        )
    )
    before, grid = model.to_proto(), QuantParams.make(1.0)
    model.scales.set(model.values()["w"], grid)
    assert apply(FuseConvAffine(), model).counts["folded"] == 1
    conv = next(iter(model.graph))
    assert conv.inputs[1] is model.values()["w"]
    assert dict(model.scales.items()) == {conv.inputs[1]: grid}
    assert_same_numbers(before, model, FEED)


def test_statistics_and_the_final_grid_follow() -> None:
    model = parse(chain("[conv] c = Conv (x, w) [m] d = Mul (c, k) [a] y = Add (d, k)"))
    values = model.values()
    final = QuantParams.make(0.5)
    model.scales.set(values["y"], final)
    model.scales.set(values["c"], QuantParams.make(0.25))
    model.scales.set(values["d"], QuantParams.make(0.125))
    mean, std = np.array([1, 2], np.float32), np.array([3, 4], np.float32)
    model.moments[values["c"]] = ChannelMoments(mean, std, 1, "BatchNormalization 'bn'")
    result = apply(FuseConvAffine(), model)
    output = model.graph.outputs[0]
    assert model.scales[output] is final
    assert [(d.code, d.value) for d in result.diagnostics] == [
        (Code.FAKE_QUANT_DROPPED, "c"),
        (Code.FAKE_QUANT_DROPPED, "d"),
    ]
    assert model.moments[output].mean.tolist() == [-4, 12]
    assert model.moments[output].std.tolist() == [6, 16]
    assert list(model.moments) == [output]


def test_a_gemm_takes_columns_in() -> None:
    text = """
    g (float[N, 2] x) => (float[N, 2] y)
      <float[2, 2] w = {1, 2, 3, 4}, float[2] b = {1, 2}, float[2] k = {3, -4}>
      { [fc] c = Gemm <beta = 0.5> (x, w, b) [m] d = Mul (c, k) [s] y = Sub (d, b) }
    """
    model = parse(text)
    before = model.to_proto()
    assert apply(FuseConvAffine(), model).counts["folded"] == 2
    assert [n.op_type for n in model.graph] == ["Gemm"]
    assert_same_numbers(before, model, {"x": np.array([[1, 2], [3, 4]], np.float32)})


@pytest.mark.parametrize(
    "tail",
    [
        "y = Div (k, c)",
        "y = Div (c, z)",
        "y = Mul (c, plane)",
        "y = Mul (c, row)",
        "y = Mul (c, batch)",
        "y = Mul (c, x)",
        "y = Mul (c, c)",
        "y = Pow (c, k)",
        "d = Mul (c, k) y = Mul (d, c)",
        "d = Neg (k) y = Mul (c, d)",
        "r = Relu (c) y = Mul (r, k)",
        "y = BatchNormalization (c, s, s, s, s)",
    ],
)
def test_near_misses(tail: str) -> None:
    extra = (
        ", float[1, 2, 1, 1] z = {0, 1}, float[2, 4, 4] plane, float[4] row = {1, 2, 3, 4},"
        " float[2, 2, 1, 1] batch = {1, 2, 3, 4}, float[2] s = {1, 2}"
    ).replace("plane", "plane = {" + ", ".join(map(str, range(32))) + "}")
    model = parse(chain(f"[conv] c = Conv (x, w) {tail}", extra).replace("float[N, 1", "float[2, 1"))
    before = graph_text(model)
    result = apply(FuseConvAffine(), model)
    assert not result.modified
    assert result.diagnostics == ()
    assert graph_text(model) == before


def test_a_constant_that_adds_a_dimension_stays() -> None:
    model = parse(
        f"g (float[2, 1, 4, 4] x) => (float[1, 2, 2, 4, 4] y) <{WEIGHTS}, float[1, 1, 1, 1, 1] one = {{3}}>"
        "{ [conv] c = Conv (x, w) y = Mul (c, one) }"
    )
    assert not apply(FuseConvAffine(), model).modified


def test_a_constant_that_multiplies_the_channels_stays() -> None:
    model = parse(
        "g (float[2, 1, 4, 4] x) => (float[2, 3, 4, 4] y)"
        "<float[1, 1, 1, 1] w = {3}, float[1, 3, 1, 1] three = {1, 2, 3}>"
        "{ [conv] c = Conv (x, w) y = Mul (c, three) }"
    )
    assert not apply(FuseConvAffine(), model).modified


def test_a_row_as_long_as_there_are_channels_stays() -> None:
    model = parse(
        "g (float[N, 1, 2, 2] x) => (float[N, 2, 2, 2] y) <float[2, 1, 1, 1] w = {3, 4}, float[2] row = {1, 2}>"
        "{ [conv] c = Conv (x, w) y = Mul (c, row) }"
    )
    assert not apply(FuseConvAffine(), model).modified


def test_a_normalization_of_another_length_ends_the_chain() -> None:
    stats = ", float[2] s = {1, 2}"
    model = parse(chain("[conv] c = Conv (x, w) d = Mul (c, k) y = BatchNormalization (d, s, s, s, s)", stats))
    model.values()["s"].const_value = oir.tensor(np.ones(3, np.float32), name="s")
    assert FuseConvAffine().run(model, Context(TARGET)).counts["folded"] == 1


def test_a_tensor_read_inside_a_subgraph_stays() -> None:
    text = chain(
        "[conv] c = Conv (x, w) y = If (flag) <then_branch = t () => (float[N, 2, 4, 4] p) { p = Mul (c, k) },"
        " else_branch = e () => (float[N, 2, 4, 4] q) { q = Conv (x, w) }>"
    )
    model = parse(text.replace("4, 4] x)", "4, 4] x, bool flag)"))
    assert not apply(FuseConvAffine(), model).modified


def test_a_vanishing_tensor_that_is_an_output_stays() -> None:
    text = chain("[conv] c = Conv (x, w) y = Mul (c, k)").replace(" y) <", " y, float[N, 2, 4, 4] c) <")
    assert not apply(FuseConvAffine(), parse(text)).modified


def test_the_chain_ends_where_a_tensor_is_an_output() -> None:
    text = chain("[conv] c = Conv (x, w) d = Mul (c, k) y = Mul (d, k)").replace(
        " y) <", " y, float[N, 2, 4, 4] d) <"
    )
    model = parse(text)
    assert apply(FuseConvAffine(), model).counts["folded"] == 1
    assert [n.op_type for n in model.graph] == ["Conv", "Mul"]


def test_a_grid_that_cannot_follow_is_a_reason_not_to_fold() -> None:
    model = parse(
        "g (float[N, 2, 4, 4] x) => (float[N, 2, 4, 4] y)"
        "<float[2, 2, 1, 1] w = {1, 2, 3, 4}, float[2, 1, 1] k = {1, 2}>"
        "{ [conv] c = Conv (x, w) [m] y = Mul (c, k) }"
    )
    model.scales.set(model.values()["w"], QuantParams.make([1.0, 2.0], axis=1))
    result = apply(FuseConvAffine(), model)
    (note,) = result.diagnostics
    assert (note.code, note.severity, note.node) == (Code.NOT_FUSED, Severity.NOTE, "conv")
    assert note.reason.startswith("Mul 'm' behind it not folded")
    assert not result.modified


def array(model: Model, name: str) -> list[float]:
    constant = model.constant(model.values()[name])
    assert constant is not None
    flat: list[float] = constant.reshape(-1).tolist()
    return flat
