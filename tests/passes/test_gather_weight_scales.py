import numpy as np
import pytest
from support import TARGET, apply, graph_text, parse

from qat2int8.ir import INT8, UINT8, Code, InvalidModel, Model, Provenance, QuantDType, QuantParams
from qat2int8.passes import Context
from qat2int8.passes.gather_weight_scales import GatherWeightScales


def table(model: Model) -> dict[str | None, QuantParams]:
    return {value.name: params for value, params in model.scales.items()}


def test_the_grids_of_weights_stand_on_what_the_dequantizers_give() -> None:
    model = parse(
        """g (float[2,3] x) => (float[2,3] y)
        <float[2,3] w = {1,2,3,4,5,6}, float[2] s = {0.5, 0.25}, int8[2] z = {0, 0},
         uint8[2,3] v = {1,2,3,4,5,6}, float t = {0.125}, uint8 u = {7}, int8[2,3] n = {1,2,3,4,5,6},
         int8 lo = {-127}, int8 hi = {127}> {
          [quant] q = QuantizeLinear <axis = 0> (w, s, z)
          a = DequantizeLinear <axis = 0> (q, s, z)
          [stored] b = DequantizeLinear (v, t, u)
          clipped = Clip (n, lo, hi)
          [narrow] c = DequantizeLinear (clipped, t)
          ab = Mul (a, b)
          abc = Mul (ab, c)
          y = Mul (x, abc)
        }"""
    )
    before = graph_text(model)
    assert apply(GatherWeightScales(), model).counts == {"gathered": 3}
    assert graph_text(model) == before
    found = table(model)
    assert set(found) == {"a", "b", "c"}
    assert found["a"].same_grid(QuantParams.make([0.5, 0.25], [0, 0], INT8, axis=0))
    assert found["b"].same_grid(QuantParams.make(0.125, 7, UINT8))
    assert found["c"].same_grid(QuantParams.make(0.125, 0, QuantDType(8, signed=True, narrow_range=True)))
    assert [found[name].origin for name in "abc"] == [
        "QuantizeLinear 'quant'",
        "DequantizeLinear 'stored'",
        "DequantizeLinear 'narrow'",
    ]
    assert all(params.source is Provenance.TRAINED for params in found.values())


def test_two_fake_quants_of_one_weight_have_a_grid_each() -> None:
    model = parse(
        """g (float[3] x) => (float[3] y) <float[3] w = {1,2,3}, float s = {0.5}, float t = {0.25}> {
          p = QuantizeLinear (w, s)
          a = DequantizeLinear (p, s)
          q = QuantizeLinear (w, t)
          b = DequantizeLinear (q, t)
          xa = Mul (x, a)
          y = Mul (xa, b)
        }"""
    )
    assert not apply(GatherWeightScales(), model).diagnostics
    assert {name: float(params.scale) for name, params in table(model).items()} == {"a": 0.5, "b": 0.25}


def test_biases_and_activations_get_none() -> None:
    model = parse(
        """g (float[3] x) => (float[3] y) <int32[3] b = {1,2,3}, float s = {0.5}> {
          q = QuantizeLinear (x, s)
          d = DequantizeLinear (q, s)
          bias = DequantizeLinear (b, s)
          y = Add (d, bias)
        }"""
    )
    assert not apply(GatherWeightScales(), model).modified
    assert len(model.scales) == 0


def test_a_weight_that_cannot_be_read_is_reported_and_an_activation_is_not() -> None:
    model = parse(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[3] x) => (float[3] y) <int16[3] w = {1,2,3}, float s = {0.5}, int16 z = {0}> {
          q = QuantizeLinear (x, s, z)
          d = DequantizeLinear (q, s, z)
          [deq] a = DequantizeLinear (w, s, z)
          y = Add (d, a)
        }"""
    )
    (note,) = apply(GatherWeightScales(), model).diagnostics
    assert (note.code, note.node, note.value) == (Code.UNSUPPORTED_FAKE_QUANT, "deq", "a")
    assert note.pass_name == "gather-weight-scales"
    assert "int16" in note.reason
    assert note.remedy


def test_a_grid_the_user_gave_wins() -> None:
    model = parse(
        """g (float[2] x) => (float[2] y) <int8[2] w = {1,2}, float s = {1}> {
          d = DequantizeLinear (w, s) y = Mul (x, d)
        }"""
    )
    given = QuantParams.make(0.5, source=Provenance.USER, origin="given")
    model.scales.set(model.values()["d"], given)
    result = apply(GatherWeightScales(), model)
    assert not result.modified
    assert model.scales[model.values()["d"]] is given
    assert [(note.code, note.pass_name) for note in result.diagnostics] == [
        (Code.SCALE_CONFLICT, "gather-weight-scales")
    ]


def test_a_wrong_scale_is_an_error() -> None:
    model = parse(
        """g (float[2] x) => (float[2] y) <int8[2] w = {1,2}, float s = {0}> {
          [d] d = DequantizeLinear (w, s) y = Mul (x, d)
        }"""
    )
    with pytest.raises(InvalidModel, match=r"DequantizeLinear 'd' \[s\]: scale 0.0"):
        GatherWeightScales().run(model, Context(TARGET))


def test_a_weight_quantized_twice_in_a_row_is_a_weight_twice() -> None:
    model = parse(
        """g (float[2] x) => (float[2] y) <float[2] w = {1,2}, float s = {0.5}, float t = {0.25}> {
          p = QuantizeLinear (w, s)
          a = DequantizeLinear (p, s)
          q = QuantizeLinear (a, t)
          b = DequantizeLinear (q, t)
          y = Mul (x, b)
        }"""
    )
    assert apply(GatherWeightScales(), model).counts == {"gathered": 2}
    np.testing.assert_array_equal([table(model)["a"].scale, table(model)["b"].scale], [0.5, 0.25])
