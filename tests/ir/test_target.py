from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import TARGET

from qat2int8.ir import INT8, INT16, UINT8, UNBOUNDED, Interval, Provenance, QuantDType, QuantParams, Target

SIGNED = replace(TARGET, activation="int8")
SYMMETRIC = replace(TARGET, activation="int8", zero_point="symmetric")
TARGETS = [TARGET, SIGNED, SYMMETRIC]

ends = st.floats(-1e4, 1e4, width=32)
spans = st.tuples(ends, ends).map(lambda pair: Interval(min(pair), max(pair)))


def levels(params: QuantParams) -> np.ndarray:
    """Every level of the grid."""
    return np.arange(params.dtype.qmin, params.dtype.qmax + 1, dtype=np.int32)


@given(spans, st.sampled_from(TARGETS))
def test_grid_for_holds_zero_exactly_and_the_span_within_a_step(span: Interval, target: Target) -> None:
    params = target.grid_for(span, source=Provenance.DERIVED, origin="here")
    assert params.dtype == target.activation_dtype
    values = params.dequantize(levels(params))
    assert 0.0 in values
    step = float(params.scale)
    assert values[0] <= span.lo + step
    assert values[-1] >= span.hi - step
    assert params.quantize(np.zeros(1, np.float32)) == params.zero_point
    assert (params.source, params.origin) == (Provenance.DERIVED, "here")


@given(spans)
def test_grid_for_is_the_finest(span: Interval) -> None:
    lo, hi = min(span.lo, 0.0), max(span.hi, 0.0)
    step = float(TARGET.grid_for(span, source=Provenance.DERIVED, origin="").scale)
    assert step == pytest.approx(max(hi - lo, 1e-6) / 255, rel=1e-6)
    step = float(SYMMETRIC.grid_for(span, source=Provenance.DERIVED, origin="").scale)
    assert step == pytest.approx(max(span.amax, 1e-6) / 127, rel=1e-6)


def test_a_nonnegative_span_uses_every_level() -> None:
    params = TARGET.grid_for(Interval(0.0, 6.0), source=Provenance.DERIVED, origin="")
    assert int(params.zero_point) == 0
    assert SIGNED.grid_for(Interval(2.0, 6.0), source=Provenance.DERIVED, origin="").zero_point == -128


def test_grid_for_refuses_the_unbounded() -> None:
    with pytest.raises(ValueError, match="inf"):
        TARGET.grid_for(UNBOUNDED, source=Provenance.DERIVED, origin="")


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("target", TARGETS, ids=["uint8", "int8", "symmetric"])
def test_lower_keeps_every_level_bit_for_bit(bits: int, signed: bool, narrow: bool, target: Target) -> None:
    dtype = QuantDType(bits, signed, narrow and signed)
    lowered_any = False
    for zero in range(dtype.qmin, dtype.qmax + 1):
        params = QuantParams.make(0.1234, zero, dtype, origin="kept")
        lowered = target.lower(params)
        if lowered is None:
            continue
        lowered_any = True
        assert lowered.dtype.signed == target.activation_dtype.signed
        assert lowered.dtype.bits <= 8
        assert (lowered.source, lowered.origin) == (params.source, params.origin)
        if target.zero_point == "symmetric":
            assert lowered.zero_point == 0
        before, after = params.dequantize(levels(params)), lowered.dequantize(levels(lowered))
        # Every value is still there; a dropped lowest level may come back below them, but where nothing is
        # below zero: there zero stays lowest, for a Relu to vanish in it, and a level comes in above.
        from_zero = dtype.narrow_range and zero == dtype.qmin
        kept = after[: before.size] if from_zero else after[-before.size :]
        np.testing.assert_array_equal(kept, before)
        assert after.size - before.size <= dtype.narrow_range
    assert lowered_any


def test_lower_says_none_only_where_the_target_has_no_such_grid() -> None:
    assert TARGET.lower(QuantParams.make([0.1, 0.2], 0, INT8, axis=1)) is None
    assert TARGET.lower(QuantParams.make(0.1, 0, INT16)) is None
    assert SYMMETRIC.lower(QuantParams.make(0.1, 3, INT8)) is None
    assert SYMMETRIC.lower(QuantParams.make(0.1, 0, UINT8)) is None
    assert all(TARGET.lower(QuantParams.make(0.1, zero, INT8)) is not None for zero in range(-128, 128))
    assert all(SIGNED.lower(QuantParams.make(0.1, zero, UINT8)) is not None for zero in range(256))


def test_signed_symmetric_becomes_unsigned_around_128() -> None:
    lowered = TARGET.lower(QuantParams.make(0.1, 0, INT8))
    assert lowered is not None
    assert (lowered.dtype, int(lowered.zero_point)) == (UINT8, 128)


@pytest.mark.parametrize(("zero", "lowered_zero"), [(0, -128), (5, -123)])
def test_a_narrow_unsigned_grid_keeps_its_lowest_level_the_lowest_of_int8(zero: int, lowered_zero: int) -> None:
    lowered = SIGNED.lower(QuantParams.make(0.1, zero, QuantDType(4, signed=False)))
    assert lowered is not None
    assert (lowered.dtype.qmin, lowered.dtype.qmax, int(lowered.zero_point)) == (-128, -113, lowered_zero)
