"""The float weights, their grids, and that nothing of the trained integers is lost."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TARGET, apply, assert_same_numbers, check_pass, graph_text, parse, run

from qat2int8.ir import INT8, UINT8, Code, Model, QuantDType, QuantParams
from qat2int8.passes import Context
from qat2int8.passes.canonicalize import Canonicalize
from qat2int8.passes.dequantize_weights import DequantizeWeights
from qat2int8.passes.gather_input_scales import GatherInputScales
from qat2int8.passes.gather_output_scales import GatherOutputScales
from qat2int8.passes.gather_weight_scales import GatherWeightScales
from qat2int8.passes.remove_fake_quant import RemoveFakeQuant

CTX = Context(TARGET)


def gathered(text: str) -> Model:
    model = parse(text)
    GatherWeightScales().run(model, CTX)
    return model


def weights(model: Model) -> dict[str, list[float]]:
    """Every initializer, flattened."""
    return {name: np.ravel(model.constant(value)).tolist() for name, value in model.graph.initializers.items()}  # type: ignore[arg-type]


def grids(model: Model) -> dict[str | None, QuantParams]:
    return {value.name: params for value, params in model.scales.items()}


def test_a_fake_quantized_float_weight_keeps_its_name_and_lies_on_its_grid() -> None:
    _, result = check_pass(
        DequantizeWeights(),
        """g (float[2,2] x) => (float[2,2] y)
        <float[2,2] w = {0.3, 100, -0.2, -1000}, float[2] s = {0.5, 0.25}, int8[2] z = {0, 0}> {
          q = QuantizeLinear <axis = 0> (w, s, z)
          d = DequantizeLinear <axis = 0> (q, s, z)
          [mul] y = Mul (x, d)
        }""",
        "g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {0.5, 63.5, -0.25, -32}> { [mul] y = Mul (x, w) }",
    )
    assert result.counts == {"dequantized": 1, "transposes folded": 0}
    assert not result.diagnostics


def test_the_grid_moves_to_the_initializer() -> None:
    model = gathered(
        """g (float[2,2] x) => (float[2,2] y)
        <float[2,2] w = {1, 2, 3, 4}, float[2] s = {0.5, 0.25}, int8[2] z = {0, 0}> {
          q = QuantizeLinear (w, s, z)
          d = DequantizeLinear (q, s, z)
          y = Mul (x, d)
        }"""
    )
    apply(DequantizeWeights(), model)
    assert grids(model).keys() == {"w"}
    assert grids(model)["w"].same_grid(QuantParams.make([0.5, 0.25], [0, 0], INT8, axis=1))
    assert model.graph.initializers["w"] in model.scales


def test_a_weight_stored_in_integers_takes_the_name_of_what_it_was_dequantized_to() -> None:
    check_pass(
        DequantizeWeights(),
        """g (float[3] x) => (float[3] y) <uint8[3] w = {0, 5, 255}, float s = {0.5}, uint8 z = {5}> {
          d = DequantizeLinear (w, s, z)
          [mul] y = Mul (x, d)
        }""",
        "g (float[3] x) => (float[3] y) <float[3] d = {-2.5, 0, 125}> { [mul] y = Mul (x, d) }",
    )


@pytest.mark.parametrize(
    ("source", "links"),
    [
        ("int8[4] w = {-128, -7, 5, 127}", "c = Clip (w, lo, hi)"),
        ("float[4] w = {-1000, -3.5, 2.5, 1000}", "q = QuantizeLinear (w, s, z) c = Clip (q, lo, hi)"),
    ],
)
def test_a_clip_is_applied(source: str, links: str) -> None:
    model = gathered(
        f"""g (float[4] x) => (float[4] y)
        <{source}, float s = {{0.5}}, int8 z = {{0}}, int8 lo = {{-7}}, int8 hi = {{7}}> {{
          {links}
          d = DequantizeLinear (c, s, z)
          y = Mul (x, d)
        }}"""
    )
    apply(DequantizeWeights(), model)
    ((name, values),) = weights(model).items()
    assert values == [-3.5, -3.5, 2.5, 3.5]
    assert grids(model)[name].dtype == QuantDType(4, signed=True, narrow_range=True)


def test_a_bias_is_dequantized_and_has_no_grid() -> None:
    model = gathered(
        """g (float[2] x) => (float[2] y) <int32[2] b = {16777217, -3}, float[2] s = {0.5, 0.25}> {
          d = DequantizeLinear <axis = 0> (b, s)
          y = Add (x, d)
        }"""
    )
    before = model.to_proto()
    apply(DequantizeWeights(), model)
    assert [node.op_type for node in model.graph] == ["Add"]
    assert len(model.scales) == 0
    assert_same_numbers(before, model, {"x": np.zeros(2, np.float32)}, rtol=0, atol=0)


def test_one_fake_quant_with_several_consumers_is_one_initializer() -> None:
    check_pass(
        DequantizeWeights(),
        """g (float[2] x) => (float[2] y) <int8[2] w = {1, 2}, float s = {0.5}> {
          d = DequantizeLinear (w, s)
          [mul] t = Mul (x, d)
          [add] y = Add (t, d)
        }""",
        "g (float[2] x) => (float[2] y) <float[2] d = {0.5, 1}> { [mul] t = Mul (x, d) [add] y = Add (t, d) }",
    )


@pytest.mark.parametrize(
    ("source", "first", "second"),
    [
        ("int8[2] w = {1, 2}", "a = DequantizeLinear (w, s)", "b = DequantizeLinear (w, s)"),
        ("int8[2] w = {1, 2}", "a = DequantizeLinear (w, s)", "b = DequantizeLinear (w, t)"),
        (
            "float[2] w = {0.5, 1}",
            "q = QuantizeLinear (w, s) a = DequantizeLinear (q, s)",
            "b = DequantizeLinear (q, s)",
        ),
        (
            "float[2] w = {0.5, 1}",
            "p = QuantizeLinear (w, s) a = DequantizeLinear (p, s)",
            "q = QuantizeLinear (w, s) b = DequantizeLinear (q, s)",
        ),
    ],
)
def test_a_weight_with_a_dequantizer_per_consumer_is_dequantized_once(
    source: str, first: str, second: str
) -> None:
    model = gathered(
        f"""g (float[2] x) => (float[2] y) <{source}, float s = {{0.5}}, float[1] t = {{0.5}}> {{
          {first} {second}
          xa = Mul (x, a)
          y = Mul (xa, b)
        }}"""
    )
    assert apply(DequantizeWeights(), model).counts["dequantized"] == 2
    assert [values for name, values in weights(model).items() if name != "t"] == [[0.5, 1.0]]
    assert len(model.scales) == 1
    assert next(iter(model.scales)) in model.graph.initializers.values()


def test_one_weight_on_two_grids_becomes_two() -> None:
    model = gathered(
        """g (float[2] x) => (float[2] y) <float[2] w = {0.3, 0.9}, float s = {0.5}, float t = {0.25}> {
          p = QuantizeLinear (w, s)
          a = DequantizeLinear (p, s)
          q = QuantizeLinear (w, t)
          b = DequantizeLinear (q, t)
          xa = Mul (x, a)
          y = Mul (xa, b)
        }"""
    )
    apply(DequantizeWeights(), model)
    assert weights(model) == {"a": [0.5, 1.0], "w": [0.25, 1.0]}
    assert {name: float(params.scale) for name, params in grids(model).items()} == {"a": 0.5, "w": 0.25}
    assert [value.name for value in next(node for node in model.graph if node.outputs[0].name == "xa").inputs] == [
        "x",
        "a",
    ]


def test_a_float_weight_that_is_also_read_as_it_is_keeps_its_values() -> None:
    model = gathered(
        """g (float[2] x) => (float[2] y) <float[2] w = {0.3, 0.9}, float s = {0.5}> {
          q = QuantizeLinear (w, s)
          d = DequantizeLinear (q, s)
          t = Mul (x, d)
          y = Add (t, w)
        }"""
    )
    apply(DequantizeWeights(), model)
    kept = weights(model)
    assert kept.keys() == {"w", "d"}
    assert kept["w"] == pytest.approx([0.3, 0.9])
    assert kept["d"] == [0.5, 1.0]
    assert grids(model).keys() == {"d"}


def test_a_weight_that_is_a_graph_output() -> None:
    text = """g (float[2] x) => (float[2] y, float[2] d) <float[2] w = {0.3, 0.9}, float s = {0.5}> {
      q = QuantizeLinear (w, s)
      [dequant] d = DequantizeLinear (q, s)
      [mul] y = Mul (x, d)
    }"""
    model = gathered(text)
    before = model.to_proto()
    apply(DequantizeWeights(), model)
    expected = """g (float[2] x) => (float[2] y, float[2] d) <float[2] w = {0.5, 1}> {
      [dequant] d = Identity (w)
      [mul] y = Mul (x, w)
    }"""
    assert graph_text(model) == graph_text(parse(expected))
    assert grids(model).keys() == {"w"}
    assert_same_numbers(before, model, {"x": np.ones(2, np.float32)}, rtol=0, atol=0)


def test_integers_that_are_a_graph_output_stay() -> None:
    model = gathered(
        """g (float[2] x) => (float[2] y, uint8[2] q) <float[2] w = {0.3, 0.9}, float s = {0.5}> {
          q = QuantizeLinear (w, s)
          d = DequantizeLinear (q, s)
          y = Mul (x, d)
        }"""
    )
    before = model.to_proto()
    apply(DequantizeWeights(), model)
    assert [node.op_type for node in model.graph] == ["QuantizeLinear", "Mul"]
    assert_same_numbers(before, model, {"x": np.ones(2, np.float32)}, rtol=0, atol=0)


def test_a_weight_quantized_twice_in_a_row_is_rounded_twice() -> None:
    model = gathered(
        """g (float[1] x) => (float[1] y) <float[1] w = {0.8}, float s = {0.5}, float t = {0.75}> {
          p = QuantizeLinear (w, s)
          a = DequantizeLinear (p, s)
          q = QuantizeLinear (a, t)
          b = DequantizeLinear (q, t)
          y = Mul (x, b)
        }"""
    )
    apply(DequantizeWeights(), model)
    assert list(weights(model).values()) == [[0.75]]
    assert [float(params.scale) for params in grids(model).values()] == [0.75]


TRANSPOSED = """g (float[1,2] x) => (float[1,3] y)
<int8[3,2] w = {{1, 2, 3, 4, 5, 6}}, float[3] s = {{1, 2, 4}}, int8[3] z = {{0, 0, 0}}> {{
  d = DequantizeLinear <axis = 0> (w, s, z)
  t = Transpose {perm} (d)
  [mm] y = MatMul (x, t)
}}"""


@pytest.mark.parametrize("perm", ["", "<perm = [1, 0]>"])
def test_a_transpose_is_folded_and_the_axis_follows(perm: str) -> None:
    model = gathered(TRANSPOSED.format(perm=perm))
    before = model.to_proto()
    result = apply(DequantizeWeights(), model)
    assert result.counts == {"dequantized": 1, "transposes folded": 1}
    expected = """g (float[1,2] x) => (float[1,3] y) <float[2,3] t = {1, 6, 20, 2, 8, 24}> {
      [mm] y = MatMul (x, t)
    }"""
    assert graph_text(model) == graph_text(parse(expected))
    assert grids(model).keys() == {"t"}
    assert grids(model)["t"].same_grid(QuantParams.make([1, 2, 4], [0, 0, 0], INT8, axis=1))
    assert_same_numbers(before, model, {"x": np.array([[1, -2]], np.float32)}, rtol=0, atol=0)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("perm", [[0, 1, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
def test_the_axis_follows_any_permutation(axis: int, perm: list[int]) -> None:
    shape = [2, 3, 4]
    out = [shape[i] for i in perm]
    count = shape[axis]
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[{out[0]},{out[1]},{out[2]}] x) => (float[{out[0]},{out[1]},{out[2]}] y) {{
          d = DequantizeLinear <axis = {axis}> (w, s)
          t = Transpose <perm = {perm}> (d)
          y = Mul (x, t)
        }}"""
    )
    integers = np.arange(24, dtype=np.int8).reshape(shape)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(integers, "w"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(2.0 ** np.arange(count, dtype=np.float32), "s"))
    model = Model.from_proto(proto)
    GatherWeightScales().run(model, CTX)
    apply(DequantizeWeights(), model)
    value = model.graph.initializers["t"]
    array = model.constant(value)
    assert array is not None
    assert model.scales[value].axis == perm.index(axis)
    np.testing.assert_array_equal(model.scales[value].quantize(array), integers.transpose(perm))
    assert_same_numbers(proto, model, {"x": np.ones(out, np.float32)}, rtol=0, atol=0)


def test_of_a_weight_read_both_ways_both_stay() -> None:
    model = gathered(
        """g (float[2,2] x) => (float[2,2] y) <int8[2,2] w = {1, 2, 3, 4}, float s = {0.5}> {
          d = DequantizeLinear (w, s)
          t = Transpose (d)
          u = Transpose (d)
          a = MatMul (x, d)
          b = MatMul (a, t)
          y = MatMul (b, u)
        }"""
    )
    before = model.to_proto()
    assert apply(DequantizeWeights(), model).counts["transposes folded"] == 2
    assert weights(model) == {"d": [0.5, 1, 1.5, 2], "t": [0.5, 1.5, 1, 2]}
    assert grids(model).keys() == {"d", "t"}
    assert_same_numbers(before, model, {"x": np.array([[1, -2], [3, 5]], np.float32)})


def test_two_transposes_in_a_row_are_folded() -> None:
    model = gathered(
        """g (float[2,2] x) => (float[2,2] y) <int8[2,2] w = {1, 2, 3, 4}, float[2] s = {0.5, 1}> {
          d = DequantizeLinear <axis = 0> (w, s)
          t = Transpose (d)
          u = Transpose (t)
          y = MatMul (x, u)
        }"""
    )
    apply(DequantizeWeights(), model)
    assert weights(model) == {"u": [0.5, 1, 3, 4]}
    assert grids(model)["u"].axis == 0


def test_a_transposed_weight_that_is_quantized_again_is_followed() -> None:
    model = gathered(
        """g (float[2,2] x) => (float[2,2] y) <int8[2,2] w = {1, 2, 3, 4}, float s = {0.5}, float t = {1}> {
          d = DequantizeLinear (w, s)
          e = Transpose (d)
          q = QuantizeLinear (e, t)
          b = DequantizeLinear (q, t)
          y = MatMul (x, b)
        }"""
    )
    before = model.to_proto()
    assert not apply(DequantizeWeights(), model).diagnostics
    assert [node.op_type for node in model.graph] == ["MatMul"]
    assert_same_numbers(before, model, {"x": np.eye(2, dtype=np.float32)}, rtol=0, atol=0)


def test_a_transpose_that_is_a_graph_output_stays() -> None:
    model = gathered(
        """g (float[2,2] x) => (float[2,2] y, float[2,2] t) <int8[2,2] w = {1, 2, 3, 4}, float s = {0.5}> {
          d = DequantizeLinear (w, s)
          t = Transpose (d)
          y = MatMul (x, t)
        }"""
    )
    assert apply(DequantizeWeights(), model).counts == {"dequantized": 1, "transposes folded": 0}


def test_a_gemm_with_transposed_weight_is_left_as_it_is() -> None:
    check_pass(
        DequantizeWeights(),
        """g (float[1,2] x) => (float[1,3] y) <int8[3,2] w = {1,2,3,4,5,6}, float[3] s = {1,2,4}> {
          d = DequantizeLinear <axis = 0> (w, s)
          [fc] y = Gemm <transB = 1> (x, d)
        }""",
        """g (float[1,2] x) => (float[1,3] y) <float[3,2] d = {1,2,6,8,20,24}> {
          [fc] y = Gemm <transB = 1> (x, d)
        }""",
    )


def test_a_transposed_activation_is_left_as_it_is() -> None:
    model = parse(
        """g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {1,2,3,4}> {
          t = Transpose (x) u = Transpose (w) y = Mul (t, u)
        }"""
    )
    assert not apply(DequantizeWeights(), model).modified


def test_activations_are_left_as_they_are() -> None:
    model = gathered(
        """g (float[2] x) => (float[2] y) <float s = {0.5}> {
          q = QuantizeLinear (x, s)
          y = DequantizeLinear (q, s)
        }"""
    )
    result = apply(DequantizeWeights(), model)
    assert not result.modified
    assert not result.diagnostics


def test_a_stored_weight_that_is_a_graph_output() -> None:
    model = gathered(
        """g (float[2] x) => (float[2] y, float[2] d) <int8[2] w = {1, 2}, float s = {0.5}> {
          d = DequantizeLinear (w, s)
          y = Mul (x, d)
        }"""
    )
    before = model.to_proto()
    apply(DequantizeWeights(), model)
    assert [node.op_type for node in model.graph] == ["Identity", "Mul"]
    assert_same_numbers(before, model, {"x": np.ones(2, np.float32)}, rtol=0, atol=0)


def test_a_transpose_in_a_subgraph_stays_there() -> None:
    model = gathered(
        """g (float[2,2] x, bool c) => (float[2,2] y) <int8[2,2] w = {1,2,3,4}, float s = {0.5}> {
          d = DequantizeLinear (w, s)
          y = If (c) <then_branch = t () => (float[2,2] a) { e = Transpose (d) a = Mul (x, e) },
                      else_branch = e () => (float[2,2] b) { b = Add (x, d) }>
        }"""
    )
    before = model.to_proto()
    assert apply(DequantizeWeights(), model).counts["transposes folded"] == 0
    feeds = {"x": np.ones((2, 2), np.float32), "c": np.array(True)}
    assert_same_numbers(before, model, feeds, rtol=0, atol=0)


def test_a_scale_that_is_a_graph_output_stays() -> None:
    model = gathered(
        """g (float[2] x) => (float[2] y, float s) <int8[2] w = {1, 2}, float s = {0.5}> {
          d = DequantizeLinear (w, s)
          y = Mul (x, d)
        }"""
    )
    apply(DequantizeWeights(), model)
    assert weights(model) == {"s": [0.5], "d": [0.5, 1.0]}


def test_a_subgraph_that_reads_a_weight_reads_the_initializer() -> None:
    model = gathered(
        """g (float[2] x, bool c) => (float[2] y) <int8[2] w = {1, 2}, float s = {0.5}> {
          d = DequantizeLinear (w, s)
          y = If (c) <then_branch = t () => (float[2] a) { a = Mul (x, d) },
                      else_branch = e () => (float[2] b) { b = Add (x, d) }>
        }"""
    )
    before = model.to_proto()
    apply(DequantizeWeights(), model)
    assert [node.op_type for node in model.graph] == ["If"]
    for condition in (True, False):
        feeds = {"x": np.ones(2, np.float32), "c": np.array(condition)}
        assert_same_numbers(before, model, feeds, rtol=0, atol=0)


def with_scale(scale: float, integers: list[int]) -> Model:
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[{len(integers)}] x) => (float[{len(integers)}] y) {{
          [dequant] d = DequantizeLinear (w, s)
          y = Add (x, d)
        }}"""
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(integers, np.int8), "w"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(scale, np.float32), "s"))
    model = Model.from_proto(proto)
    GatherWeightScales().run(model, CTX)
    return model


@pytest.mark.parametrize("scale", [1e37, 3e38])
def test_a_weight_float32_cannot_hold_stays_fake_quantized(scale: float) -> None:
    model = with_scale(scale, [-128, 1, 100, 127])
    before = graph_text(model)
    (note,) = apply(DequantizeWeights(), model).diagnostics
    assert (note.code, note.node, note.value) == (Code.UNSUPPORTED_FAKE_QUANT, "dequant", "d")
    assert note.remedy
    assert graph_text(model) == before
    assert grids(model).keys() == {"d"}


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1.1754944e-38, 1e-30, 1.0, 2e36])
def test_a_weight_float32_can_hold_goes(scale: float) -> None:
    model = with_scale(scale, [-128, 1, 100, 127])
    assert not apply(DequantizeWeights(), model).diagnostics
    assert grids(model)["d"].quantize(np.array(weights(model)["d"], np.float32)).tolist() == [-128, 1, 100, 127]


def test_a_weight_with_nan_stays_fake_quantized() -> None:
    model = parse(
        """g (float[2] x) => (float[2] y) <float[2] w = {1, 2}, float s = {0.5}> {
          q = QuantizeLinear (w, s) d = DequantizeLinear (q, s) y = Add (x, d)
        }"""
    ).to_proto()
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.array([1, np.nan], np.float32), "w"))
    result = apply(DequantizeWeights(), Model.from_proto(model))
    assert not result.modified
    assert len(result.diagnostics) == 1


def test_infinity_saturates() -> None:
    proto = parse(
        """g (float[2] x) => (float[2] y) <float[2] w = {1, 2}, float s = {0.5}, int8 z = {0}> {
          q = QuantizeLinear (w, s, z) d = DequantizeLinear (q, s, z) y = Add (x, d)
        }"""
    ).to_proto()
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.array([-np.inf, np.inf], np.float32), "w"))
    model = Model.from_proto(proto)
    apply(DequantizeWeights(), model)
    assert weights(model) == {"w": [-64, 63.5]}


def test_a_weight_that_is_an_expression_stays_with_a_reason() -> None:
    model = gathered(
        """g (float[2] x) => (float[2] y) <float[2] w = {1, 2}, float s = {0.5}> {
          m = Mul (w, w) q = QuantizeLinear (m, s) d = DequantizeLinear (q, s) y = Add (x, d)
        }"""
    )
    result = apply(DequantizeWeights(), model)
    assert not result.modified
    assert [note.value for note in result.diagnostics] == ["d"]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_trained_integers_come_back_bit_for_bit(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 4), "rank")
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank), "shape"))
    axis = data.draw(st.none() | st.integers(-rank, rank - 1), "axis")
    dtype = data.draw(st.sampled_from([INT8, UINT8]), "dtype")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    count = () if axis is None else (shape[axis],)
    scale = (10.0 ** rng.uniform(-8, 3, count)).astype(np.float32)
    zero = rng.integers(dtype.qmin, dtype.qmax, count, endpoint=True).astype(dtype.numpy)
    as_float = data.draw(st.booleans(), "as_float")
    integers = rng.integers(dtype.qmin, dtype.qmax, shape, endpoint=True).astype(dtype.numpy)
    integers.flat[0] = dtype.qmin

    dims = ",".join(map(str, shape))
    attribute = "" if axis is None else f"<axis = {axis}>"
    quantize = f"q = QuantizeLinear {attribute} (w, s, z)" if as_float else ""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[{dims}] x) => (float[{dims}] y, {"u" if dtype is UINT8 else ""}int8[{dims}] i) {{
          {quantize}
          d = DequantizeLinear {attribute} ({"q" if as_float else "w"}, s, z)
          y = Add (x, d)
          i = Identity ({"q" if as_float else "w"})
        }}"""
    )
    wide = QuantParams.make(scale, zero, dtype, axis=None if axis is None else axis % rank)
    stored = wide.dequantize(integers) + rng.uniform(-0.6, 0.6, shape).astype(np.float32) * np.max(scale)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(stored if as_float else integers, "w"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(scale, "s"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(zero, "z"))
    model = Model.from_proto(proto)
    GatherWeightScales().run(model, CTX)
    assert not apply(DequantizeWeights(), model).diagnostics

    feeds = {"x": np.zeros(shape, np.float32)}
    expected, trained = run(proto, feeds)
    np.testing.assert_array_equal(run(model, feeds)[0], expected)
    ((value, params),) = model.scales.items()
    array = model.constant(value)
    assert array is not None
    assert array.dtype == np.float32
    np.testing.assert_array_equal(params.quantize(array), trained)


NETWORK = """g (float[1,1,4,4] x) => (float[1,2] y)
<float[2,1,3,3] w = {{{kernel}}}, float[2] ws = {{0.01, 0.02}}, int8[2] wz = {{0, 0}},
 int32[2] b = {{100, -50}}, float[2] bs = {{0.001, 0.002}},
 int8[2,8] v = {{1,-2,3,-4,5,-6,7,-128,9,-10,11,-12,13,-14,15,127}}, float vs = {{0.03}},
 float s = {{0.1}}, uint8 z = {{100}}, int64[2] shape = {{1, 8}}> {{
  {fakes}
  wq = QuantizeLinear <axis = 0> (w, ws, wz)
  wd = DequantizeLinear <axis = 0> (wq, ws, wz)
  bd = DequantizeLinear <axis = 0> (b, bs)
  c = Conv ({source}, wd, bd)
  r = Relu (c)
  f = Reshape (r, shape)
  vd = DequantizeLinear (v, vs)
  vt = Transpose (vd)
  y = MatMul (f, vt)
}}"""
KERNEL = ", ".join(str(round(0.37 * ((7 * i) % 11 - 5), 2)) for i in range(18))
FAKES = "xq = QuantizeLinear (x, s, z) xd = DequantizeLinear (xq, s, z)"


def read_out(model: Model) -> None:
    for pass_ in (
        GatherWeightScales(),
        GatherOutputScales(),
        GatherInputScales(),
        RemoveFakeQuant(),
        DequantizeWeights(),
    ):
        apply(pass_, model)


def test_with_the_fakes_of_activations_removed_the_rest_computes_the_same() -> None:
    model = parse(NETWORK.format(kernel=KERNEL, fakes=FAKES, source="xd"))
    reference = parse(NETWORK.format(kernel=KERNEL, fakes="", source="x")).to_proto()
    read_out(model)
    assert [node.op_type for node in model.graph] == ["Conv", "Relu", "Reshape", "MatMul"]
    feeds = {"x": np.random.default_rng(3).normal(size=(1, 1, 4, 4)).astype(np.float32)}
    assert_same_numbers(reference, model, feeds, rtol=1e-6, atol=1e-6)
    assert set(grids(model)) == {"x", "w", "vt"}


MODELS = os.environ.get("QAT2INT8_ZOO", "")


@pytest.mark.zoo
@pytest.mark.skipif(not MODELS, reason="QAT2INT8_ZOO names no folder of models")
@pytest.mark.parametrize("path", sorted(Path(MODELS).glob("*.onnx")) if MODELS else [], ids=lambda path: path.stem)
def test_exported_models_compute_the_same_with_their_weights_dequantized(path: Path) -> None:
    model = Model.from_proto(onnx.load(path))
    Canonicalize().run(model, CTX)
    before = model.to_proto()
    GatherWeightScales().run(model, CTX)
    DequantizeWeights().run(model, CTX)
    for value, params in model.scales.items():
        array = model.constant(value)
        if array is not None:
            np.testing.assert_array_equal(params.dequantize(params.quantize(array)), array)
    if {node.domain for node in model.graph} - {"", "com.microsoft"}:
        return
    rng = np.random.default_rng(0)
    feeds = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        dims = [dim if isinstance(dim, int) else 2 for dim in value.shape]
        feeds[value.name or ""] = rng.normal(size=dims).astype(value.dtype.numpy())
    assert_same_numbers(before, model, feeds, rtol=0, atol=1e-6)


@pytest.mark.zoo
@pytest.mark.skipif(not MODELS, reason="QAT2INT8_ZOO names no folder of models")
@pytest.mark.parametrize("path", sorted(Path(MODELS).glob("*.onnx")) if MODELS else [], ids=lambda path: path.stem)
def test_exported_models_survive_all_five_passes(path: Path) -> None:
    model = Model.from_proto(onnx.load(path))
    Canonicalize().run(model, CTX)
    read_out(model)
    alive = set(model.values().values())
    assert all(value in alive for value in model.scales)
