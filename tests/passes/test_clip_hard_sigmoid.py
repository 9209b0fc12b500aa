from dataclasses import replace

import numpy as np
import pytest
from support import TARGET, apply, check_pass, parse, run

from qat2int8.ir import INT8, UINT8, Contract, Model, OpRule, Provenance, QuantParams
from qat2int8.passes import Context
from qat2int8.passes.clip_hard_sigmoid import ClipHardSigmoid
from qat2int8.passes.complete_scales import CompleteScales
from qat2int8.passes.insert_quantize_dequantize import InsertQuantizeDequantize
from qat2int8.passes.optimize_int8 import OptimizeInt8

GATE = """g (uint8[256] q) => (uint8[256] r)
<float s = {{{step}}}, uint8 z = {{{zero}}}, float t = {{{gate_step}}}, uint8 u = {{{gate_zero}}}> {{
  [d] x = DequantizeLinear (q, s, z)
  [h] g = HardSigmoid <alpha = 0.16666667, beta = 0.5> (x)
  [e] r = QuantizeLinear (g, t, u)
}}"""
ALL = {"q": np.arange(256, dtype=np.uint8)}


def gate(step: float = 0.046875, zero: int = 64, gate_step: float = 1 / 128, gate_zero: int = 0) -> str:
    return GATE.format(step=step, zero=zero, gate_step=gate_step, gate_zero=gate_zero)


def test_it_becomes_a_clip_of_levels() -> None:
    _, result = check_pass(
        ClipHardSigmoid(),
        gate(),
        """g (uint8[256] q) => (uint8[256] r)
        <float s = {0.046875}, uint8 z = {64}, float t = {0.0078125}, uint8 u = {0},
         uint8 g_level = {0}, uint8 g_level_1 = {128}> {
          [d] x = DequantizeLinear (q, s, z)
          [h_Clip] r = Clip (q, g_level, g_level_1)
        }""",
    )
    assert result.counts == {"clipped": 1}


@pytest.mark.parametrize(("zero", "gate_zero"), [(64, 0), (100, 36), (70, 6)])
def test_every_level_is_what_it_was(zero: int, gate_zero: int) -> None:
    model = parse(gate(zero=zero, gate_zero=gate_zero))
    before = model.to_proto()
    assert apply(ClipHardSigmoid(), model).modified
    np.testing.assert_array_equal(run(model, ALL)[0], run(before, ALL)[0])


def scaled(model: Model, source: Provenance) -> Model:
    model.scales.set(model.values()["g"], QuantParams.make(1 / 128, 0, UINT8, source=source))
    return model


@pytest.mark.parametrize("source", [Provenance.DERIVED, Provenance.TRAINED])
def test_one_level_is_the_limit_on_a_derived_grid_and_none_on_a_trained_one(source: Provenance) -> None:
    model = scaled(parse(gate(step=0.0463)), source)
    before = model.to_proto()
    assert apply(ClipHardSigmoid(), model).modified is (source is Provenance.DERIVED)
    apart = np.abs(run(model, ALL)[0].astype(int) - run(before, ALL)[0].astype(int)).max()
    assert apart == (1 if source is Provenance.DERIVED else 0)


@pytest.mark.parametrize(
    "text",
    [
        gate(gate_step=1 / 255),
        gate(gate_zero=40),
        gate().replace("[e]", "o = Abs (g) [e]"),
        gate().replace("(uint8[256] r)", "(uint8[256] r, float[256] g)"),
        gate().replace("uint8[256] r", "int8[256] r").replace("uint8 u", "int8 u"),
        gate().replace("uint8[256] q", "float[256] x").replace("[d] x = DequantizeLinear (q, s, z)", ""),
        gate().replace("HardSigmoid <alpha = 0.16666667, beta = 0.5>", "Sigmoid"),
    ],
    ids=["other step", "other zero", "read twice", "graph output", "other type", "float", "Sigmoid"],
)
def test_it_stays_where_the_levels_differ_or_others_need_it(text: str) -> None:
    assert not ClipHardSigmoid().run(parse(text), Context(TARGET)).modified


CTX = Context(
    replace(
        TARGET,
        ops={
            "Conv": OpRule(Contract.COMPUTE, absorbs=("Relu", "Clip"), weight_axis=0),
            "Mul": OpRule(Contract.ELEMENTWISE, data_inputs=(0, 1)),
        },
    )
)
SWISH = """g (float[1,1,16,16] x) => (float[1,1,16,16] out) <float[1,1,1,1] w = {1}, float[1,1,1,1] v = {1}> {
  [c] a = Conv (x, w)
  [h] g = HardSigmoid <alpha = 0.16666667, beta = 0.5> (a)
  [m] y = Mul (a, g)
  [n] out = Conv (y, v)
}"""


@pytest.mark.parametrize("trained", [None, QuantParams.make(0.05, 0, INT8), QuantParams.make(0.043, 90, UINT8)])
@pytest.mark.parametrize("top", [2.5, 6.0, 20.0])
def test_hard_swish_between_layers_is_all_integer_and_right_within_a_step(
    trained: QuantParams | None, top: float
) -> None:
    model = parse(SWISH)
    values = model.values()
    grids = {
        "x": QuantParams.make(0.1, 128, UINT8),
        "y": QuantParams.make((top + 0.375) / 255, round(0.375 * 255 / (top + 0.375)), UINT8),
        "out": QuantParams.make((top + 0.375) / 255, round(0.375 * 255 / (top + 0.375)), UINT8),
        "w": QuantParams.make(1 / 127, 0, INT8),
        "v": QuantParams.make(1 / 127, 0, INT8),
    }
    for name, params in grids.items():
        model.scales.set(values[name], params)
    if trained is not None:
        model.scales.set(values["a"], trained)
    CompleteScales().run(model, CTX)
    step = float(model.scales[values["a"]].scale)
    InsertQuantizeDequantize().run(model, CTX)
    assert apply(ClipHardSigmoid(), model, CTX).counts == {"clipped": 1}
    OptimizeInt8().run(model, CTX)
    assert "HardSigmoid" not in [node.op_type for node in model.nodes()]
    x = grids["x"].dequantize(np.arange(256).reshape(1, 1, 16, 16))
    lowered = CTX.target.lower(trained) if trained is not None else None
    seen = x if lowered is None else lowered.dequantize(lowered.quantize(x))
    wanted = np.clip(seen * np.clip(seen / 6 + 0.5, 0, 1), -0.375, top)
    assert np.abs(run(model, {"x": x})[0] - wanted).max() <= step + 1.5 * float(grids["y"].scale)


def test_a_gate_is_open_on_a_level() -> None:
    model = parse(SWISH)
    values = model.values()
    for name in ("x", "y", "out"):
        model.scales.set(values[name], QuantParams.make(0.1, 128, UINT8))
    for name in ("w", "v"):
        model.scales.set(values[name], QuantParams.make(1 / 127, 0, INT8))
    CompleteScales().run(model, CTX)
    made, gate_grid = model.scales[values["a"]], model.scales[values["g"]]
    assert 3.0 / float(made.scale) == pytest.approx(round(3.0 / float(made.scale)))
    assert int(made.zero_point) == round(3.0 / float(made.scale))
    assert (1.0 / float(gate_grid.scale)) == pytest.approx(2 * int(made.zero_point))
    assert int(gate_grid.zero_point) == 0
