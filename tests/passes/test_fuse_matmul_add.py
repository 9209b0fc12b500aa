import numpy as np
import pytest
from support import apply, assert_same_numbers, check_pass, graph_text, parse

from qat2int8.ir import ChannelMoments, Code, Model, QuantParams, Severity
from qat2int8.passes.fuse_matmul_add import FuseMatmulAdd

RNG = np.random.default_rng(11)
CONSTANTS = (
    "float[2, 3] w = {1, 2, 3, 4, 5, 6}, float[3, 2] v = {1, 2, 3, 4, 5, 6}, float[3] b = {7, 8, 9},"
    " float[1, 3] row = {7, 8, 9}, float[1, 1, 3] deep = {7, 8, 9}, float one = {5}, float[1] uno = {5},"
    " float[2, 1] column = {1, 2}, float[2, 3] table = {1, 2, 3, 4, 5, 6}"
)


def matmul(x: str, y: str, body: str, extra: str = "") -> Model:
    return parse(f"g (float[{x}] x{extra}) => (float[{y}] y) <{CONSTANTS}> {{ {body} }}")


def ops(model: Model) -> list[str]:
    return [node.op_type for node in model.graph]


def constant(model: Model, node: int, index: int) -> list[float]:
    array = model.constant(list(model.graph)[node].inputs[index])
    assert array is not None
    values: list[float] = array.tolist()
    return values


def test_two_dimensions_become_a_gemm() -> None:
    text = f"g (float[N, 2] x) => (float[N, 3] y) <{CONSTANTS}>"
    _, result = check_pass(
        FuseMatmulAdd(),
        f"{text} {{ [mm] c = MatMul (x, w) [add] y = Add (c, b) }}",
        f"{text} {{ [mm] y = Gemm (x, w, b) }}",
    )
    assert dict(result.counts) == {"fused": 1, "flattened": 0}
    assert result.diagnostics == ()


@pytest.mark.parametrize(
    "layer", ["MatMul (x, w)", "Gemm (x, w)", "Gemm <beta = 0.5> (x, w)", "Gemm <transB = 1> (x, v)"]
)
@pytest.mark.parametrize("add", ["Add (c, b)", "Add (b, c)", "Add (c, row)", "Add (one, c)", "Add (c, uno)"])
def test_every_row_becomes_the_bias(layer: str, add: str) -> None:
    model = matmul("4, 2", "4, 3", f"c = {layer} y = {add}")
    before = model.to_proto()
    assert apply(FuseMatmulAdd(), model).counts["fused"] == 1
    assert ops(model) == ["Gemm"]
    assert constant(model, 0, 2) == ([5.0] * 3 if "o" in add[4:] and "row" not in add else [7.0, 8.0, 9.0])
    assert_same_numbers(before, model, {"x": RNG.normal(size=(4, 2)).astype(np.float32)})


def test_a_shared_bias_and_a_shared_matrix_stay_what_they_are() -> None:
    model = matmul(
        "4, 2", "4, 3", "c = MatMul (x, w) d = Add (c, b) e = MatMul (x, w) f = Mul (e, b) y = Add (d, f)"
    )
    before, weight = model.to_proto(), model.values()["w"]
    grid = QuantParams.make([1.0, 2.0, 3.0], axis=1)
    model.scales.set(weight, grid)
    apply(FuseMatmulAdd(), model)
    assert ops(model) == ["Gemm", "MatMul", "Mul", "Add"]
    assert next(iter(model.graph)).inputs[1] is weight
    assert dict(model.scales.items()) == {weight: grid}
    assert_same_numbers(before, model, {"x": RNG.normal(size=(4, 2)).astype(np.float32)})


@pytest.mark.parametrize(
    ("x", "y", "feed"),
    [
        ("N, 5, 2", "N, 5, 3", (4, 5, 2)),
        ("4, S, 2", "4, S, 3", (4, 6, 2)),
        ("4, 5, 2", "4, 5, 3", (4, 5, 2)),
        ("N, 2, 5, 2", "N, 2, 5, 3", (3, 2, 5, 2)),
        ("1, 1, 2", "1, 1, 3", (1, 1, 2)),
        ("N, 5, 2", "N, 5, 3", (0, 5, 2)),
    ],
)
@pytest.mark.parametrize("add", ["Add (c, b)", "Add (deep, c)", "Add (c, one)"])
def test_more_dimensions_are_flattened_and_restored(x: str, y: str, feed: tuple[int, ...], add: str) -> None:
    model = matmul(x, y, f"[mm] c = MatMul (x, w) [add] y = {add}")
    before = model.to_proto()
    assert dict(apply(FuseMatmulAdd(), model).counts) == {"fused": 0, "flattened": 1}
    assert ops(model) == ["Reshape", "Gemm", "Reshape"]
    assert_same_numbers(before, model, {"x": RNG.normal(size=feed).astype(np.float32)})


def test_the_flattened_form() -> None:
    signature = "g (float[N, 5, 2] x) => (float[N, 5, 3] y)"
    initializers = "float[2, 3] w = {1, 2, 3, 4, 5, 6}, float[3] b = {7, 8, 9}"
    check_pass(
        FuseMatmulAdd(),
        f"{signature} <{initializers}> {{ [mm] c = MatMul (x, w) [add] y = Add (c, b) }}",
        f"""
        {signature} <{initializers}, int64[2] "mm.flat_shape" = {{-1, 2}}, int64[3] "mm.shape" = {{-1, 5, 3}}> {{
          ["mm.flatten"] "mm.flatten_out" = Reshape (x, "mm.flat_shape")
          [mm] mm_out = Gemm ("mm.flatten_out", w, b)
          ["mm.restore"] y = Reshape (mm_out, "mm.shape")
        }}
        """,
    )


def test_grids_reach_the_flattened_tensors() -> None:
    """The Gemm's own input and output lie on the grids of the tensors they are views of."""
    model = matmul("N, 5, 2", "N, 5, 3", "c = MatMul (x, w) y = Add (c, b)")
    values = model.values()
    grids = {name: QuantParams.make(step) for name, step in (("x", 0.5), ("c", 0.25), ("y", 0.125))}
    for name, grid in grids.items():
        model.scales.set(values[name], grid)
    result = apply(FuseMatmulAdd(), model)
    _, gemm, restore = model.graph
    assert model.scales[gemm.inputs[0]] is grids["x"]
    assert model.scales[gemm.outputs[0]] is grids["y"]
    assert model.scales[restore.outputs[0]] is grids["y"]
    assert model.scales[model.graph.inputs[0]] is grids["x"]
    assert len(model.scales) == 4
    assert [(d.code, d.severity, d.value) for d in result.diagnostics] == [
        (Code.FAKE_QUANT_DROPPED, Severity.NOTE, "c")
    ]


def test_a_grid_per_channel_does_not_survive_a_change_of_shape() -> None:
    model = matmul("4, 5, 2", "4, 5, 3", "c = MatMul (x, w) y = Add (c, b)")
    model.scales.set(model.values()["x"], QuantParams.make([1.0, 2.0], axis=2))
    apply(FuseMatmulAdd(), model)
    assert [v.name for v in model.scales] == ["x"]


def test_the_sum_keeps_its_grid_and_the_product_loses_it() -> None:
    model = matmul("4, 2", "4, 3", "c = MatMul (x, w) y = Add (c, b)")
    kept = QuantParams.make(0.5)
    model.scales.set(model.values()["y"], kept)
    model.scales.set(model.values()["c"], QuantParams.make(0.25))
    result = apply(FuseMatmulAdd(), model)
    assert [(v.name, g) for v, g in model.scales.items()] == [("y", kept)]
    assert [(d.code, d.value) for d in result.diagnostics] == [(Code.FAKE_QUANT_DROPPED, "c")]


@pytest.mark.parametrize(
    ("x", "y", "body", "reason"),
    [
        ("N, S, 2", "N, S, 3", "c = MatMul (x, w) [add] y = Add (c, b)", "more than one dimension"),
        ("2, 2", "2, 3", "c = MatMul (x, w) [add] y = Add (c, table)", "[2, 3] is not one number per column"),
        ("2, 2", "2, 3", "c = MatMul (x, w) [add] y = Add (c, column)", "[2, 1] is not one number per column"),
        ("2, 2", "1, 2, 3", "c = MatMul (x, w) [add] y = Add (c, deep)", "[1, 1, 3] is not one number per column"),
        ("4, 0, 2", "4, 0, 3", "c = MatMul (x, w) [add] y = Add (c, b)", "its input is empty"),
        ("2", "3", "c = MatMul (x, w) [add] y = Add (c, b)", "not one number per column"),
        ("4, 2", "4, 3", "c = Gemm <alpha = 0.5> (x, w) [add] y = Add (c, b)", "alpha = 1"),
    ],
)
def test_shapes_that_do_not_allow_it_are_named(x: str, y: str, body: str, reason: str) -> None:
    model = matmul(x, y, "[mm] " + body)
    model.scales.set(model.values()["c"], QuantParams.make(1.0))
    before = graph_text(model)
    result = apply(FuseMatmulAdd(), model)
    (note,) = result.diagnostics
    assert (note.code, note.severity, note.node) == (Code.NOT_FUSED, Severity.NOTE, "mm")
    assert reason in note.reason
    assert "'add'" in note.reason
    assert not result.modified
    assert graph_text(model) == before
    assert len(model.scales) == 1


def test_an_unknown_rank_is_named() -> None:
    model = matmul("4, 2", "4, 3", "n = Neg (x) [mm] c = MatMul (n, w) y = Add (c, b)")
    (note,) = apply(FuseMatmulAdd(), model).diagnostics
    assert "rank of its input is not known" in note.reason


@pytest.mark.parametrize(
    "body",
    [
        "y = MatMul (x, w)",
        "c = MatMul (x, w) d = Neg (b) y = Add (c, d)",
        "c = MatMul (x, w) y = Add (c, c)",
        "c = MatMul (x, w) y = Sub (c, b)",
        "c = MatMul (x, w) d = Add (c, b) y = Mul (c, d)",
        "c = MatMul (x, m) y = Add (c, b)",
        "c = Gemm (x, w, b) y = Add (c, b)",
        "c = MatMul (x, w) r = Relu (c) y = Add (r, b)",
    ],
)
def test_near_misses(body: str) -> None:
    model = matmul("4, 2", "4, 3", body, ", float[2, 3] m")
    before = graph_text(model)
    result = apply(FuseMatmulAdd(), model)
    assert not result.modified
    assert result.diagnostics == ()
    assert graph_text(model) == before


def test_a_constant_that_stands_between_the_two_is_copied() -> None:
    model = matmul("4, 2", "4, 3", "c = MatMul (x, w) k = Constant <value = float[3] {1, 2, 3}> () y = Add (c, k)")
    assert apply(FuseMatmulAdd(), model).counts["fused"] == 1
    assert constant(model, 0, 2) == [1, 2, 3]


def test_statistics_of_the_product_are_not_those_of_the_sum() -> None:
    model = matmul("4, 2", "4, 3", "c = MatMul (x, w) y = Add (c, b)")
    model.moments[model.values()["c"]] = ChannelMoments(np.zeros(3, np.float32), np.ones(3, np.float32), 1, "bn")
    apply(FuseMatmulAdd(), model)
    assert model.moments == {}


def test_a_product_that_is_an_output_stays() -> None:
    model = parse(
        f"g (float[4, 2] x) => (float[4, 3] y, float[4, 3] c) <{CONSTANTS}> {{ c = MatMul (x, w) y = Add (c, b) }}"
    )
    assert not apply(FuseMatmulAdd(), model).modified


def test_integers_stay() -> None:
    model = parse(
        "g (int32[4, 2] x) => (int32[4, 1] y) <int32[2, 1] w = {1, 2}, int32[1] b = {3}>"
        "{ c = MatMul (x, w) y = Add (c, b) }"
    )
    assert not apply(FuseMatmulAdd(), model).modified
