"""The recogniser: what is a fake quant, what is left alone and why, what is an error."""

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from support import parse

from qat2int8.ir import INT8, INT32, UINT8, InvalidModel, Model, Provenance, QuantDType, QuantParams
from qat2int8.passes.fake_quant import FakeQuant, Refusal, fake_quants

OPSET_21 = '<ir_version: 10, opset_import: ["" : 21]>\n'


def activation(
    links: str = "",
    *,
    inits: str = "",
    zero: str = "uint8 z = {128}",
    dequantized: str = "q",
    q: str = "(x, s, z)",
    dq_rest: str = "s, z",
    q_attr: str = "",
    dq_attr: str = "",
    header: str = "",
    scale: str = "float s = {0.5}",
) -> Model:
    """``x -> QuantizeLinear -> links -> DequantizeLinear -> y``."""
    constants = ", ".join(part for part in (scale, zero, inits) if part)
    return parse(
        f"""{header}g (float[2,3] x) => (float[2,3] y) <{constants}> {{
          [quant] q = QuantizeLinear {q_attr} {q}
          {links}
          [dequant] d = DequantizeLinear {dq_attr} ({dequantized}, {dq_rest})
          [neg] y = Neg (d)
        }}"""
    )


def weight(text: str, *, inits: str, header: str = "") -> Model:
    return parse(f"{header}g (float[2,3] x) => (float[2,3] y) <{inits}> {{ {text} [mul] y = Mul (x, d) }}")


def only(model: Model) -> FakeQuant | Refusal:
    (found,) = fake_quants(model)
    return found


def accepted(model: Model) -> FakeQuant:
    found = only(model)
    assert isinstance(found, FakeQuant), found
    return found


def refused(model: Model) -> Refusal:
    found = only(model)
    assert isinstance(found, Refusal), found
    assert found.where["remedy"]
    return found


def test_an_activation() -> None:
    fake = accepted(activation())
    assert (fake.source.name, fake.output.name) == ("x", "d")
    assert [node.name for node in fake.nodes] == ["quant", "dequant"]
    assert fake.params.same_grid(QuantParams.make(0.5, 128, UINT8))
    assert (fake.params.source, fake.params.origin) == (Provenance.TRAINED, "QuantizeLinear 'quant'")
    assert not fake.constant


def test_without_zero_point_it_is_uint8_at_zero() -> None:
    fake = accepted(activation(zero="", q="(x, s)", dq_rest="s"))
    assert fake.params.same_grid(QuantParams.make(0.5, 0, UINT8))


def test_output_dtype_names_the_integers_where_there_is_no_zero_point() -> None:
    fake = accepted(activation(zero="", q="(x, s)", dq_rest="s", q_attr="<output_dtype = 3>", header=OPSET_21))
    assert fake.params.same_grid(QuantParams.make(0.5, 0, INT8))


def test_an_absent_zero_point_agrees_with_zero_but_not_with_another() -> None:
    assert accepted(activation(zero="uint8 z = {0}", dq_rest="s")).params.symmetric
    assert "disagree" in refused(activation(zero="uint8 z = {3}", dq_rest="s")).reason


@pytest.mark.parametrize("axis", ["", "<axis = 7>", "<axis = -9>"])
@pytest.mark.parametrize("shape", ["", "[1]"])
def test_one_scale_is_per_tensor_whatever_its_shape_and_axis(axis: str, shape: str) -> None:
    # The checker wants an axis within the rank, files do not care: build the attribute in after the check.
    model = activation(scale=f"float{shape} s = {{0.5}}", zero=f"uint8{shape} z = {{128}}")
    if axis:
        for node in model.nodes("QuantizeLinear", "DequantizeLinear"):
            node.attributes.add(oir.AttrInt64("axis", int(axis.split("=")[1].strip(" >"))))
    fake = accepted(model)
    assert (fake.params.axis, fake.params.scale.shape) == (None, ())


def test_a_scalar_and_a_one_element_scale_agree() -> None:
    assert accepted(activation(inits="float[1] t = {0.5}", dq_rest="t, z")).params.axis is None


@pytest.mark.parametrize(
    ("inits", "dq_rest"),
    [("float t = {0.25}", "t, z"), ("float t = {0.50000006}", "t, z"), ("uint8 t = {127}", "s, t")],
)
def test_two_halves_that_disagree_are_no_fake_quant(inits: str, dq_rest: str) -> None:
    found = refused(activation(inits=inits, dq_rest=dq_rest))
    assert "'quant'" in found.reason
    assert "'dequant'" in found.reason
    assert (found.where["node"], found.where["value"]) == ("dequant", "d")


@pytest.mark.parametrize(
    ("zero", "low", "high", "grid"),
    [
        ("uint8 z = {0}", "", "127", QuantDType(7, signed=False)),
        ("uint8 z = {0}", "0", "15", QuantDType(4, signed=False)),
        ("uint8 z = {0}", "0", "1", QuantDType(1, signed=False)),
        ("uint8 z = {0}", "0", "255", UINT8),
        ("uint8 z = {0}", "", "", UINT8),
        ("int8 z = {0}", "-127", "127", QuantDType(8, signed=True, narrow_range=True)),
        ("int8 z = {0}", "-127", "", QuantDType(8, signed=True, narrow_range=True)),
        ("int8 z = {0}", "-128", "127", INT8),
        ("int8 z = {0}", "-8", "7", QuantDType(4, signed=True)),
        ("int8 z = {0}", "-7", "7", QuantDType(4, signed=True, narrow_range=True)),
        ("int8 z = {0}", "-1", "1", QuantDType(2, signed=True, narrow_range=True)),
        ("int8 z = {0}", "0", "127", QuantDType(7, signed=False)),
    ],
)
def test_a_clip_narrows_the_grid(zero: str, low: str, high: str, grid: QuantDType) -> None:
    kind = zero.split()[0]
    bounds = [f"{kind} {name} = {{{value}}}" for name, value in (("lo", low), ("hi", high)) if value]
    args = f"q, {'lo' if low else ''}" + (", hi" if high else "")
    model = activation(f"[clip] c = Clip ({args})", inits=", ".join(bounds), zero=zero, dequantized="c")
    fake = accepted(model)
    assert fake.params.dtype == grid
    assert [node.name for node in fake.nodes] == ["quant", "clip", "dequant"]


def test_two_clips_leave_what_both_allow() -> None:
    model = activation(
        "a = Clip (q, lo) c = Clip (a, lo, hi)",
        inits="int8 lo = {-7}, int8 hi = {7}",
        zero="int8 z = {0}",
        dequantized="c",
    )
    assert accepted(model).params.dtype == QuantDType(4, signed=True, narrow_range=True)


def test_a_wider_clip_after_a_narrow_one_does_not_widen() -> None:
    model = activation(
        "a = Clip (q, lo, hi) c = Clip (a, low, high)",
        inits="int8 lo = {-7}, int8 hi = {7}, int8 low = {-127}, int8 high = {127}",
        zero="int8 z = {0}",
        dequantized="c",
    )
    assert accepted(model).params.dtype == QuantDType(4, signed=True, narrow_range=True)


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 100), (-100, 127), (-128, 100), (-126, 127), (-127, 126), (3, 127), (-8, -1), (9, 3), (0, 0), (-6, 6)],
)
def test_a_clip_to_no_grid_is_left_alone(low: int, high: int) -> None:
    model = activation(
        "c = Clip (q, lo, hi)",
        inits=f"int8 lo = {{{low}}}, int8 hi = {{{high}}}",
        zero="int8 z = {0}",
        dequantized="c",
    )
    assert f"from {low} to {high}" in refused(model).reason


def test_a_zero_point_that_is_clipped_away_is_left_alone() -> None:
    model = activation("c = Clip (q, , hi)", inits="uint8 hi = {127}", dequantized="c")
    assert "zero point 128 is clipped away" in refused(model).reason


def test_a_bound_that_is_computed_is_left_alone() -> None:
    model = activation("hi = CastLike (h, z) c = Clip (q, , hi)", inits="float h = {255}", dequantized="c")
    assert "'hi' of Clip" in refused(model).reason


@pytest.mark.parametrize("links", ["c = Cast <to = 2> (q)", "a = Cast <to = 6> (q) c = Cast <to = 2> (a)"])
def test_casts_that_keep_the_integers_are_looked_through(links: str) -> None:
    assert accepted(activation(links, dequantized="c")).params.dtype == UINT8


def test_a_cast_that_changes_integers_is_left_alone() -> None:
    model = activation(
        "c = Cast <to = 3> (q)", inits="int8 i = {0}", zero="uint8 z = {0}", dequantized="c", dq_rest="s, i"
    )
    assert "changes its integers" in refused(model).reason


def test_a_cast_to_the_other_sign_after_a_clip_to_both_is_looked_through() -> None:
    model = activation(
        "a = Clip (q, , hi) c = Cast <to = 3> (a)",
        inits="uint8 hi = {127}, int8 i = {0}",
        zero="uint8 z = {0}",
        dequantized="c",
        dq_rest="s, i",
    )
    assert accepted(model).params.dtype == QuantDType(7, signed=False)


def test_another_op_between_is_left_alone() -> None:
    found = refused(activation("[r] c = Identity (q)", dequantized="c"))
    assert "come from Identity 'r'" in found.reason


def test_integers_from_outside_are_on_a_grid() -> None:
    model = parse("g (uint8[2] x) => (float[2] y) <float s = {0.5}> { [d] y = DequantizeLinear (x, s) }")
    found = accepted(model)
    assert found.is_given
    assert found.source is found.output
    assert (float(found.params.scale), found.params.dtype) == (0.5, UINT8)


def test_integers_from_outside_behind_a_clip_are_left_alone() -> None:
    model = parse(
        """g (uint8[2] x) => (float[2] y) <float s = {1}, uint8 hi = {127}> {
          c = Clip (x, , hi)
          [d] y = DequantizeLinear (c, s)
        }"""
    )
    assert "are a graph input" in refused(model).reason


def test_a_scale_that_is_computed_is_left_alone() -> None:
    model = parse(
        """g (float[2,3] x, float s) => (float[2,3] y) {
          q = QuantizeLinear (x, s)
          y = DequantizeLinear (q, s)
        }"""
    )
    assert "'s' of QuantizeLinear" in refused(model).reason


@pytest.mark.parametrize("zero", ["int16 z = {0}", "uint16 z = {9}"])
def test_16_bit_activations_are_left_alone(zero: str) -> None:
    found = refused(activation(zero=zero, header=OPSET_21))
    assert zero.split()[0] in found.reason


def test_the_contrib_domain_is_read_alike() -> None:
    header = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>\n'
    body = """g (float[4] x) => (float[4] y) <float s = {{0.5}}, {zero} z = {{1}}> {{
      q = com.microsoft.QuantizeLinear (x, s, z)
      y = com.microsoft.DequantizeLinear (q, s, z)
    }}"""
    assert accepted(parse(header + body.format(zero="uint8"))).params.dtype == UINT8
    assert "uint16" in refused(parse(header + body.format(zero="uint16"))).reason


def test_another_domain_is_not_read() -> None:
    header = '<ir_version: 8, opset_import: ["" : 17, "other" : 1]>\n'
    body = "g (float[4] x) => (float[4] y) <float s = {0.5}> { y = other.DequantizeLinear (x, s) }"
    assert list(fake_quants(parse(header + body))) == []


def test_float8_is_left_alone() -> None:
    model = activation(zero="", q="(x, s)", dq_rest="s", q_attr="<output_dtype = 17>", header=OPSET_21)
    assert "FLOAT8E4M3FN" in refused(model).reason


@pytest.mark.parametrize(
    ("inputs", "nodes", "word"),
    [
        ("float16[2] x", "q = QuantizeLinear (x, s) y = DequantizeLinear (q, s)", "FLOAT16"),
        ("", "y = DequantizeLinear (w, s)", "float16"),
    ],
)
def test_float16_is_left_alone(inputs: str, nodes: str, word: str) -> None:
    proto = onnx.parser.parse_model(
        OPSET_21 + f"g ({inputs}) => (float16[2] y) <int8[2] w = {{1, 2}}> {{ {nodes} }}"
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0.5, np.float16), "s"))
    onnx.checker.check_model(proto, full_check=True)
    assert word in refused(Model.from_proto(proto)).reason


@pytest.mark.parametrize("end", ["q_attr", "dq_attr"])
def test_another_precision_is_left_alone(end: str) -> None:
    header = '<ir_version: 11, opset_import: ["" : 23]>\n'
    attribute = "<precision = 10>" if end == "q_attr" else "<output_dtype = 1>"
    found = only(activation(header=header, **{end: attribute}))
    assert isinstance(found, Refusal) == (end == "q_attr")


def test_a_float16_result_of_float32_scales_is_left_alone() -> None:
    header = '<ir_version: 11, opset_import: ["" : 23]>\n'
    model = parse(
        header
        + """g (float[2] x) => (float16[2] y) <float s = {0.5}> {
          q = QuantizeLinear (x, s) y = DequantizeLinear <output_dtype = 10> (q, s)
        }"""
    )
    assert "output is not float32" in refused(model).reason


def test_one_scale_per_block_is_left_alone() -> None:
    model = weight(
        "[d] d = DequantizeLinear <axis = 1, block_size = 3> (w, s)",
        inits="int8[2,3] w = {1,2,3,4,5,6}, float[2,1] s = {1, 2}",
        header=OPSET_21,
    )
    found = refused(model)
    assert "per block" in found.reason
    assert found.constant


PER_CHANNEL = "float[3] s = {1, 2, 4}"


@pytest.mark.parametrize("axis", ["", "<axis = 1>", "<axis = -1>"])
def test_an_activation_per_channel_is_left_alone(axis: str) -> None:
    found = refused(activation(scale=PER_CHANNEL, zero="int8[3] z = {0,0,0}", q_attr=axis, dq_attr=axis))
    assert "one scale per channel" in found.reason
    assert not found.constant


@pytest.mark.parametrize(("axis", "read"), [("", 1), ("<axis = -1>", 1), ("<axis = 1>", 1)])
def test_a_weight_per_channel(axis: str, read: int) -> None:
    fake = accepted(
        weight(f"[d] d = DequantizeLinear {axis} (w, s)", inits=f"int8[2,3] w = {{1,2,3,4,5,6}}, {PER_CHANNEL}")
    )
    assert fake.constant
    assert fake.params.axis == read
    assert fake.params.origin == "DequantizeLinear 'd'"
    np.testing.assert_array_equal(fake.params.zero_point, [0, 0, 0])


@pytest.mark.parametrize("axis", [0, -2])
def test_a_weight_per_row(axis: int) -> None:
    fake = accepted(
        weight(
            f"q = QuantizeLinear <axis = {axis}> (w, s, z) d = DequantizeLinear <axis = 0> (q, s, z)",
            inits="float[2,3] w = {1,2,3,4,5,6}, float[2] s = {1, 2}, uint8[2] z = {3, 4}",
        )
    )
    assert fake.params.same_grid(QuantParams.make([1, 2], [3, 4], UINT8, axis=0))


def test_axes_that_differ_disagree() -> None:
    model = parse(
        """g (float[2,2] x) => (float[2,2] y)
        <float[2,2] w = {1,2,3,4}, float[2] s = {1, 2}, int8[2] z = {0, 0}> {
          q = QuantizeLinear <axis = 0> (w, s, z)
          d = DequantizeLinear <axis = 1> (q, s, z)
          y = Mul (x, d)
        }"""
    )
    assert "disagree" in refused(model).reason


def test_the_axis_of_a_vector_does_not_matter() -> None:
    fake = accepted(
        parse(
            """g (float[2] x) => (float[2] y) <int32[2] b = {10, 20}, float[2] s = {0.5, 2}> {
              d = DequantizeLinear (b, s) y = Add (x, d)
            }"""
        )
    )
    assert fake.is_bias
    assert fake.params.axis == 0
    assert fake.params.dtype == INT32


def test_a_bias_with_a_zero_point_is_left_alone() -> None:
    inits = "int32[2,3] w = {1,2,3,4,5,6}, float s = {1}, int32 z = {%d}"
    assert accepted(weight("d = DequantizeLinear (w, s, z)", inits=inits % 0)).is_bias
    assert "zero point" in refused(weight("d = DequantizeLinear (w, s, z)", inits=inits % 1)).reason


@pytest.mark.parametrize(("stored", "zero"), [("int32", 7), ("int16", 0), ("uint16", 300)])
def test_what_only_layers_add_is_a_bias_whatever_its_integers(stored: str, zero: int) -> None:
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[2,3] x) => (float[2,3] y)
        <float[3,3] w = {{1,2,3,4,5,6,7,8,9}}, {stored}[3] b = {{1,2,300}}, float s = {{0.5}},
         {stored} z = {{{zero}}}> {{
          d = DequantizeLinear (b, s, z) y = %s }}"""
    fake = accepted(parse(text % "Gemm (x, w, d)"))
    assert fake.is_bias
    np.testing.assert_array_equal(fake.params.dequantize(np.int32([1, 300])), [(1 - zero) / 2, (300 - zero) / 2])
    refused(parse(text % "Mul (x, d)"))


def test_a_4_bit_weight_is_a_grid_of_4_bits() -> None:
    proto = weight(
        "d = DequantizeLinear (w, s)", inits="int8[2,3] w = {1,2,3,4,5,6}, float s = {1}", header=OPSET_21
    )
    four = onnx.helper.make_tensor("w", onnx.TensorProto.INT4, [2, 3], [1, 2, 3, 4, 5, 6])
    model = proto.to_proto()
    model.graph.initializer[0].CopyFrom(four)
    del model.graph.value_info[:]
    fake = accepted(Model.from_proto(model))
    assert (fake.params.dtype, fake.constant) == (QuantDType(4, signed=True), True)


def test_what_only_constants_reach_is_a_weight_even_through_other_nodes() -> None:
    model = weight(
        "t = Transpose (w) q = QuantizeLinear (t, s, z) d = DequantizeLinear (q, s, z)",
        inits="float[3,2] w = {1,2,3,4,5,6}, float[3] s = {1,2,3}, int8[3] z = {0,0,0}",
    )
    assert accepted(model).constant


def test_an_initializer_a_caller_can_override_is_no_weight() -> None:
    proto = activation().to_proto()
    value = proto.graph.initializer.add()
    value.CopyFrom(onnx.numpy_helper.from_array(np.ones((2, 3), np.float32), "x"))
    assert not accepted(Model.from_proto(proto)).constant


def test_a_branch_with_a_constant_condition_still_reads_what_it_captures() -> None:
    model = parse(
        """g (float[2] x) => (float[2] y) <bool c = {1}, float s = {0.5}> {
          m = If (c) <then_branch = t () => (float[2] a) { a = Neg (x) },
                      else_branch = e () => (float[2] b) { b = Abs (x) }>
          q = QuantizeLinear (m, s)
          y = DequantizeLinear (q, s)
        }"""
    )
    assert not accepted(model).constant


UNSHAPED = """g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {{1,2,3,4}}, float[2] s = {{1, 2}}> {{
  m = Mul (w, w)
  q = QuantizeLinear <axis = {axis}> (m, s)
  d = DequantizeLinear <axis = {axis}> (q, s)
  y = Mul (x, d)
}}"""


def test_an_axis_from_the_back_needs_the_rank() -> None:
    assert "unknown shape" in refused(parse(UNSHAPED.format(axis=-1))).reason
    assert accepted(parse(UNSHAPED.format(axis=1))).params.axis == 1


def test_the_rank_may_be_known_from_the_other_end() -> None:
    model = parse(UNSHAPED.format(axis=-1))
    model.values()["d"].shape = oir.Shape([2, 2])
    assert accepted(model).params.axis == 1


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_scale_must_be_a_positive_number(value: str) -> None:
    model = activation()
    model.graph.initializers["s"].const_value = oir.tensor(np.array(float(value), np.float32), name="s")
    with pytest.raises(InvalidModel, match=r"QuantizeLinear 'quant' \[s\]: scale .* is not a positive"):
        list(fake_quants(model))


@pytest.mark.parametrize(
    ("axis", "scales", "zeros", "complaint"),
    [
        (2, 3, 3, "axis 2 is out of range for rank 2"),
        (-3, 3, 3, "axis -3 is out of range for rank 2"),
        (0, 3, 3, "3 scales for 2 channels on axis 0"),
        (1, 2, 2, "2 scales for 3 channels on axis 1"),
        (1, 3, 2, "does not fit zero point"),
        (1, 0, 0, "the scale is empty"),
    ],
)
def test_scale_zero_point_and_axis_must_fit(axis: int, scales: int, zeros: int, complaint: str) -> None:
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2,3] x) => (float[2,3] y) <int8[2,3] w = {{1,2,3,4,5,6}}> {{
          [dequant] d = DequantizeLinear <axis = {axis}> (w, s, z)
          y = Mul (x, d)
        }}"""
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(scales, np.float32), "s"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(zeros, np.int8), "z"))
    with pytest.raises(InvalidModel, match=complaint) as caught:
        list(fake_quants(Model.from_proto(proto)))
    assert caught.value.where == "DequantizeLinear 'dequant' [s]"
    assert caught.value.remedy


def test_a_scale_with_two_dimensions_is_an_error() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[2,3] x) => (float[2,3] y) <int8[2,3] w = {1,2,3,4,5,6}, float[1,3] s = {1,2,3}> {
          [dequant] d = DequantizeLinear (w, s) y = Mul (x, d)
        }"""
    )
    with pytest.raises(InvalidModel, match="one dimension"):
        list(fake_quants(Model.from_proto(proto)))
