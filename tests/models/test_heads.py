"""A linear layer that ends in float runs as an integer kernel, in whatever way it is written."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import model_of
from support import run

import qat2int8

RNG = np.random.default_rng(6)
STEPS = RNG.uniform(0.01, 0.02, 5).astype(np.float32)
LEVELS = RNG.integers(-127, 128, (8, 5)).astype(np.int8)
CONSTANTS = {"s": 0.03, "z": 0, "ws": STEPS, "wz": np.zeros(5), "b": RNG.normal(size=5)}
PRODUCTS = {
    "MatMul": (LEVELS, 1, "p = MatMul (xd, wd)"),
    "MatMul of a Transpose": (LEVELS.T, 0, "wt = Transpose <perm = [1, 0]> (wd) p = MatMul (xd, wt)"),
    "Gemm": (LEVELS.T, 0, "p = Gemm <transB = 1> (xd, wd)"),
}
SUMS = {"no bias": "y = Identity (p)", "bias first": "y = Add (b, p)", "bias second": "y = Add (p, b)"}


@pytest.mark.parametrize("shape", ["4", "N", "2, 3", "N, 3", "N, S", "2, 2, 3"])
@pytest.mark.parametrize("sum_", SUMS)
@pytest.mark.parametrize("product", PRODUCTS)
def test_a_head_in_float_multiplies_integers(product: str, sum_: str, shape: str) -> None:
    if product == "Gemm" and "," in shape:
        pytest.skip("a Gemm has two dimensions")
    levels, axis, multiplied = PRODUCTS[product]
    rows, columns = levels.shape
    text = (
        f"g (float[{shape}, 8] x, float s, int8 z, int8[{rows}, {columns}] w, float[5] ws, int8[5] wz, float[5] b)"
        f" => (float[{shape}, 5] y) {{ xq = QuantizeLinear (x, s, z) xd = DequantizeLinear (xq, s, z)"
        f" wd = DequantizeLinear <axis = {axis}> (w, ws, wz) {multiplied} {SUMS[sum_]} }}"
    )
    source = model_of(text, CONSTANTS | {"w": levels}).to_proto()
    conversion = qat2int8.convert(source)
    assert conversion.certificate.integer_macs_percent == 100
    assert not any(node.op_type in ("Gemm", "MatMul") for node in conversion.certificate.float_compute)
    dims = [2 if dim in ("N", "S") else int(dim) for dim in shape.split(", ")]
    feeds = {"x": RNG.normal(size=(*dims, 8)).astype(np.float32)}
    # The bias is rounded to steps of the product, and nothing else.
    step = float(STEPS.max()) * 0.03
    np.testing.assert_allclose(
        run(conversion.model, feeds, optimize=True)[0], run(source, feeds)[0], atol=0.51 * step, rtol=1e-5
    )


@pytest.mark.parametrize("per_row", [False, True])
def test_a_tied_embedding_is_looked_up_and_multiplied_in_integers(per_row: bool) -> None:
    steps = STEPS if per_row else STEPS[:1].reshape(())
    zeros, axis = np.zeros_like(steps), "<axis = 0>" if per_row else ""
    shape = "[5]" if per_row else ""
    text = (
        f"g (int64[N, 3] i, float s, int8 z, int8[5, 8] w, float{shape} ws, int8{shape} wz, float[5] b)"
        f" => (float[N, 3, 5] y) {{ wd = DequantizeLinear {axis} (w, ws, wz) e = Gather (wd, i) x = Tanh (e)"
        " xq = QuantizeLinear (x, s, z) xd = DequantizeLinear (xq, s, z)"
        " wt = Transpose <perm = [1, 0]> (wd) p = MatMul (xd, wt) y = Add (p, b) }"
    )
    arrays = CONSTANTS | {"w": LEVELS.T, "ws": steps, "wz": zeros}
    source = model_of(text, arrays).to_proto()
    conversion = qat2int8.convert(source)
    assert conversion.certificate.integer_macs_percent == 100
    floats = [value for value in conversion.model.graph.initializers.values() if value.const_value is not None]
    assert max(value.const_value.size for value in floats if value.dtype.is_floating_point()) <= 5
    feeds = {"i": np.array([[0, 4, 2]], np.int64)}
    step = float(STEPS.max()) * 0.03
    np.testing.assert_allclose(
        run(conversion.model, feeds, optimize=True)[0], run(source, feeds)[0], atol=0.51 * step, rtol=1e-5
    )
