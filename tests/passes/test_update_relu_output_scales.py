from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from support import TARGET, apply, graph_text, parse

from qat2int8.ir import INT8, INT16, UINT8, Interval, Model, QuantDType, QuantParams
from qat2int8.passes import Context, PassResult
from qat2int8.passes.update_relu_output_scales import ReluEncoding, UpdateReluOutputScales

S = float(np.float32(0.1))
ENCODINGS = list(ReluEncoding)


def updated(
    body: str,
    grid: QuantParams,
    *,
    name: str = "y",
    encoding: ReluEncoding = ReluEncoding.SAME_GRID,
    target: Any = TARGET,
    six: float = 6.0,
) -> tuple[QuantParams, PassResult]:
    """The grid of ``name`` after the pass; the graph must not change, nor anything in a second run."""
    model = parse(
        "g (float[1,4,4,4] x) => (float[1,4,4,4] out) "
        f"<float zero = {{0.0}}, float six = {{{six}}}, "
        "float big = {100.0}, float none = {0.0}, float minus = {-1.0}, "
        "float tiny = {1e-44}, int64[4] shape = {1, 4, 4, 4}> {\n" + body + "\nout = Abs(y)\n}"
    )
    model.scales.set(model.values()[name], grid)
    text = graph_text(model)
    result = apply(UpdateReluOutputScales(encoding), model, Context(target))
    assert graph_text(model) == text
    return model.scales[model.values()[name]], result


def describe(params: QuantParams) -> tuple[float, int, QuantDType, Interval | None]:
    return float(params.scale), int(params.zero_point), params.dtype, params.trained


@pytest.mark.parametrize(
    ("encoding", "scale", "dtype", "trained"),
    [
        (ReluEncoding.REFINE, float(np.float32(127 * S / 255)), UINT8, None),
        (ReluEncoding.SAME_GRID, S, UINT8, Interval(0.0, 127 * S)),
        (ReluEncoding.EXACT, S, QuantDType(7, signed=False), None),
    ],
)
def test_the_three_encodings_of_a_symmetric_grid(
    encoding: ReluEncoding, scale: float, dtype: QuantDType, trained: Interval | None
) -> None:
    grid, result = updated("y = Relu(x)", QuantParams.make(S, origin="fake quant 'f'"), encoding=encoding)
    assert describe(grid) == (scale, 0, dtype, trained)
    assert result.counts == {"updated": 1}
    assert not result.diagnostics
    assert grid.origin == "fake quant 'f'"
    assert grid.span.hi == pytest.approx(127 * S)


def test_the_trained_grid_is_what_an_exact_encoding_computes() -> None:
    trained = QuantParams.make(S)
    values = np.linspace(0, 40, 999).astype(np.float32)
    grid, _ = updated("y = Relu(x)", trained, encoding=ReluEncoding.EXACT)
    np.testing.assert_array_equal(
        grid.dequantize(grid.quantize(values)), trained.dequantize(trained.quantize(values))
    )


def test_the_default_is_exact() -> None:
    assert UpdateReluOutputScales().encoding is ReluEncoding.EXACT


@pytest.mark.parametrize(
    ("zero", "top"),
    [(28, 99), (-28, 155), (-127, 254), (127, None), (126, 1)],
)
def test_asymmetric_grids_keep_what_lies_above_zero(zero: int, top: int | None) -> None:
    trained = QuantParams.make(S, zero)
    grid, result = updated("y = Relu(x)", trained)
    if top is None:
        assert grid is trained, "nothing lies above zero"
        assert not result.modified
        return
    assert describe(grid) == (S, 0, UINT8, Interval(0.0, top * S))
    refined, _ = updated("y = Relu(x)", trained, encoding=ReluEncoding.REFINE)
    assert describe(refined) == (float(np.float32(top * S / 255)), 0, UINT8, None)


def test_an_unsigned_grid_around_a_zero_point_starts_at_zero_too() -> None:
    grid, _ = updated("y = Relu(x)", QuantParams.make(S, 128, UINT8), encoding=ReluEncoding.EXACT)
    assert describe(grid) == (S, 0, QuantDType(7, signed=False), None)


def test_exact_ends_at_any_level() -> None:
    grid, result = updated("y = Relu(x)", QuantParams.make(S, 28), encoding=ReluEncoding.EXACT)
    assert describe(grid) == (S, 0, QuantDType(8, signed=False, top=99), None)
    assert not result.diagnostics


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("dtype", "zero", "expected"),
    [
        (QuantDType(4, signed=True), 0, QuantDType(3, signed=False)),
        (QuantDType(4, signed=True, narrow_range=True), 0, QuantDType(3, signed=False)),
        (QuantDType(7, signed=True), 0, QuantDType(6, signed=False)),
        (QuantDType(4, signed=False), 8, QuantDType(3, signed=False)),
        (QuantDType(4, signed=False), 5, QuantDType(8, signed=False, top=10)),
    ],
)
def test_narrow_grids_stay_narrow(
    encoding: ReluEncoding, dtype: QuantDType, zero: int, expected: QuantDType
) -> None:
    grid, _ = updated("y = Relu(x)", QuantParams.make(S, zero, dtype), encoding=encoding)
    assert describe(grid) == (S, 0, expected, None)


REFINED = (float(np.float32(6 / 255)), 0, UINT8, None)
BEHIND_SIX = {
    ReluEncoding.EXACT: (S, 0, QuantDType(8, signed=False, top=60), None),
    ReluEncoding.REFINE: REFINED,
    ReluEncoding.SAME_GRID: REFINED,
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "trained",
    [QuantParams.make(S), QuantParams.make(S, 28, UINT8), QuantParams.make(S, 0, UINT8)],
    ids=["signed", "around a zero point", "unsigned already"],
)
def test_a_clip_inside_the_grid_ends_it(encoding: ReluEncoding, trained: QuantParams) -> None:
    grid, _ = updated("y = Clip(x, zero, six)", trained, encoding=encoding)
    assert describe(grid) == BEHIND_SIX[encoding]


@pytest.mark.parametrize("bound", [6.0, 6.03, 6.05, 6.07, 5.96])
def test_an_exact_grid_behind_a_clip_computes_what_clamping_before_rounding_does(bound: float) -> None:
    trained = QuantParams.make(S)
    grid, _ = updated("y = Clip(x, zero, six)", trained, encoding=ReluEncoding.EXACT, six=bound)
    values = np.linspace(-20, 20, 9999).astype(np.float32)
    clamped = np.clip(values, 0, np.float32(bound))
    np.testing.assert_array_equal(
        grid.dequantize(grid.quantize(values)), trained.dequantize(trained.quantize(clamped))
    )


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_clip_is_seen_through_data_movement(encoding: ReluEncoding) -> None:
    body = (
        "c = Clip(x, zero, six)\nm = MaxPool<kernel_shape=[1, 1]>(c)\n"
        "t = Transpose<perm=[0, 1, 3, 2]>(m)\nn = Identity(t)\ny = Reshape(n, shape)"
    )
    grid, _ = updated(body, QuantParams.make(S), encoding=encoding)
    assert describe(grid) == BEHIND_SIX[encoding]


def test_a_clip_between_the_trained_end_and_that_of_the_wider_grid() -> None:
    # 127 * 0.04 = 5.08 is below the bound, 255 * 0.04 = 10.2 is above: the grid ends where training did.
    grid, _ = updated("y = Clip(x, zero, six)", QuantParams.make(0.04))
    assert describe(grid) == (pytest.approx(127 * 0.04 / 255), 0, UINT8, None)
    exact, _ = updated("y = Clip(x, zero, six)", QuantParams.make(0.04), encoding=ReluEncoding.EXACT)
    assert describe(exact) == (pytest.approx(0.04), 0, QuantDType(7, signed=False), None)


def test_a_clip_beyond_the_grid_changes_nothing() -> None:
    grid, _ = updated("y = Clip(x, zero, big)", QuantParams.make(S))
    assert describe(grid) == (S, 0, UINT8, Interval(0.0, 127 * S))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("bound", ["none", "tiny"])
def test_a_clip_that_leaves_no_range_leaves_the_grid(encoding: ReluEncoding, bound: str) -> None:
    trained = QuantParams.make(S)
    grid, result = updated(f"y = Clip(x, zero, {bound})", trained, encoding=encoding)
    assert grid is trained
    assert not result.modified


@pytest.mark.parametrize(
    "body",
    [
        "r = Relu(x)\ny = MaxPool<kernel_shape=[1, 1]>(r)",
        "r = Relu(x)\ny = Concat<axis=1>(r, r)",
        "r = Relu(x)\ns = Sigmoid(x)\ny = Add(r, s)",
        "y = Sigmoid(x)",
        "y = Softmax(x)",
        "y = Clip(x, zero)",
    ],
)
def test_what_cannot_be_negative_counts_whatever_made_it(body: str) -> None:
    model = parse(f"g (float[1,4,4,4] x) => (float[1,N,4,4] out) <float zero = {{0.0}}> {{{body}\nout = Abs(y)}}")
    y = model.values()["y"]
    model.scales.set(y, QuantParams.make(S))
    assert apply(UpdateReluOutputScales(), model).counts == {"updated": 1}
    assert not model.scales[y].dtype.signed


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("y = Neg(x)", "y"),
        ("y = Clip(x, minus, six)", "y"),
        ("y = LeakyRelu(x)", "y"),
        ("r = Relu(x)\ny = Neg(r)", "y"),
        ("y = HardSwish(x)", "y"),
        ("y = Relu(x)", "x"),
        ("y = Relu(x)", "six"),
    ],
)
def test_what_may_be_negative_and_constants_stay(body: str, name: str) -> None:
    trained = QuantParams.make(S)
    grid, result = updated(body, trained, name=name)
    assert grid is trained
    assert not result.modified


@pytest.mark.parametrize(
    "trained",
    [
        QuantParams.make([0.1, 0.2, 0.3, 0.4], axis=1),
        QuantParams.make(S, 0, UINT8),
        QuantParams.make(S, -128, INT8),
        QuantParams.make(S / 256, 0, INT16),
    ],
    ids=["per channel", "unsigned", "from zero upwards", "16 bits"],
)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_grids_that_are_none_of_its_business_stay(trained: QuantParams, encoding: ReluEncoding) -> None:
    grid, result = updated("y = Relu(x)", trained, encoding=encoding)
    assert grid is trained
    assert not result.modified


def test_a_grid_of_denormal_steps_is_left_alone() -> None:
    trained = QuantParams.make(1e-45)
    grid, _ = updated("y = Relu(x)", trained, encoding=ReluEncoding.REFINE)
    assert math.isfinite(float(grid.scale))
    assert float(grid.scale) > 0


def test_a_long_chain_of_movement_is_walked_once() -> None:
    lines = ["t0 = Clip(x, zero, six)", *(f"t{i} = Identity(t{i - 1})" for i in range(1, 1500))]
    text = "g (float[4] x) => (float[4] t1499) <float zero = {0.0}, float six = {6.0}> {" + "\n".join(lines) + "}"
    model: Model = parse(text)
    for name, value in model.values().items():
        if name.startswith("t"):
            model.scales.set(value, QuantParams.make(S))
    assert UpdateReluOutputScales().run(model, Context(TARGET)).counts == {"updated": 1500}


def test_a_target_with_signed_activations_and_any_zero_point_starts_at_the_lowest_level() -> None:
    signed = dataclasses.replace(TARGET, activation="int8")
    grid, _ = updated("y = Relu(x)", QuantParams.make(S), encoding=ReluEncoding.EXACT, target=signed)
    lowered = signed.lower(grid)
    assert lowered is not None
    assert (lowered.dtype.qmin, lowered.dtype.qmax, int(lowered.zero_point)) == (-128, -1, -128)
    assert float(lowered.scale) == np.float32(S)
