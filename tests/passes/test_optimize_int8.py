import numpy as np
import onnx
import pytest
from arrays import model_of
from hypothesis import given, settings
from hypothesis import strategies as st
from support import apply, check_pass, named, parse, run

from qat2int8.ir import Model
from qat2int8.passes import Context, PassResult
from qat2int8.passes.optimize_int8 import OptimizeInt8
from qat2int8.pipelines.target_files import load_target

CONTEXT = Context(load_target("ort-x86"))
SHAPE = (1, 2, 4, 4)
X = np.linspace(-3.0, 3.0, 32, dtype=np.float32).reshape(SHAPE)

PARAMETERS = "float s = {0.05}, uint8 z = {128}, float s2 = {0.02}, uint8 z2 = {100}, float k = {2.0}"


def tidy(
    body: str, *, outputs: str = "float[1,2,4,4] y", more: str = "", opset: int = 17
) -> tuple[Model, PassResult]:
    """The pass over a graph of one input; checks that the numbers stay the same, bit by bit."""
    model = graph(body, outputs=outputs, more=more, opset=opset)
    before = run(model, {"x": X})
    result = apply(OptimizeInt8(), model, CONTEXT)
    for expected, actual in zip(before, run(model, {"x": X}), strict=True):
        np.testing.assert_array_equal(actual, expected)
    return model, result


def graph(body: str, *, outputs: str = "float[1,2,4,4] y", more: str = "", opset: int = 17) -> Model:
    constants = PARAMETERS + (f", {more}" if more else "")
    header = f'<ir_version: 8, opset_import: ["" : {opset}]>'
    return parse(f"{header} g (float[1,2,4,4] x) => ({outputs}) <{constants}> {{ {body} }}")


def ops(model: Model) -> list[str]:
    return [node.op_type for node in model.graph]


Q, DQ = "QuantizeLinear", "DequantizeLinear"
AGAIN = "r = QuantizeLinear (d, s, z) e = DequantizeLinear (r, s, z)"
ENTER = "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z)"


# Pairs


def test_equal_scales() -> None:
    model, result = tidy(f"{ENTER} r = QuantizeLinear (d, s, z) e = DequantizeLinear (r, s, z) y = Neg (e)")
    assert ops(model) == [Q, DQ, "Neg"]
    assert result.counts["dequantize-quantize pairs squashed"] == 1


def test_a_step_of_one_element_is_the_same_as_a_scalar() -> None:
    model, _ = tidy(
        f"{ENTER} r = QuantizeLinear (d, t, v) e = DequantizeLinear (r, t, v) y = Neg (e)",
        more="float[1] t = {0.05}, uint8[1] v = {128}",
    )
    assert ops(model) == [Q, DQ, "Neg"]


def test_equal_scales_whose_integers_are_a_graph_output_keep_its_name_and_type() -> None:
    model, _ = tidy(f"{ENTER} y = QuantizeLinear (d, s, z)", outputs="uint8[1,2,4,4] y")
    assert ops(model) == [Q]
    assert named(model.graph.outputs) == ["y"]


def test_integers_of_a_graph_input_cannot_be_a_graph_output() -> None:
    model = parse(
        "g (uint8[4] x) => (uint8[4] y) <float s = {0.5}, uint8 z = {0}>"
        "{ d = DequantizeLinear (x, s, z) y = QuantizeLinear (d, s, z) }"
    )
    assert not apply(OptimizeInt8(), model, CONTEXT).modified


def test_a_dequantize_that_others_read_stays_for_them() -> None:
    model, _ = tidy(f"{ENTER} {AGAIN} n = Neg (d) y = Add (n, e)")
    assert ops(model) == [Q, DQ, "Neg", "Add"]


def test_branch_to_equal_unequal_and_fp32() -> None:
    model, _ = tidy(
        f"""{ENTER}
        r = QuantizeLinear (d, s, z) e = DequantizeLinear (r, s, z) a = Neg (e)
        t = QuantizeLinear (d, s2, z2) f = DequantizeLinear (t, s2, z2) b = Abs (f)
        c = Sign (d)
        p = Add (a, b) y = Add (p, c)"""
    )
    assert ops(model).count(Q) == 2
    negation = next(node for node in model.graph if node.op_type == "Neg")
    sign = next(node for node in model.graph if node.op_type == "Sign")
    assert negation.inputs[0] is sign.inputs[0]


def test_quantize_with_same_scale() -> None:
    model, result = tidy(
        """q = QuantizeLinear (x, s, z) r = QuantizeLinear (x, s, z)
        d = DequantizeLinear (q, s, z) e = DequantizeLinear (r, s, z) n = Neg (d) y = Add (n, e)"""
    )
    assert ops(model) == [Q, DQ, "Neg", "Add"]
    assert result.counts["duplicates merged"] == 2


@pytest.mark.parametrize("other", ["s2, z", "s, z2", "s, i"])
def test_quantize_with_different_scale(other: str) -> None:
    _, result = tidy(
        f"""q = QuantizeLinear (x, s, z) r = QuantizeLinear (x, {other})
        d = DequantizeLinear (q, s, z) e = DequantizeLinear (r, {other}) n = Neg (d) y = Add (n, e)""",
        more="int8 i = {0}",
    )
    assert not result.modified


def test_more_than_one_conv_out_outputs() -> None:
    _, result = tidy(
        """c = Neg (x) q = QuantizeLinear (c, s, z) r = QuantizeLinear (c, s2, z2)
        d = DequantizeLinear (q, s, z) e = DequantizeLinear (r, s2, z2) y = Add (d, e)"""
    )
    assert not result.modified


def test_per_channel_pairs_vanish_and_per_channel_steps_do_not_move() -> None:
    more = "float[2] t = {0.05, 0.1}, uint8[2] v = {128, 100}"
    model, _ = tidy(
        """q = QuantizeLinear <axis = 1> (x, t, v) d = DequantizeLinear <axis = 1> (q, t, v)
        r = QuantizeLinear <axis = 1> (d, t, v) e = DequantizeLinear <axis = 1> (r, t, v)
        m = Transpose <perm = [0,2,3,1]> (e) y = Neg (m)""",
        outputs="float[1,4,4,2] y",
        more=more,
    )
    assert ops(model) == [Q, DQ, "Transpose", "Neg"]


def test_the_axis_is_part_of_a_step() -> None:
    model = parse(
        """g (float[2,2] x) => (float[2,2] y) <float[2] t = {0.05, 0.1}, uint8[2] v = {128, 100}> {
          q = QuantizeLinear <axis = 0> (x, t, v) d = DequantizeLinear <axis = 0> (q, t, v)
          r = QuantizeLinear <axis = 1> (d, t, v) y = DequantizeLinear <axis = 1> (r, t, v) }"""
    )
    assert not apply(OptimizeInt8(), model, CONTEXT).modified


# Requantizations


def close(model: Model, bound: float) -> PassResult:
    before = run(model, {"x": X})[0]
    result = apply(OptimizeInt8(), model, CONTEXT)
    assert np.abs(run(model, {"x": X})[0].astype(float) - before.astype(float)).max() <= bound * 1.0001
    return result


UNEQUAL = "c = Neg (x) q = QuantizeLinear (c, s, z) d = DequantizeLinear (q, s, z)"


def test_unequal_scales() -> None:
    model = graph(f"{UNEQUAL} r = QuantizeLinear (d, s2, z2) y = DequantizeLinear (r, s2, z2)")
    result = close(model, 0.05)
    assert ops(model) == ["Neg", Q, DQ]
    assert named([value for value in model.graph[1].inputs if value is not None]) == ["c", "s2", "z2"]
    assert result.counts["requantizations squashed"] == 1


def test_a_first_grid_that_saturates_earlier_leaves_its_clip() -> None:
    more = "float w = {0.04}, uint8 m = {128}, float n = {0.01}"
    model = graph(
        "q = QuantizeLinear (x, n, m) d = DequantizeLinear (q, n, m) "
        "r = QuantizeLinear (d, w, m) y = DequantizeLinear (r, w, m)",
        more=more,
    )
    close(model, 0.04)
    assert ops(model) == [Q, "Clip", DQ]
    outputs = run(model, {"x": X})[0]
    assert outputs.min() == pytest.approx(-1.28)
    assert outputs.max() == pytest.approx(1.28)


def test_a_clip_takes_over_the_name_of_a_graph_output() -> None:
    model = graph(
        "q = QuantizeLinear (x, n, z) d = DequantizeLinear (q, n, z) y = QuantizeLinear (d, s, z)",
        more="float n = {0.01}",
        outputs="uint8[1,2,4,4] y",
    )
    close(model, 1)
    assert ops(model) == [Q, "Clip"]


def test_before_opset_12_there_is_no_integer_clip() -> None:
    model = graph(
        "q = QuantizeLinear (x, n, z) d = DequantizeLinear (q, n, z) y = QuantizeLinear (d, s, z)",
        more="float n = {0.01}",
        outputs="uint8[1,2,4,4] y",
        opset=11,
    )
    assert not apply(OptimizeInt8(), model, CONTEXT).modified


def test_a_chain_of_grids_ends_in_the_last_one() -> None:
    model = graph(
        "q = QuantizeLinear (x, n, z) d = DequantizeLinear (q, n, z) "
        "r = QuantizeLinear (d, s, z) e = DequantizeLinear (r, s, z) "
        "t = QuantizeLinear (e, s2, z2) y = DequantizeLinear (t, s2, z2)",
        more="float n = {0.01}",
    )
    close(model, 0.05)
    assert ops(model).count(Q) == 1
    assert run(model, {"x": X})[0].max() <= 1.28 + 0.05


def test_signed_to_unsigned_of_equal_step_is_exact() -> None:
    model, _ = tidy(
        "q = QuantizeLinear (x, s, i) d = DequantizeLinear (q, s, i) "
        "r = QuantizeLinear (d, s, z) y = DequantizeLinear (r, s, z)",
        more="int8 i = {0}",
    )
    assert ops(model) == [Q, DQ]


def test_a_factor_between_two_quantizers_survives() -> None:
    """The Dequantize between them takes the factor, and then the first Quantize no longer matches it."""
    model = graph(
        "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) m = Mul (d, k) c = Relu (m) "
        "r = QuantizeLinear (c, t, v) y = DequantizeLinear (r, t, v)",
        more="float t = {0.04}, uint8 v = {0}",
    )
    close(model, 0.1)
    assert ops(model).count(Q) == 1
    assert run(model, {"x": X})[0].max() == pytest.approx(6.0, abs=0.1)


@pytest.mark.parametrize("read", ["s, z2", "s2, z2"])
def test_integers_read_on_another_zero_point_are_another_tensor(read: str) -> None:
    model, _ = tidy(
        f"q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, {read}) "
        "r = QuantizeLinear (d, t, z) y = DequantizeLinear (r, t, z)",
        more="float t = {0.07}",
    )
    assert ops(model).count(Q) == 2


def test_integers_that_somebody_else_reads_keep_their_grid() -> None:
    model, _ = tidy(
        f"{UNEQUAL} r = QuantizeLinear (d, s2, z2) e = DequantizeLinear (r, s2, z2) f = DequantizeLinear (q, s, z)"
        " n = Neg (f) y = Div (n, e)"
    )
    assert ops(model).count(Q) == 2


def test_requantize_with_matmul_fc_conv() -> None:
    body = f"{UNEQUAL} r = QuantizeLinear (d, t, z) e = DequantizeLinear (r, t, z)"
    body += " n = Neg (d) o = Add (e, e) y = Sub (o, n)"
    model = graph(body, more="float t = {0.051}")
    result = close(model, 0.06)
    assert result.counts["requantizations skipped"] == 1
    assert ops(model) == ["Neg", Q, DQ, "Neg", "Add", "Sub"]
    narrower = graph(body, more="float t = {0.02}")
    assert not close(narrower, 0.0).modified


def test_a_bias_ties_its_conv_to_the_second_grid() -> None:
    def conv(bias: str) -> Model:
        return model_of(
            f"""g (float[1,2,4,4] x, uint8 z, float s, float t, float[2,2,1,1] w, float[2] b)
              => (float[1,2,4,4] y) {{
              q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) n = Neg (d)
              r = QuantizeLinear (d, t, z) e = DequantizeLinear (r, t, z) c = Conv (e, w{bias})
              y = Add (c, n) }}""",
            {"z": 128, "s": 0.05, "t": 0.051, "w": np.ones((2, 2, 1, 1)), "b": [1, 2]},
        )

    assert not apply(OptimizeInt8(), conv(", b"), CONTEXT).modified
    assert apply(OptimizeInt8(), conv(""), CONTEXT).counts["requantizations skipped"] == 1


def test_an_op_that_has_no_integer_kernel_does_not_skip_a_requantization() -> None:
    body = f"{UNEQUAL} r = QuantizeLinear (d, t, z) e = DequantizeLinear (r, t, z) n = Neg (d) y = Sub (e, n)"
    assert not close(graph(body, more="float t = {0.051}"), 0.0).modified


# Data movement


@pytest.mark.parametrize(
    ("move", "shape"),
    [
        ("Transpose <perm = [0,2,3,1]> (c)", "1,4,4,2"),
        ("Flatten (c)", "1,32"),
        ("Reshape (c, f)", "2,16"),
    ],
)
def test_quantize_moves_up_through_what_keeps_all_elements(move: str, shape: str) -> None:
    model, _ = tidy(
        f"c = Neg (x) m = {move} q = QuantizeLinear (m, s, z) d = DequantizeLinear (q, s, z) y = Neg (d)",
        outputs=f"float[{shape}] y",
        more="int64[2] f = {2, 16}",
    )
    assert ops(model) == ["Neg", Q, move.split()[0], DQ, "Neg"]


def test_quantize_moves_up_to_a_graph_input() -> None:
    model, _ = tidy(
        "m = Flatten (x) q = QuantizeLinear (m, s, z) d = DequantizeLinear (q, s, z) y = Neg (d)",
        outputs="float[1,32] y",
    )
    assert ops(model) == [Q, "Flatten", DQ, "Neg"]


def test_quantize_moves_up_although_the_source_has_float_readers() -> None:
    model, _ = tidy(
        "c = Neg (x) m = Flatten (c) q = QuantizeLinear (m, s, z) d = DequantizeLinear (q, s, z) y = Neg (d)"
        " v = Abs (c)",
        outputs="float[1,32] y, float[1,2,4,4] v",
    )
    assert ops(model)[:3] == ["Neg", Q, "Flatten"]


@pytest.mark.parametrize(
    "body",
    [
        "m = Flatten (x) q = QuantizeLinear (m, s, z) d = DequantizeLinear (q, s, z) e = Neg (d) y = Add (e, m)",
        "m = MaxPool <kernel_shape = [1,1]> (x) q = QuantizeLinear (m, s, z) d = DequantizeLinear (q, s, z)"
        " y = Neg (d)",
        "m = Flatten (x) q = QuantizeLinear (m, s, i) d = DequantizeLinear (q, s, i) y = Neg (d)",
    ],
)
def test_quantize_stays_where_others_read_or_a_selection_drops_or_integers_are_wide(body: str) -> None:
    shape = "1,2,4,4" if "MaxPool" in body else "1,32"
    model = graph(body, outputs=f"float[{shape}] y", more="int16 i = {0}", opset=21)
    assert ops(model)[0] != Q
    apply(OptimizeInt8(), model, CONTEXT)
    assert ops(model)[0] != Q


def test_quantize_does_not_move_to_a_tensor_quantized_otherwise() -> None:
    _, result = tidy(
        """c = Neg (x) m = Flatten (c) q = QuantizeLinear (m, s, z) d = DequantizeLinear (q, s, z) y = Neg (d)
        r = QuantizeLinear (c, s2, z2) e = DequantizeLinear (r, s2, z2) v = Neg (e)""",
        outputs="float[1,32] y, float[1,2,4,4] v",
    )
    assert not result.modified


@pytest.mark.parametrize(
    ("move", "shape"),
    [
        ("MaxPool <kernel_shape = [2,2], strides = [2,2]> (d)", "1,2,2,2"),
        ("Slice (d, i0, i1, i2)", "1,2,2,4"),
        ("Gather <axis = 2> (d, i1)", "1,2,1,4"),
        ("Pad (d, pads)", "1,2,5,4"),
        ('Pad <mode = "reflect"> (d, pads)', "1,2,5,4"),
        ('Resize <mode = "nearest"> (d, , scales)', "1,2,8,8"),
    ],
)
def test_pools_slices_pads_and_nearest_resizes_work_on_integers(move: str, shape: str) -> None:
    model, _ = tidy(
        f"{ENTER} m = {move} r = QuantizeLinear (m, s, z) e = DequantizeLinear (r, s, z) y = Neg (e)",
        outputs=f"float[{shape}] y",
        more="int64[1] i0 = {1}, int64[1] i1 = {3}, int64[1] i2 = {2}, int64[8] pads = {0,0,1,0,0,0,0,0},"
        "float[4] scales = {1,1,2,2}",
    )
    assert ops(model) == [Q, move.split()[0], DQ, "Neg"]


@pytest.mark.parametrize("others", ["", "v = Abs (d)"])
def test_a_pool_between_two_grids_takes_the_second(others: str) -> None:
    model, _ = tidy(
        f"{ENTER} t = QuantizeLinear (d, s, z) u = DequantizeLinear (t, s, z) {others}"
        "m = MaxPool <kernel_shape = [2,2], strides = [2,2]> (d)"
        "r = QuantizeLinear (m, s2, z2) e = DequantizeLinear (r, s2, z2) y = Neg (e) w = Neg (u)",
        outputs="float[1,2,2,2] y, float[1,2,4,4] w" + (", float[1,2,4,4] v" if others else ""),
    )
    pool = next(node for node in model.graph if node.op_type == "MaxPool")
    quantize = pool.inputs[0].producer() if pool.inputs[0] is not None else None
    assert quantize is not None
    assert quantize.op_type == Q
    assert [value.name for value in quantize.inputs[1:] if value is not None] == ["s2", "z2"]


def test_a_slice_between_two_grids_stays() -> None:
    model, _ = tidy(
        f"{ENTER} v = Abs (d) m = Slice (d, i0, i1, i0)"
        "r = QuantizeLinear (m, s2, z2) e = DequantizeLinear (r, s2, z2) y = Neg (e)",
        outputs="float[1,1,4,4] y, float[1,2,4,4] v",
        more="int64[1] i0 = {1}, int64[1] i1 = {2}",
    )
    assert next(node for node in model.graph if node.op_type == "Slice").inputs[0].producer().op_type == DQ  # type: ignore[union-attr]


def test_pad_on_integers_pads_with_the_zero_point() -> None:
    model, _ = tidy(
        f"{ENTER} m = Pad (d, pads) y = Neg (m)",
        outputs="float[1,2,5,4] y",
        more="int64[8] pads = {0,0,1,0,0,0,0,0}",
    )
    assert ops(model) == [Q, "Pad", DQ, "Neg"]
    filler = model.constant(model.graph[1].inputs[2])
    assert filler is not None
    assert (filler.dtype, filler.item()) == (np.uint8, 128)


@pytest.mark.parametrize(
    ("move", "shape"),
    [
        ("Pad (d, pads, k)", "1,2,5,4"),
        ('Resize <mode = "linear"> (d, , scales)', "1,2,8,8"),
        ("AveragePool <kernel_shape = [2,2], strides = [2,2]> (d)", "1,2,2,2"),
    ],
)
def test_what_makes_new_numbers_is_not_data_movement(move: str, shape: str) -> None:
    _, result = tidy(
        f"{ENTER} y = {move}",
        outputs=f"float[{shape}] y",
        more="int64[8] pads = {0,0,1,0,0,0,0,0}, float[4] scales = {1,1,2,2}",
    )
    assert not result.modified


def test_a_max_pool_does_not_take_16_bits() -> None:
    _, result = tidy(
        "q = QuantizeLinear (x, s, i) d = DequantizeLinear (q, s, i) y = MaxPool <kernel_shape = [2,2]> (d)",
        outputs="float[1,2,3,3] y",
        more="int16 i = {0}",
        opset=21,
    )
    assert not result.modified


def test_a_max_pool_whose_indices_are_read_stays() -> None:
    model = graph(
        f"{ENTER} y, v = MaxPool <kernel_shape = [2,2]> (d)", outputs="float[1,2,3,3] y, int64[1,2,3,3] v"
    )
    assert not apply(OptimizeInt8(), model, CONTEXT).modified


def test_a_max_pool_with_indices_nobody_reads_moves() -> None:
    model, _ = tidy(f"{ENTER} y, v = MaxPool <kernel_shape = [2,2]> (d)", outputs="float[1,2,3,3] y")
    assert ops(model) == [Q, "MaxPool", DQ]


def test_dequantize_moves_down_and_the_graph_output_keeps_its_name() -> None:
    model, _ = tidy(f"{ENTER} m = Flatten (d) y = Transpose <perm = [1,0]> (m)", outputs="float[32,1] y")
    assert ops(model) == [Q, "Flatten", "Transpose", DQ]


def test_split_on_integers_dequantizes_what_is_read() -> None:
    model, _ = tidy(
        f"{ENTER} a, b = Split <axis = 1> (d) y = Neg (b)", outputs="float[1,1,4,4] y, float[1,1,4,4] a"
    )
    assert ops(model) == [Q, "Split", DQ, DQ, "Neg"]
    model, _ = tidy(f"{ENTER} a, b = Split <axis = 1> (d) y = Neg (b)", outputs="float[1,1,4,4] y")
    assert ops(model) == [Q, "Split", DQ, "Neg"]


def test_a_constant_is_left_to_constant_folding() -> None:
    model = parse(
        "g (float[2,2] x) => (float[2,2] y) <uint8[2,2] w = {1,2,3,4}, float s = {0.5}, uint8 z = {0}>"
        "{ d = DequantizeLinear (w, s, z) t = Transpose (d) y = MatMul (x, t) }"
    )
    assert not apply(OptimizeInt8(), model, CONTEXT).modified


def test_nothing_moves_into_a_subgraph() -> None:
    model = parse(
        """g (float[1,2,4,4] x, bool k) => (float[1,32] y) <float s = {0.05}, uint8 z = {128}, float f = {2.0}> {
          q = QuantizeLinear (x, s, z)
          d = DequantizeLinear (q, s, z)
          y = If (k) <
            then_branch = a () => (float[1,32] p) { p = Flatten (d) },
            else_branch = b () => (float[1,32] r) { e = DequantizeLinear (q, s, z) t = Mul (e, f) r = Flatten (t) }
          >
        }"""
    )
    assert not apply(OptimizeInt8(), model, CONTEXT).modified


def test_an_integer_graph_input_moves_as_integers() -> None:
    model = parse(
        "g (uint8[2,3] x) => (uint8[3,2] y) <float s = {0.5}, uint8 z = {7}>"
        "{ d = DequantizeLinear (x, s, z) t = Transpose (d) y = QuantizeLinear (t, s, z) }"
    )
    feeds = {"x": np.arange(6, dtype=np.uint8).reshape(2, 3)}
    before = run(model, feeds)[0]
    apply(OptimizeInt8(), model, CONTEXT)
    assert ops(model)[-1] == "Transpose"
    assert Q in ops(model) or len(ops(model)) == 1
    np.testing.assert_array_equal(run(model, feeds)[0], before)


# Concat


CONCAT = """
c = Neg (x) q = QuantizeLinear (c, s, z) d = DequantizeLinear (q, s, z)
f = Abs (x) r = QuantizeLinear (f, {0}) e = DequantizeLinear (r, {0})
m = Concat <axis = 1> (d, e{1}) t = QuantizeLinear (m, s, z) {2}
"""


def test_concat_of_equal_grids_works_on_integers() -> None:
    model, result = tidy(
        CONCAT.format("s, z", "", "o = DequantizeLinear (t, s, z) y = Neg (o)"), outputs="float[1,4,4,4] y"
    )
    assert ops(model) == ["Neg", Q, "Abs", Q, "Concat", DQ, "Neg"]
    assert result.counts["concats on integers"] == 1


def test_the_same_tensor_twice_into_concat() -> None:
    model, _ = tidy(CONCAT.format("s, z", ", d", "y = DequantizeLinear (t, s, z)"), outputs="float[1,6,4,4] y")
    assert ops(model) == ["Neg", Q, "Abs", Q, "Concat", DQ]


def test_a_concat_whose_integers_are_a_graph_output() -> None:
    model, _ = tidy(CONCAT.format("s, z", "", "y = Identity (t)"), outputs="uint8[1,4,4,4] y, uint8[1,4,4,4] t")
    assert "Concat" in ops(model)
    assert named(model.graph.outputs) == ["y", "t"]
    assert ops(model).count(Q) == 2


@pytest.mark.parametrize("other", ["s2, z", "s, z2", "s, i"])
def test_concat_of_mixed_grids_or_signs_keeps_its_quantizers(other: str) -> None:
    _, result = tidy(
        CONCAT.format(other, "", "y = DequantizeLinear (t, s, z)"), outputs="float[1,4,4,4] y", more="int8 i = {0}"
    )
    assert not result.modified


def test_concat_with_a_float_branch_stays() -> None:
    _, result = tidy(CONCAT.format("s, z", ", x", "y = DequantizeLinear (t, s, z)"), outputs="float[1,6,4,4] y")
    assert not result.modified


# Activations


@pytest.mark.parametrize(
    ("activation", "parameters", "absorbed"),
    [
        ("Relu (c)", "s, zero", True),
        ("Relu (c)", "s, z", False),
        ("Relu (c)", "s, low", True),
        ("Clip (c, none, six)", "sixth, zero", True),
        ("Clip (c, none, six)", "s, zero", False),
        ("Clip (c, below)", "s, zero", True),
        ("Clip (c, above)", "s, zero", False),
        ("Clip (c, , six)", "sixth, zero", True),
        ("Clip (c, none, inf)", "s, zero", True),
        ("LeakyRelu (c)", "s, zero", False),
        ("Max (none, c)", "s, zero", True),
        ("Max (c, above)", "s, zero", False),
    ],
)
def test_an_activation_vanishes_where_its_quantizer_saturates(
    activation: str, parameters: str, absorbed: bool
) -> None:
    model, _ = tidy(
        f"c = Neg (x) a = {activation} q = QuantizeLinear (a, {parameters})y = DequantizeLinear (q, {parameters})",
        more="uint8 zero = {0}, int8 low = {-128}, float none = {0.0}, float six = {2.0}, float sixth = {0.0078},"
        "float below = {-1.0}, float above = {1.0}, float inf = {3.4e38}",
    )
    assert (len(ops(model)) == 3) == absorbed


def test_an_activation_that_others_read_stays() -> None:
    _, result = tidy(
        "a = Relu (x) q = QuantizeLinear (a, s, zero) d = DequantizeLinear (q, s, zero) y = Add (a, d)",
        more="uint8 zero = {0}",
    )
    assert not result.modified


@pytest.mark.parametrize(("high", "absorbed"), [(127, True), (130, False)])
def test_an_integer_clip_narrows_the_levels_a_quantizer_saturates_at(high: int, absorbed: bool) -> None:
    model, _ = tidy(
        """a = Clip (x, lo, hi) q = QuantizeLinear (a, t, zero) c = Clip (q, zero, top)
        y = DequantizeLinear (c, t, zero)""",
        more=f"uint8 zero = {{0}}, uint8 top = {{{high}}},"
        "float t = {0.01}, float lo = {0.0}, float hi = {1.27}",
    )
    assert (ops(model) == [Q, "Clip", DQ]) == absorbed


def test_an_integer_clip_narrows_from_below_too() -> None:
    model, _ = tidy(
        """a = Clip (x, lo) q = QuantizeLinear (a, t, zero) c = Clip (q, bottom)
        y = DequantizeLinear (c, t, zero)""",
        more="uint8 zero = {0}, uint8 bottom = {10}, float t = {0.02}, float lo = {0.2}",
    )
    assert ops(model) == [Q, "Clip", DQ]


def test_an_integer_clip_that_starts_above_the_lowest_level_is_read_as_it_is() -> None:
    model, _ = tidy(
        """a = Clip (x, lo, hi) q = QuantizeLinear (a, t, i) c = Clip (q, bottom, top)
        y = DequantizeLinear (c, t, i)""",
        more="int8 i = {0}, int8 bottom = {-128}, int8 top = {63}, float t = {0.02},"
        " float lo = {-1.28}, float hi = {1.26}",
    )
    assert ops(model) == ["Clip", Q, "Clip", DQ]


# Factors


@pytest.mark.parametrize("product", ["Mul (c, k)", "Mul (k, c)"])
def test_scale_with_no_bias_quantize(product: str) -> None:
    model, result = tidy(f"c = Neg (x) m = {product} q = QuantizeLinear (m, s, z) y = DequantizeLinear (q, s, z)")
    assert ops(model) == ["Neg", Q, DQ]
    assert model.constant(model.graph[1].inputs[1]) == np.float32(0.05) / np.float32(2)
    assert result.counts["scalings absorbed"] == 1


def test_dequantize_scale_with_no_bias() -> None:
    model, _ = tidy(f"{ENTER} m = Mul (d, k) y = Neg (m)")
    assert ops(model) == [Q, DQ, "Neg"]
    assert model.constant(model.graph[1].inputs[1]) == np.float32(0.05) * np.float32(2)


def test_a_factor_before_a_graph_output_keeps_its_name() -> None:
    model, _ = tidy(f"{ENTER} y = Mul (d, k)")
    assert ops(model) == [Q, DQ]


def test_a_rescaled_step_leaves_the_others_that_share_its_initializer() -> None:
    model, _ = tidy(
        f"{ENTER} m = Mul (d, k) n = Neg (m) t = QuantizeLinear (n, s, z) y = DequantizeLinear (t, s, z)"
    )
    assert model.constant(model.graph[-1].inputs[1]) == np.float32(0.05)


@pytest.mark.parametrize("factor", ["-2.0", "0.0", "1e-44"])
def test_only_a_positive_factor_that_leaves_a_step_is_absorbed(factor: str) -> None:
    model = graph(f"{ENTER} y = Mul (d, f)", more=f"float f = {{{factor}}}")
    result = apply(OptimizeInt8(), model, CONTEXT)
    assert not result.modified


def test_a_factor_that_lets_the_step_overflow_stays() -> None:
    model = graph(f"{ENTER} y = Mul (d, f)", more="float f = {3e38}").to_proto()
    wide = next(tensor for tensor in model.graph.initializer if tensor.name == "s")
    wide.CopyFrom(onnx.numpy_helper.from_array(np.float32(10.0), "s"))
    assert not apply(OptimizeInt8(), Model.from_proto(model), CONTEXT).modified


def test_dequantize_scale_with_bias() -> None:
    _, result = tidy(f"{ENTER} m = Mul (d, v) y = Neg (m)", more="float[4] v = {2,2,2,2}")
    assert not result.modified


def test_a_factor_that_adds_an_axis_stays() -> None:
    model = graph(f"{ENTER} y = Mul (d, f)", more="float[1,1,1,1,1] f = {2.0}", outputs="float[1,1,2,4,4] y")
    assert not apply(OptimizeInt8(), model, CONTEXT).modified


def test_a_factor_that_others_read_stays() -> None:
    _, result = tidy("m = Mul (x, k) q = QuantizeLinear (m, s, z) d = DequantizeLinear (q, s, z) y = Add (d, m)")
    assert not result.modified


# What is left alone


@pytest.mark.parametrize(
    ("read", "body"),
    [
        ("m", "c = Neg (x) m = Transpose (c) q = QuantizeLinear (m, s, z) y = DequantizeLinear (q, s, z)"),
        ("m", "m = Relu (x) q = QuantizeLinear (m, s, v) y = DequantizeLinear (q, s, v)"),
        ("m", "m = Mul (x, k) q = QuantizeLinear (m, s, z) y = DequantizeLinear (q, s, z)"),
        ("d", f"{ENTER} y = Mul (d, k)"),
        ("d", f"{ENTER} r = QuantizeLinear (d, s2, z2) y = DequantizeLinear (r, s2, z2)"),
        ("e", f"{UNEQUAL} r = QuantizeLinear (d, t, z) e = DequantizeLinear (r, t, z) n = Neg (d) y = Add (e, e)"),
    ],
)
def test_what_is_a_graph_output_too_is_not_touched(read: str, body: str) -> None:
    shape = "float[4,4,2,1]" if "Transpose" in body else "float[1,2,4,4]"
    _, result = tidy(body, outputs=f"{shape} y, {shape} {read}", more="uint8 v = {0}, float t = {0.051}")
    assert not result.modified


@pytest.mark.parametrize("read", ["q", "d"])
def test_integers_or_floats_that_are_graph_outputs_too_keep_their_type(read: str) -> None:
    kind = "uint8" if read == "q" else "float"
    model, _ = tidy(f"{ENTER} y = Flatten (d)", outputs=f"float[1,32] y, {kind}[1,2,4,4] {read}")
    assert (ops(model) == [Q, "Flatten", DQ]) == (read == "q")


def test_signed_and_unsigned_are_not_mixed_by_skipping_a_requantization() -> None:
    body = (
        "c = Neg (x) q = QuantizeLinear (c, s, i) d = DequantizeLinear (q, s, i) n = Sign (d) "
        "r = QuantizeLinear (d, t, z) e = DequantizeLinear (r, t, z) o = Add (e, e) y = Sub (o, n)"
    )
    model = graph(body, more="float t = {0.06}, int8 i = {0}")
    assert not close(model, 0.0).modified


@pytest.mark.parametrize(
    "body",
    [
        "q = QuantizeLinear (x, s) d = DequantizeLinear (q, s) r = QuantizeLinear (d, s)"
        " y = DequantizeLinear (r, s)",
        "t = Abs (s) q = QuantizeLinear (x, t, z) d = DequantizeLinear (q, t, z) r = QuantizeLinear (d, t, z)"
        " y = DequantizeLinear (r, t, z)",
    ],
)
def test_steps_without_a_given_zero_point_or_constant_scale_are_left_alone(body: str) -> None:
    assert not apply(OptimizeInt8(), graph(body), CONTEXT).modified


def test_a_golden() -> None:
    check_pass(
        OptimizeInt8(),
        """g (float[1,2,4,4] x) => (float[1,32] y) <float s = {0.05}, uint8 z = {0}> {
          c = Neg (x)
          r = Relu (c)
          m = Transpose <perm = [0,2,3,1]> (r)
          [q] i = QuantizeLinear (m, s, z)
          d = DequantizeLinear (i, s, z)
          [flat] f = Flatten (d)
          [r] j = QuantizeLinear (f, s, z)
          [out] y = DequantizeLinear (j, s, z)
        }""",
        """g (float[1,2,4,4] x) => (float[1,32] y) <float s = {0.05}, uint8 z = {0}> {
          c = Neg (x)
          [q] r_quantized = QuantizeLinear (c, s, z)
          i = Transpose <perm = [0,2,3,1]> (r_quantized)
          [flat] j = Flatten (i)
          [out] y = DequantizeLinear (j, s, z)
        }""",
        ctx=CONTEXT,
    )


# Any chain


LINKS = ("transpose", "flatten", "relu", "double", "halve", "max_pool", "neg", "quantize")


def chain(links: list[tuple[str, int]]) -> Model:
    """x through a chain of links; the number of a quantize link chooses its grid, of others it is ignored."""
    lines: list[str] = []
    value, rank = "x", 4
    for index, (link, choice) in enumerate(links):
        result = f"v{index}"
        if link == "quantize":
            lines.append(f"q{index} = QuantizeLinear ({value}, s{choice}, z{choice})")
            lines.append(f"{result} = DequantizeLinear (q{index}, s{choice}, z{choice})")
        elif link == "transpose":
            perm = "0,2,3,1" if rank == 4 else "1,0"
            lines.append(f"{result} = Transpose <perm = [{perm}]> ({value})")
        elif link == "flatten":
            lines.append(f"{result} = Flatten ({value})")
            rank = 2
        elif link == "max_pool" and rank == 4:
            lines.append(f"{result} = MaxPool <kernel_shape = [1,1]> ({value})")
        elif link in ("double", "halve"):
            lines.append(f"{result} = Mul ({value}, {link})")
        else:
            lines.append(f"{result} = {'Relu' if link == 'relu' else 'Neg'} ({value})")
        value = result
    lines.append(f"y = Neg ({value})")
    grids = ", ".join(f"float s{i} = {{{s}}}, {t} z{i} = {{{z}}}" for i, (s, t, z) in enumerate(GRIDS))
    dims = ",".join("abcd"[:rank])
    return parse(
        f"g (float[1,2,4,4] x) => (float[{dims}] y) <{grids}, float double = {{2.0}}, float halve = {{0.5}}>"
        f"{{ {' '.join(lines)} }}"
    )


GRIDS = ((0.05, "uint8", 128), (0.05, "int8", 0), (0.03, "uint8", 100), (0.02, "uint8", 0), (0.1, "int8", -128))


@st.composite
def links(draw: st.DrawFn) -> list[tuple[str, int]]:
    kinds = draw(st.lists(st.sampled_from((*LINKS, "quantize", "quantize")), min_size=1, max_size=10))
    return [(kind, draw(st.integers(0, len(GRIDS) - 1))) for kind in kinds]


@settings(max_examples=150, deadline=None)
@given(links())
def test_any_chain_comes_to_an_end_with_its_numbers(links: list[tuple[str, int]]) -> None:
    model = chain(links)
    before = run(model, {"x": X})[0]
    result = apply(OptimizeInt8(), model, CONTEXT)
    after = run(model, {"x": X})[0]
    inexact = ("requantizations squashed", "requantizations skipped", "scalings absorbed")
    if not any(result.counts.get(rule, 0) for rule in inexact):
        np.testing.assert_array_equal(after, before)
        return
    # Each grid that went, and each tie that a factor of two tips over, moves a number by half a step of a grid,
    # and the factors behind it enlarge that.
    gain, error = 1.0, 0.0
    for link, choice in reversed(links):
        gain *= {"double": 2.0, "halve": 0.5}.get(link, 1.0)
        error += gain * GRIDS[choice][0] if link == "quantize" else 0.0
    assert np.abs(after - before).max() <= error * 1.0001


def test_a_long_chain_takes_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    from qat2int8.passes import optimize_int8

    rounds = []
    sweep = optimize_int8._Squasher.sweep

    def counted(squasher: object) -> bool:
        rounds.append(1)
        return sweep(squasher)  # type: ignore[arg-type]

    monkeypatch.setattr(optimize_int8._Squasher, "sweep", counted)
    cycle: list[tuple[str, int]] = [("transpose", 0), ("double", 0), ("quantize", 0), ("relu", 0), ("quantize", 3)]
    moving: list[tuple[str, int]] = [("transpose", 0)] * 200
    model = chain([*cycle * 40, *moving, ("quantize", 0), *moving])
    OptimizeInt8().run(model, CONTEXT)
    assert len(rounds) < 12
