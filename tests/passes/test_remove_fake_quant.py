import numpy as np
import pytest
from support import TARGET, apply, assert_same_numbers, check_pass, graph_text, named, parse, run

from qat2int8.ir import UINT8, Model, QuantParams
from qat2int8.passes import Context
from qat2int8.passes.gather_input_scales import GatherInputScales
from qat2int8.passes.remove_fake_quant import RemoveFakeQuant


def gathered(text: str) -> Model:
    model = parse(text)
    GatherInputScales().run(model, Context(TARGET))
    return model


def grid(model: Model, name: str) -> float:
    return float(model.scales[model.values()[name]].scale)


CONSTANTS = "<float s = {0.5}, uint8 z = {128}>"


def test_consumers_read_the_float_tensor_and_the_constants_go() -> None:
    _, result = check_pass(
        RemoveFakeQuant(),
        f"""g (float[2] x) => (float[2] y, float[2] w) {CONSTANTS} {{
          [relu] r = Relu (x)
          q = QuantizeLinear (r, s, z)
          d = DequantizeLinear (q, s, z)
          [neg] y = Neg (d)
          [add] w = Add (d, r)
        }}""",
        """g (float[2] x) => (float[2] y, float[2] w) {
          [relu] r = Relu (x)
          [neg] y = Neg (r)
          [add] w = Add (r, r)
        }""",
    )
    assert result.counts["removed"] == 1


def test_what_a_caller_hands_in_as_integers_stays_dequantized() -> None:
    text = """g (uint8[2] x) => (float[2] y) <float s = {0.5}> { d = DequantizeLinear (x, s) y = Neg (d) }"""
    model = gathered(text)
    before = graph_text(model)
    assert not apply(RemoveFakeQuant(), model).modified
    assert graph_text(model) == before


def test_clip_and_cast_between_go_too() -> None:
    check_pass(
        RemoveFakeQuant(),
        """g (float[2] x) => (float[2] y) <float s = {0.5}, uint8 hi = {15}> {
          q = QuantizeLinear (x, s)
          c = Clip (q, , hi)
          e = Cast <to = 2> (c)
          d = DequantizeLinear (e, s)
          [neg] y = Neg (d)
        }""",
        "g (float[2] x) => (float[2] y) { [neg] y = Neg (x) }",
    )


def test_a_chain_goes_altogether() -> None:
    _, result = check_pass(
        RemoveFakeQuant(),
        """g (float[2] x) => (float[2] y) <float s = {0.5}, float t = {0.25}> {
          p = QuantizeLinear (x, s)
          a = DequantizeLinear (p, s)
          q = QuantizeLinear (a, t)
          b = DequantizeLinear (q, t)
          [neg] y = Neg (b)
        }""",
        "g (float[2] x) => (float[2] y) { [neg] y = Neg (x) }",
    )
    assert result.counts["removed"] == 2


def test_the_first_of_a_chain_leaves_a_clip_where_it_saturates_earlier() -> None:
    model, result = check_pass(
        RemoveFakeQuant(),
        """g (float[2] x) => (float[2] y) <float s = {0.25}, float t = {0.5}, uint8 z = {128}> {
          p = QuantizeLinear (x, s, z)
          [a] a = DequantizeLinear (p, s, z)
          q = QuantizeLinear (a, t, z)
          b = DequantizeLinear (q, t, z)
          [neg] y = Neg (b)
        }""",
        """g (float[2] x) => (float[2] y) <float a_bound = {-32.0}, float a_bound_1 = {31.75}> {
          [a_Clip] a_clipped = Clip (x, a_bound, a_bound_1)
          [neg] y = Neg (a_clipped)
        }""",
        scales={"x": QuantParams.make(0.5, 128, UINT8)},
    )
    assert result.counts["clips"] == 1
    assert grid(model, "a_clipped") == 0.5


def test_a_quantizer_with_two_dequantizers_goes_with_the_last() -> None:
    _, result = check_pass(
        RemoveFakeQuant(),
        f"""g (float[2] x) => (float[2] y) {CONSTANTS} {{
          q = QuantizeLinear (x, s, z)
          a = DequantizeLinear (q, s, z)
          b = DequantizeLinear (q, s, z)
          [add] y = Add (a, b)
        }}""",
        "g (float[2] x) => (float[2] y) { [add] y = Add (x, x) }",
    )
    assert result.counts["removed"] == 2


def test_a_quantizer_whose_integers_are_a_graph_output_stays() -> None:
    check_pass(
        RemoveFakeQuant(),
        f"""g (float[2] x) => (float[2] y, uint8[2] q) {CONSTANTS} {{
          [quant] q = QuantizeLinear (x, s, z)
          d = DequantizeLinear (q, s, z)
          [neg] y = Neg (d)
        }}""",
        f"""g (float[2] x) => (float[2] y, uint8[2] q) {CONSTANTS} {{
          [quant] q = QuantizeLinear (x, s, z)
          [neg] y = Neg (x)
        }}""",
    )


def test_a_quantizer_whose_integers_another_op_reads_stays() -> None:
    check_pass(
        RemoveFakeQuant(),
        """g (float[2] x) => (float[2] y, uint8[2] m) <float s = {0.5}, uint8 hi = {15}> {
          [quant] q = QuantizeLinear (x, s)
          c = Clip (q, , hi)
          d = DequantizeLinear (c, s)
          [neg] y = Neg (d)
          [max] m = Max (q, hi)
        }""",
        """g (float[2] x) => (float[2] y, uint8[2] m) <float s = {0.5}, uint8 hi = {15}> {
          [quant] q = QuantizeLinear (x, s)
          [neg] y = Neg (x)
          [max] m = Max (q, hi)
        }""",
    )


def test_weights_and_what_is_refused_stay() -> None:
    model = parse(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[2] x) => (float[2] y)
        <float[2] w = {1,2}, int8[2] v = {1,2}, float s = {0.5}, float t = {0.25}, int16 z = {0}> {
          p = QuantizeLinear (w, s)
          a = DequantizeLinear (p, s)
          b = DequantizeLinear (v, s)
          q = QuantizeLinear (x, s, z)
          c = DequantizeLinear (q, s, z)
          r = QuantizeLinear (c, s)
          d = DequantizeLinear (r, t)
          ab = Mul (a, b)
          y = Mul (ab, d)
        }"""
    )
    before = graph_text(model)
    assert not apply(RemoveFakeQuant(), model).modified
    assert graph_text(model) == before


def test_a_weight_quantized_twice_in_a_row_keeps_both() -> None:
    model = parse(
        """g (float[2] x) => (float[2] y) <float[2] w = {1,2}, float s = {0.5}, float t = {0.25}> {
          p = QuantizeLinear (w, s)
          a = DequantizeLinear (p, s)
          q = QuantizeLinear (a, t)
          b = DequantizeLinear (q, t)
          y = Mul (x, b)
        }"""
    )
    assert not apply(RemoveFakeQuant(), model).modified


def test_a_graph_output_keeps_its_name_and_its_grid() -> None:
    model = gathered(
        f"""g (float[2] x) => (float[2] y) {CONSTANTS} {{
          [relu] r = Relu (x)
          q = QuantizeLinear (r, s, z)
          y = DequantizeLinear (q, s, z)
        }}"""
    )
    apply(RemoveFakeQuant(), model)
    assert graph_text(model) == graph_text(parse("g (float[2] x) => (float[2] y) { [relu] y = Relu (x) }"))
    assert grid(model, "y") == 0.5
    assert len(model.scales) == 1


def test_a_fake_quant_from_input_to_output_leaves_an_identity_with_the_grid_on_both_ends() -> None:
    model = gathered(
        f"""g (float[2] x) => (float[2] y, float[2] n) {CONSTANTS} {{
          q = QuantizeLinear (x, s, z)
          [dequant] y = DequantizeLinear (q, s, z)
          [neg] n = Neg (y)
        }}"""
    )
    apply(RemoveFakeQuant(), model)
    expected = "g (float[2] x) => (float[2] y, float[2] n) { [dequant] y = Identity (x) [neg] n = Neg (x) }"
    assert graph_text(model) == graph_text(parse(expected))
    assert (grid(model, "x"), grid(model, "y")) == (0.5, 0.5)


def test_source_and_result_may_both_be_graph_outputs() -> None:
    model = gathered(
        f"""g (float[2] x) => (float[2] r, float[2] y) {CONSTANTS} {{
          [relu] r = Relu (x)
          q = QuantizeLinear (r, s, z)
          [dequant] y = DequantizeLinear (q, s, z)
        }}"""
    )
    apply(RemoveFakeQuant(), model)
    expected = "g (float[2] x) => (float[2] r, float[2] y) { [relu] r = Relu (x) [dequant] y = Identity (r) }"
    assert graph_text(model) == graph_text(parse(expected))
    assert (grid(model, "r"), grid(model, "y")) == (0.5, 0.5)


def test_two_results_of_one_tensor_may_both_be_graph_outputs() -> None:
    model = gathered(
        f"""g (float[2] x) => (float[2] a, float[2] b) {CONSTANTS} {{
          r = Relu (x)
          q = QuantizeLinear (r, s, z)
          a = DequantizeLinear (q, s, z)
          b = DequantizeLinear (q, s, z)
        }}"""
    )
    apply(RemoveFakeQuant(), model)
    assert named(model.graph.outputs) == ["a", "b"]
    assert [node.op_type for node in model.graph] == ["Relu", "Identity"]
    assert (grid(model, "a"), grid(model, "b")) == (0.5, 0.5)


def test_a_subgraph_that_reads_a_fake_quant_reads_the_float_tensor() -> None:
    text = f"""g (float[2] x, bool c) => (float[2] y) {CONSTANTS} {{
      r = Relu (x)
      q = QuantizeLinear (r, s, z)
      d = DequantizeLinear (q, s, z)
      y = If (c) <then_branch = t () => (float[2] a) {{ a = Neg (d) }},
                  else_branch = e () => (float[2] b) {{ b = Abs (d) }}>
    }}"""
    model = gathered(text)
    apply(RemoveFakeQuant(), model)
    assert [node.op_type for node in model.graph] == ["Relu", "If"]
    (y,) = run(model, {"x": np.array([0.3, -1], np.float32), "c": np.array(True)})
    np.testing.assert_array_equal(y, np.array([-0.3, 0], np.float32))


def test_scales_shared_with_a_weight_stay_with_it() -> None:
    check_pass(
        RemoveFakeQuant(),
        """g (float[2] x) => (float[2] y) <int8[2] w = {1,2}, float s = {0.5}, int8 z = {0}> {
          q = QuantizeLinear (x, s, z)
          d = DequantizeLinear (q, s, z)
          [deq] a = DequantizeLinear (w, s, z)
          [mul] y = Mul (d, a)
        }""",
        """g (float[2] x) => (float[2] y) <int8[2] w = {1,2}, float s = {0.5}, int8 z = {0}> {
          [deq] a = DequantizeLinear (w, s, z)
          [mul] y = Mul (x, a)
        }""",
    )


def test_on_the_grid_nothing_changes() -> None:
    model = parse(
        f"""g (float[6] x) => (float[6] y) {CONSTANTS} {{
          q = QuantizeLinear (x, s, z)
          d = DequantizeLinear (q, s, z)
          y = Neg (d)
        }}"""
    )
    before = model.to_proto()
    apply(RemoveFakeQuant(), model)
    assert_same_numbers(before, model, {"x": np.array([-64, -1, -0.5, 0, 0.5, 63.5], np.float32)}, atol=0, rtol=0)
    assert "QuantizeLinear" not in graph_text(model)


@pytest.mark.parametrize("length", [100])
def test_a_long_chain_of_layers_is_left_without_any(length: int) -> None:
    layers = "\n".join(
        f"q{i} = QuantizeLinear (r{i}, s) d{i} = DequantizeLinear (q{i}, s) r{i + 1} = Relu (d{i})"
        for i in range(length)
    )
    model = gathered(
        f"g (float[2] x) => (float[2] y) <float s = {{0.5}}> {{ r0 = Neg (x) {layers} y = Neg (r{length}) }}"
    )
    assert apply(RemoveFakeQuant(), model).counts["removed"] == length
    assert len(model.scales) == length
    assert all(params.same_grid(QuantParams.make(0.5, 0, UINT8)) for _, params in model.scales.items())


RELU_IN_THE_GRID = """
g (float[1,1,2,2] x) => (float[1,1,2,2] y) <float[1,1,1,1] w = {{-1}}, float s = {{0.5}}, uint8 z = {{{zero}}}> {{
  [conv] c = Conv (x, w)
  {between}
  [q] q = QuantizeLinear (c{suffix}, s, z)
  [dq] y = DequantizeLinear (q, s, z)
}}
"""


def test_a_grid_from_zero_on_a_tensor_that_can_be_negative_was_a_relu() -> None:
    model = gathered(RELU_IN_THE_GRID.format(zero=0, between="", suffix=""))
    before = model.to_proto()
    assert apply(RemoveFakeQuant(), model).counts["activations restored"] == 1
    assert [node.op_type for node in model.graph] == ["Conv", "Relu"]
    assert model.graph.outputs[0].name == "y"
    assert model.graph.outputs[0] in model.scales
    x = np.array([[[[-2.0, 2.0], [1.0, -1.0]]]], np.float32)
    np.testing.assert_array_equal(run(model, {"x": x})[0], run(before, {"x": x})[0])


@pytest.mark.parametrize(
    ("zero", "between", "suffix"),
    [(3, "", ""), (0, "[relu] cr = Relu (c)", "r"), (0, "[r] a = Relu (c) [pool] cp = GlobalMaxPool (a)", "p")],
    ids=["the grid holds negatives", "a Relu is there", "a Relu is there, behind a pool"],
)
def test_nothing_is_restored_where_the_grid_clamps_nothing(zero: int, between: str, suffix: str) -> None:
    text = RELU_IN_THE_GRID.format(zero=zero, between=between, suffix=suffix)
    model = gathered(text.replace("(float[1,1,2,2] y)", "(float[1,1,N,M] y)"))
    assert apply(RemoveFakeQuant(), model).counts["activations restored"] == 0
