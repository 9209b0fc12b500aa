"""Weights are rounded so that the errors of a channel cancel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from arrays import model_of
from support import apply

from qat2int8.ir import Provenance, QuantDType, QuantParams
from qat2int8.passes.correct_weight_bias import CorrectWeightBias

GRID = QuantDType(8, signed=True, narrow_range=True)
TEXT = "g (float[1,6,2,2] x, float[4,6,1,1] w) => (float[1,4,2,2] y) { y = Conv (x, w) }"


def params_of(weights: npt.NDArray[np.float32], *, per_channel: bool = True) -> QuantParams:
    axes = (1, 2, 3) if per_channel else None
    steps = np.abs(weights).max(axis=axes) / np.float32(GRID.qmax)
    return QuantParams.make(steps, 0, GRID, axis=0 if per_channel else None, source=Provenance.COMPUTED)


def corrected(weights: npt.NDArray[np.float32], params: QuantParams) -> tuple[npt.NDArray[np.float32], int]:
    model = model_of(TEXT, {"w": weights}, {"w": params})
    result = apply(CorrectWeightBias(), model)
    array = model.constant(model.values()["w"])
    assert array is not None
    return np.asarray(array, np.float32), result.counts["corrected"]


def test_the_weight_nearest_to_the_middle_is_rounded_the_other_way() -> None:
    row = np.asarray([127.0, 3.45, 5.3, -2.4, 8.35, 0.0], np.float32)
    weights = np.tile(row, (4, 1)).reshape(4, 6, 1, 1)
    array, count = corrected(weights, QuantParams.make(1.0, 0, GRID, source=Provenance.COMPUTED))
    # Per tensor: the errors 0.45 + 0.3 - 0.4 + 0.35 = 0.7 of each row add up to 2.8, so three weights move.
    assert count == 1
    moved = array.reshape(4, 6) != np.rint(row)
    assert moved.sum() == 3
    assert moved[:, 1].sum() == 3
    assert set(array.reshape(4, 6)[:, 1].tolist()) == {3.0, 4.0}


@pytest.mark.parametrize("per_channel", [True, False])
def test_the_errors_of_each_channel_add_up_to_less_than_a_step(per_channel: bool) -> None:
    weights = np.random.default_rng(0).normal(size=(4, 6, 1, 1)).astype(np.float32)
    params = params_of(weights, per_channel=per_channel)
    array, _ = corrected(weights, params)
    axes = (1, 2, 3) if per_channel else None
    steps = params.scale
    assert np.all(np.abs((weights - array).sum(axis=axes)) <= 0.51 * steps)
    plain = params.dequantize(params.quantize(weights))
    assert np.any(np.abs((weights - plain).sum(axis=axes)) > 0.51 * steps)
    # No weight moves by a step, and all lie on the grid.
    assert np.all(np.abs(weights - array) < steps.reshape(-1, 1, 1, 1))
    np.testing.assert_array_equal(params.dequantize(params.quantize(array)), array)


def test_trained_weights_and_weights_on_their_grid_stay() -> None:
    weights = np.random.default_rng(0).normal(size=(4, 6, 1, 1)).astype(np.float32)
    trained = params_of(weights).with_(source=Provenance.TRAINED)
    array, count = corrected(weights, trained)
    assert count == 0
    np.testing.assert_array_equal(array, weights)
    on_grid = params_of(weights).dequantize(params_of(weights).quantize(weights))
    array, count = corrected(on_grid, params_of(weights))
    assert count == 0
    np.testing.assert_array_equal(array, on_grid)


def test_activations_are_left_alone() -> None:
    model = model_of(TEXT, {"w": np.ones((4, 6, 1, 1))}, {"x": QuantParams.make(0.1, source=Provenance.COMPUTED)})
    assert not apply(CorrectWeightBias(), model).modified
