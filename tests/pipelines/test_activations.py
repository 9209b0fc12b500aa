"""Values of the reference's tensors, counted over batches, beside the ends of their grids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import parse, run

from qat2int8 import convert
from qat2int8.ir import DataError
from qat2int8.ir.io import save_model
from qat2int8.pipelines.data import Batch
from qat2int8.pipelines.evaluation.activations import activations

NETWORK = """g (float[N,4] x) => (float[N,4] y) <
    float s = {0.05}, float t = {0.02}, uint8 z = {128}, uint8 o = {0},
    float[4,4] w = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}, float u = {0.01}, int8 n = {0}> {
    xq = QuantizeLinear (x, s, z)  xd = DequantizeLinear (xq, s, z)
    wq = QuantizeLinear (w, u, n)  wd = DequantizeLinear (wq, u, n)
    [first] a = MatMul (xd, wd)
    r = Relu (a)
    rq = QuantizeLinear (r, t, o)  rd = DequantizeLinear (rq, t, o)
    [second] b = MatMul (rd, wd)
    yq = QuantizeLinear (b, s, z)  y = DequantizeLinear (yq, s, z) }"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    source, candidate = tmp_path / "source.onnx", tmp_path / "int8.onnx"
    save_model(parse(NETWORK), source)
    convert(source).save(candidate)
    return source, candidate


def batches(*sizes: int) -> list[Batch]:
    values = np.random.default_rng(5).uniform(-8, 8, (sum(sizes), 4)).astype(np.float32)
    parts = np.split(values, np.cumsum(sizes)[:-1])
    return [Batch({"x": part}, None, 0) for part in parts]


def test_every_value_is_counted_between_the_ends(files: tuple[Path, Path]) -> None:
    data = batches(7, 3)
    first, second = activations(*files, data)
    (values,) = run(
        parse(NETWORK.replace("(float[N,4] y)", "(float[N,4] r)", 1)),
        {"x": np.concatenate([batch.inputs["x"] for batch in data])},
    )
    assert (first.tensor, first.layer) == ("r", "first")
    assert (first.lo, first.hi) == (float(values.min()), float(values.max()))
    assert sum(first.counts) == sum(second.counts) == 40
    assert first.counts == tuple(np.histogram(values, len(first.counts), (first.lo, first.hi))[0].tolist())


def test_values_that_are_all_the_same_are_one_bar(files: tuple[Path, Path]) -> None:
    first, _ = activations(*files, [Batch({"x": np.full((3, 4), 1.5, np.float32)}, None, 0)])
    assert first.lo == first.hi == pytest.approx(1.5)
    assert first.counts[0] == sum(first.counts) == 12


def test_what_lies_beyond_the_grid_by_more_than_rounding_is_counted(files: tuple[Path, Path]) -> None:
    values = np.array([[5.05, 5.1, 5.15, 6.0], [-3.0, 0.0, 1.0, 2.0]], np.float32)
    first, _ = activations(*files, [Batch({"x": values}, None, 0)])
    assert first.grid_hi == pytest.approx(5.1)
    assert first.saturated == 2


def test_the_grid_ends_are_those_of_the_converted_model(files: tuple[Path, Path]) -> None:
    first, second = activations(*files, batches(2))
    assert (first.grid_lo, first.grid_hi) == pytest.approx((0.0, 255 * 0.02))
    assert (second.grid_lo, second.grid_hi) == pytest.approx((-128 * 0.05, 127 * 0.05))


def test_batches_make_no_difference_and_layers_can_be_chosen(files: tuple[Path, Path]) -> None:
    assert activations(*files, batches(10)) == activations(*files, batches(1, 4, 5))
    (only,) = activations(*files, batches(2), ["second"])
    assert only.layer == "second"


def test_no_samples_are_an_error(files: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match="no samples"):
        activations(*files, [])
