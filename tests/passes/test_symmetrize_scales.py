from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import TARGET, apply, parse

from qat2int8.ir import INT8, INT16, UINT8, Code, Interval, QuantDType, QuantParams
from qat2int8.passes import Context, PassResult
from qat2int8.passes.symmetrize_scales import OnAsymmetric, SymmetrizeScales

CTX = Context(replace(TARGET, activation="int8", zero_point="symmetric", placement="inputs"))

GRAPH = """
g (float[1,1,4,4] x, float[1,1,4,4] other) => (float[1,1,4,4] y)
<float[1,1,1,1] w = {1}> {
  [relu] r = Relu (x)
  [conv] c = Conv (r, w)
  [sin] y = Sin (c)
}
"""


def symmetrized(
    grid: QuantParams, pass_: SymmetrizeScales | None = None, *, text: str = GRAPH, value: str = "r"
) -> tuple[QuantParams, PassResult]:
    model = parse(text)
    model.scales.set(model.values()[value], grid)
    result = apply(pass_ or SymmetrizeScales(), model, CTX)
    return model.scales[model.values()[value]], result


SIGNED = GRAPH.replace("Relu (x)", "Neg (x)")


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_few_levels_from_zero_stay_the_same_numbers(bits: int) -> None:
    trained = QuantParams.make(0.3, 0, QuantDType(bits, signed=False))
    grid, result = symmetrized(trained)
    assert (grid.dtype.qmax, int(grid.zero_point), float(grid.scale)) == (2**bits - 1, 0, np.float32(0.3))
    assert CTX.target.lower(grid) is not None
    assert dict(result.counts) == {"kept exactly": 1, "put on new levels": 0}
    assert result.diagnostics == ()
    values = np.linspace(0, 60, 999, dtype=np.float32)
    np.testing.assert_array_equal(
        grid.dequantize(grid.quantize(values)), trained.dequantize(trained.quantize(values))
    )


def test_uint8_from_zero_keeps_its_range_on_half_the_levels_and_says_so() -> None:
    grid, result = symmetrized(QuantParams.make(0.02, 0, UINT8))
    assert (grid.dtype, int(grid.zero_point)) == (INT8, 0)
    assert float(grid.scale) == pytest.approx(0.02 * 255 / 127)
    (finding,) = result.diagnostics
    assert finding.code is Code.GRID_REQUANTIZED
    assert finding.value == "r"
    assert "steps 2.01 times as wide" in finding.reason


def test_where_training_saturated_is_still_known() -> None:
    grid, _ = symmetrized(QuantParams.make(0.02, 0, UINT8))
    assert grid.span == Interval(0.0, pytest.approx(5.1))
    wide = QuantParams.make(0.02, 0, UINT8).with_(trained=Interval(0.0, 2.54))
    grid, _ = symmetrized(wide)
    assert float(grid.scale) == pytest.approx(0.02)


@given(st.integers(0, 255), st.floats(0.125, 8, width=32))
def test_any_8_bit_grid_keeps_its_range_within_half_a_step(zero: int, step: float) -> None:
    trained = QuantParams.make(step, zero, UINT8)
    grid, _ = symmetrized(trained, text=SIGNED)
    assert CTX.target.lower(grid) is not None or zero == 128
    lowered = CTX.target.lower(grid)
    assert lowered is not None
    values = np.linspace(trained.interval.lo, trained.interval.hi, 500, dtype=np.float32)
    error = np.abs(lowered.dequantize(lowered.quantize(values)) - values)
    assert error.max() <= float(lowered.scale) * 0.501


def test_few_levels_off_centre_keep_their_step_and_saturate_later() -> None:
    grid, result = symmetrized(QuantParams.make(0.5, 4, QuantDType(4, signed=False)), text=SIGNED)
    assert (float(grid.scale), grid.dtype.qmax, int(grid.zero_point)) == (0.5, 11, 0)
    assert "the same steps, [-64, 5.5] instead of [-2, 5.5]" in result.diagnostics[0].reason


def test_levels_from_zero_of_a_tensor_that_may_be_negative_are_not_the_same_numbers() -> None:
    _, result = symmetrized(QuantParams.make(0.3, 0, QuantDType(4, signed=False)), text=SIGNED)
    assert len(result.diagnostics) == 1


@pytest.mark.parametrize(
    "trained",
    [
        QuantParams.make(0.1, 0, INT8),
        QuantParams.make(0.1, 128, UINT8),
        QuantParams.make(0.1, 0, QuantDType(4, signed=True)),
        QuantParams.make([0.1], 0, INT16),
        QuantParams.make([0.1, 0.2], 0, UINT8, axis=1),
    ],
    ids=["symmetric", "symmetric in uint8", "4 bits", "16 bits", "per channel"],
)
def test_grids_that_fit_or_never_will_are_left_alone(trained: QuantParams) -> None:
    grid, result = symmetrized(trained)
    assert grid is trained
    assert not result.modified


def test_a_tensor_that_gets_no_quantizer_is_left_alone() -> None:
    for value in ("x", "c", "other"):
        _, result = symmetrized(QuantParams.make(0.1, 3, UINT8), value=value)
        assert not result.modified


def test_a_graph_output_with_a_trained_grid_gets_one() -> None:
    grid, _ = symmetrized(QuantParams.make(0.1, 3, UINT8), value="y")
    assert CTX.target.lower(grid) is not None


def test_it_can_be_left_in_float_instead() -> None:
    trained = QuantParams.make(0.1, 3, UINT8)
    grid, result = symmetrized(trained, SymmetrizeScales(OnAsymmetric.FLOAT))
    assert grid is trained
    assert not result.modified
    exact = QuantParams.make(0.1, 0, QuantDType(7, signed=False))
    grid, result = symmetrized(exact, SymmetrizeScales(OnAsymmetric.FLOAT))
    assert grid.symmetric
    assert result.modified


def test_targets_that_take_any_zero_point_keep_every_grid() -> None:
    model = parse(GRAPH)
    model.scales.set(model.values()["r"], QuantParams.make(0.1, 3, UINT8))
    assert not apply(SymmetrizeScales(), model, Context(TARGET)).modified
    assert isinstance(model.to_proto(), onnx.ModelProto)
