from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as oir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import parse, run

from qat2int8.ir import (
    INT8,
    INT16,
    INT32,
    UINT8,
    UINT16,
    Interval,
    InvalidModel,
    Provenance,
    QuantDType,
    QuantParams,
)


@pytest.mark.parametrize(
    ("dtype", "qmin", "qmax", "storage"),
    [
        (INT8, -128, 127, oir.DataType.INT8),
        (UINT8, 0, 255, oir.DataType.UINT8),
        (QuantDType(8, True, narrow_range=True), -127, 127, oir.DataType.INT8),
        (QuantDType(7, False), 0, 127, oir.DataType.UINT8),
        (QuantDType(4, True), -8, 7, oir.DataType.INT8),
        (INT16, -32768, 32767, oir.DataType.INT16),
        (UINT16, 0, 65535, oir.DataType.UINT16),
        (INT32, -(2**31), 2**31 - 1, oir.DataType.INT32),
    ],
)
def test_levels_and_storage(dtype: QuantDType, qmin: int, qmax: int, storage: oir.DataType) -> None:
    assert (dtype.qmin, dtype.qmax, dtype.storage) == (qmin, qmax, storage)
    assert np.iinfo(dtype.numpy).min <= qmin
    assert np.iinfo(dtype.numpy).max >= qmax


@pytest.mark.parametrize("dtype", [INT8, UINT8, INT16, UINT16, INT32])
def test_a_storage_type_names_its_full_grid(dtype: QuantDType) -> None:
    assert QuantDType.of_storage(dtype.storage) == dtype


def test_float_is_no_grid() -> None:
    assert QuantDType.of_storage(oir.DataType.FLOAT) is None


@pytest.mark.parametrize(
    ("scale", "zero_point", "axis", "word"),
    [
        (0.0, 0, None, "positive"),
        (-0.1, 0, None, "positive"),
        (math.nan, 0, None, "positive"),
        (math.inf, 0, None, "positive"),
        ([0.1, 0.0], 0, 0, "positive"),
        (0.1, 128, None, "outside"),
        (0.1, -129, None, "outside"),
        ([0.1, 0.2], [0, 300], 0, "outside"),
        ([0.1, 0.2], 0, None, "axis"),
        ([0.1, 0.2], [0, 0, 0], 0, "shape"),
        ([[0.1, 0.2]], 0, 0, "shape"),
    ],
)
def test_what_is_no_grid_is_refused(scale: Any, zero_point: Any, axis: int | None, word: str) -> None:
    with pytest.raises(InvalidModel, match=word):
        QuantParams.make(scale, zero_point, INT8, axis=axis)


@pytest.mark.parametrize("scale", [0.5, [0.5], [[0.5]]])
def test_one_element_is_per_tensor(scale: Any) -> None:
    params = QuantParams.make(scale, [3], INT8, axis=1)
    assert params.scale.shape == () == params.zero_point.shape
    assert params.axis is None
    assert not params.per_channel


def test_one_zero_point_serves_every_channel() -> None:
    params = QuantParams.make([0.5, 0.25], 3, INT8, axis=1)
    assert params.per_channel
    assert params.zero_point.tolist() == [3, 3]


def test_interval_spans_all_channels() -> None:
    assert QuantParams.make(0.5, 0, INT8).interval == Interval(-64.0, 63.5)
    assert QuantParams.make(0.5, 10, UINT8).interval == Interval(-5.0, 122.5)
    assert QuantParams.make([0.5, 1.0], [0, 27], INT8, axis=0).interval == Interval(-155.0, 100.0)


def test_same_grid_ignores_who_said_so_and_nothing_else() -> None:
    params = QuantParams.make(0.5, 3, INT8)
    assert params.same_grid(params.with_(source=Provenance.USER, origin="x"))
    assert not params.same_grid(QuantParams.make(np.nextafter(np.float32(0.5), np.float32(1)), 3, INT8))
    assert not params.same_grid(QuantParams.make(0.5, 4, INT8))
    assert not params.same_grid(QuantParams.make(0.5, 3, UINT8))
    channels = QuantParams.make([0.5, 1], 0, INT8, axis=0)
    assert not channels.same_grid(QuantParams.make([0.5, 1], 0, INT8, axis=1))


def test_stronger_sources_compare_greater() -> None:
    ordered = [Provenance.COMPUTED, Provenance.DERIVED, Provenance.CALIBRATED, Provenance.TRAINED, Provenance.USER]
    assert sorted(Provenance) == ordered


def runtime(values: np.ndarray, params: QuantParams) -> tuple[np.ndarray, np.ndarray]:
    """What onnxruntime's QuantizeLinear and DequantizeLinear make of ``values``."""
    kind = params.dtype.storage.name.lower()
    shape, count = ",".join(map(str, values.shape)), params.scale.size
    grid = f"[{count}]" if params.per_channel else ""
    model = parse(
        f'<ir_version: 10, opset_import: ["" : 21]> g (float[{shape}] x, float{grid} s, {kind}{grid} z)'
        f" => ({kind}[{shape}] q, float[{shape}] y) {{"
        f" q = QuantizeLinear <axis={params.axis or 0}> (x, s, z)"
        f" y = DequantizeLinear <axis={params.axis or 0}> (q, s, z) }}"
    )
    q, y = run(model, {"x": values, "s": params.scale, "z": params.zero_point.astype(params.dtype.numpy)})
    return q, y


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([INT8, UINT8, INT16, UINT16]),
    st.floats(1e-4, 10),
    st.integers(0, 255),
    st.integers(0, 2**32 - 1),
)
def test_quantize_and_dequantize_equal_onnxruntime(dtype: QuantDType, scale: float, zero: int, seed: int) -> None:
    params = QuantParams.make(scale, dtype.qmin + zero, dtype)
    random = np.random.default_rng(seed)
    span = params.interval.amax * 1.5
    # Half steps are where rounding modes differ; the ends are where saturation does.
    ties = (np.arange(-40, 40, dtype=np.float32) + np.float32(0.5)) * params.scale
    values = np.concatenate([ties, random.uniform(-span, span, 200)]).astype(np.float32)
    expected_q, expected_y = runtime(values, params)
    levels = params.quantize(values)
    assert levels.dtype == dtype.numpy
    np.testing.assert_array_equal(levels, expected_q)
    np.testing.assert_array_equal(params.dequantize(levels), expected_y)


def test_ties_go_to_the_even_level() -> None:
    values = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], np.float32)
    assert QuantParams.make(1.0, 0, INT8).quantize(values).tolist() == [-2, -2, 0, 0, 2, 2]
    # The zero point is added after the rounding: an odd one must not change which way a tie goes.
    assert QuantParams.make(1.0, 1, INT8).quantize(values).tolist() == [-1, -1, 1, 1, 3, 3]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_per_channel_equals_onnxruntime(axis: int) -> None:
    random = np.random.default_rng(axis)
    values = random.standard_normal((3, 4, 5)).astype(np.float32)
    channels = values.shape[axis]
    params = QuantParams.make(
        random.uniform(0.01, 0.1, channels), random.integers(-9, 9, channels), INT8, axis=axis
    )
    expected_q, expected_y = runtime(values, params)
    np.testing.assert_array_equal(params.quantize(values), expected_q)
    np.testing.assert_array_equal(params.dequantize(params.quantize(values)), expected_y)


def test_narrow_grids_saturate_where_they_end() -> None:
    values = np.array([-9, 9], np.float32)
    assert QuantParams.make(0.01, 0, QuantDType(7, False)).quantize(values).tolist() == [0, 127]
    assert QuantParams.make(0.01, 0, QuantDType(8, True, narrow_range=True)).quantize(values).tolist() == [
        -127,
        127,
    ]


def test_quantize_leaves_its_input_alone() -> None:
    values = np.array([1.0, 2.0], np.float32)
    levels = np.array([1, 2], np.int8)
    params = QuantParams.make(0.5, 1, INT8)
    params.quantize(values)
    params.dequantize(levels)
    assert values.tolist() == [1.0, 2.0]
    assert levels.tolist() == [1, 2]
