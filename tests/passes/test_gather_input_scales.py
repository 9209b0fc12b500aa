import pytest
from support import TARGET, apply, graph_text, parse

from qat2int8.ir import INT8, UINT8, Code, InvalidModel, Model, Provenance, QuantParams
from qat2int8.passes import Context, PassResult
from qat2int8.passes.gather_input_scales import GatherInputScales


def grid(model: Model, name: str) -> QuantParams:
    return model.scales[model.values()[name]]


def names(model: Model) -> set[str | None]:
    return {value.name for value in model.scales}


def codes(result: PassResult) -> list[Code]:
    return [note.code for note in result.diagnostics]


def test_the_grid_stands_on_the_tensor_that_is_quantized() -> None:
    model = parse(
        """g (float[2] x) => (float[2] y)
        <float s = {0.5}, uint8 z = {128}, float t = {0.25}, int8 u = {-3}> {
          [first] q = QuantizeLinear (x, s, z)
          d = DequantizeLinear (q, s, z)
          r = Relu (d)
          p = QuantizeLinear (r, t, u)
          y = DequantizeLinear (p, t, u)
        }"""
    )
    before = graph_text(model)
    result = apply(GatherInputScales(), model)
    assert (result.counts, result.diagnostics) == ({"gathered": 2}, ())
    assert graph_text(model) == before
    assert names(model) == {"x", "r"}
    assert grid(model, "x").same_grid(QuantParams.make(0.5, 128, UINT8))
    assert grid(model, "r").same_grid(QuantParams.make(0.25, -3, INT8))
    assert grid(model, "x").source is Provenance.TRAINED
    assert grid(model, "x").origin == "QuantizeLinear 'first'"


def test_a_graph_input_that_holds_integers_gives_its_grid_to_what_is_made_of_it() -> None:
    model = parse(
        """g (uint8[2] x) => (float[2] y) <float s = {0.5}, uint8 z = {128}, float t = {0.25}> {
          [given] d = DequantizeLinear (x, s, z)
          p = QuantizeLinear (d, t)
          y = DequantizeLinear (p, t)
        }"""
    )
    before = graph_text(model)
    apply(GatherInputScales(), model)
    assert graph_text(model) == before
    assert names(model) == {"d"}


def test_the_grid_of_a_given_tensor_is_that_of_its_dequantizer() -> None:
    model = parse("g (uint8[2] x) => (float[2] y) <float s = {0.5}> { d = DequantizeLinear (x, s) y = Neg (d) }")
    assert apply(GatherInputScales(), model).counts == {"gathered": 1}
    assert grid(model, "d").same_grid(QuantParams.make(0.5, 0, UINT8))


CHAIN = """g (float[2] x) => (float[2] y) <float s = {{{first}}}, float t = {{{last}}}> {{
  p = QuantizeLinear (x, s)
  a = DequantizeLinear (p, s)
  [again] q = QuantizeLinear (a, t)
  [back] b = DequantizeLinear (q, t)
  y = Neg (b)
}}"""


def test_a_chain_on_one_grid_is_one_grid() -> None:
    model = parse(CHAIN.format(first=0.5, last=0.5))
    result = apply(GatherInputScales(), model)
    assert (result.counts, result.diagnostics) == ({"gathered": 1}, ())
    assert names(model) == {"x"}


@pytest.mark.parametrize(("first", "last"), [(0.5, 0.25), (0.25, 0.5)])
def test_of_a_chain_on_two_grids_the_last_wins_and_it_is_reported(first: float, last: float) -> None:
    model = parse(CHAIN.format(first=first, last=last))
    result = apply(GatherInputScales(), model)
    assert names(model) == {"x"}
    assert float(grid(model, "x").scale) == last
    (note,) = result.diagnostics
    assert (note.code, note.node, note.value) == (Code.SCALE_CONFLICT, "back", "x")
    assert note.pass_name == "gather-input-scales"
    assert "QuantizeLinear 'again' is used" in note.reason


def test_a_chain_of_three_speaks_of_the_first_tensor() -> None:
    model = parse(
        """g (float[2] x) => (float[2] y) <float s = {1}, float t = {2}, float u = {4}> {
          p = QuantizeLinear (x, s)
          a = DequantizeLinear (p, s)
          q = QuantizeLinear (a, t)
          b = DequantizeLinear (q, t)
          r = QuantizeLinear (b, u)
          y = DequantizeLinear (r, u)
        }"""
    )
    result = apply(GatherInputScales(), model)
    assert names(model) == {"x"}
    assert float(grid(model, "x").scale) == 4
    assert codes(result) == [Code.SCALE_CONFLICT] * 2


def test_an_op_between_two_fake_quants_makes_two_tensors() -> None:
    model = parse(
        CHAIN.format(first=0.5, last=0.25)
        .replace("QuantizeLinear (a", "QuantizeLinear (m")
        .replace("[again]", "m = Relu (a) [again]")
    )
    assert not apply(GatherInputScales(), model).diagnostics
    assert names(model) == {"x", "m"}


@pytest.mark.parametrize(("one", "other"), [(0.5, 0.25), (0.25, 0.5)])
def test_of_two_side_by_side_the_wider_wins_and_it_is_reported(one: float, other: float) -> None:
    model = parse(
        f"""g (float[2] x) => (float[2] y) <float s = {{{one}}}, float t = {{{other}}}> {{
          p = QuantizeLinear (x, s)
          a = DequantizeLinear (p, s)
          q = QuantizeLinear (x, t)
          b = DequantizeLinear (q, t)
          y = Add (a, b)
        }}"""
    )
    result = apply(GatherInputScales(), model)
    assert float(grid(model, "x").scale) == 0.5
    (note,) = result.diagnostics
    assert (note.code, note.value, note.pass_name) == (Code.SCALE_CONFLICT, "x", "gather-input-scales")


def test_dedicated_dequantizers_of_one_quantizer_are_one_grid() -> None:
    model = parse(
        """g (float[2] x) => (float[2] y) <float s = {0.5}> {
          q = QuantizeLinear (x, s)
          a = DequantizeLinear (q, s)
          b = DequantizeLinear (q, s)
          y = Add (a, b)
        }"""
    )
    result = apply(GatherInputScales(), model)
    assert (result.counts, result.diagnostics) == ({"gathered": 1}, ())


def test_weights_are_left_to_another_pass() -> None:
    model = parse(
        """g (float[2] x) => (float[2] y) <float[2] w = {1,2}, int8[2] v = {1,2}, float s = {0.5}> {
          p = QuantizeLinear (w, s)
          a = DequantizeLinear (p, s)
          b = DequantizeLinear (v, s)
          ab = Mul (a, b)
          y = Mul (x, ab)
        }"""
    )
    assert not apply(GatherInputScales(), model).modified


def test_what_cannot_be_read_is_reported_once_and_by_the_pass_it_belongs_to() -> None:
    model = parse(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[3] x) => (float[3] y) <int16[3] w = {1,2,3}, float s = {0.5}, int16 z = {0}> {
          q = QuantizeLinear (x, s, z)
          [deq] d = DequantizeLinear (q, s, z)
          a = DequantizeLinear (w, s, z)
          y = Add (d, a)
        }"""
    )
    (note,) = apply(GatherInputScales(), model).diagnostics
    assert (note.code, note.node, note.value) == (Code.UNSUPPORTED_FAKE_QUANT, "deq", "d")
    assert "int16" in note.reason
    assert len(model.scales) == 0


def test_a_fake_quant_after_one_that_is_refused_is_a_chain_of_its_own() -> None:
    model = parse(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[3] x) => (float[3] y) <float s = {0.5}, int16 z = {0}, int8 u = {0}> {
          q = QuantizeLinear (x, s, z)
          d = DequantizeLinear (q, s, z)
          p = QuantizeLinear (d, s, u)
          y = DequantizeLinear (p, s, u)
        }"""
    )
    apply(GatherInputScales(), model)
    assert names(model) == {"d"}


def test_a_grid_the_user_gave_wins() -> None:
    model = parse(CHAIN.format(first=0.5, last=0.5))
    given = QuantParams.make(0.125, 0, UINT8, source=Provenance.USER, origin="given")
    model.scales.set(model.values()["x"], given)
    result = apply(GatherInputScales(), model)
    assert not result.modified
    assert grid(model, "x") is given
    assert codes(result) == [Code.SCALE_CONFLICT]


def test_a_calibrated_grid_gives_way() -> None:
    model = parse(CHAIN.format(first=0.5, last=0.5))
    model.scales.set(model.values()["x"], QuantParams.make(9.0, source=Provenance.CALIBRATED))
    assert apply(GatherInputScales(), model).counts == {"gathered": 1}
    assert float(grid(model, "x").scale) == 0.5


def test_a_wrong_scale_is_an_error() -> None:
    with pytest.raises(InvalidModel, match="is not a positive"):
        GatherInputScales().run(parse(CHAIN.format(first=0.5, last=-1)), Context(TARGET))


def test_each_tensor_is_traced_to_what_the_source_calls_it() -> None:
    model = parse(CHAIN.format(first=0.5, last=0.25))
    apply(GatherInputScales(), model)
    ((value, traced),) = model.scales.traces()
    # The last quantizer's own input: what the first one made of x.
    assert (value.name, traced.tensor, traced.integers) == ("x", "a", "q")
    assert traced.grid.same_grid(QuantParams.make(0.25, 0, UINT8))
