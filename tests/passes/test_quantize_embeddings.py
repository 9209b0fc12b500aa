"""Rows are looked up in the integers of a table that was trained on a grid."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from arrays import model_of
from support import TARGET, apply, check_pass, run

from qat2int8.ir import INT8, INT16, UINT8, Model, Provenance, QuantParams
from qat2int8.passes import Context
from qat2int8.passes.quantize_embeddings import QuantizeEmbeddings

RNG = np.random.default_rng(4)
IDS = {"i": np.array([[3, 0, 3], [1, 2, 0]], np.int64)}


def table_on(grid: QuantParams, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    levels = RNG.integers(grid.dtype.qmin, grid.dtype.qmax + 1, shape).astype(grid.dtype.numpy)
    return np.asarray(grid.dequantize(levels), np.float32)


def lookup(grid: QuantParams, axis: int = 0, shape: str = "4, 5", extra: str = "") -> Model:
    dims = tuple(int(dim) for dim in shape.split(","))
    result = [str(dim) for dim in (*dims[:axis], 2, 3, *dims[axis + 1 :])]
    text = (
        f"g (int64[2, 3] i, float[{shape}] t) => (float[{', '.join(result)}] y{extra})"
        f" {{ [look] y = Gather <axis = {axis}> (t, i) }}"
    )
    return model_of(text, {"t": table_on(grid, dims)}, {"t": grid})


def test_a_table_with_one_step() -> None:
    grid = QuantParams.make(0.5, 0, INT8)
    text = "g (int64[2] i) => (float[2, 2] y) <float[2, 2] t = {-64, 0.5, 1, 63.5}"
    check_pass(
        QuantizeEmbeddings(),
        f"{text}> {{ [look] y = Gather (t, i) }}",
        text + ", uint8[2, 2] t_quantized = {0, 129, 130, 255}, float y_scale = {0.5},"
        " uint8 y_zero_point = {128}> { [look] y_quantized = Gather (t_quantized, i)"
        " [y_DequantizeLinear] y = DequantizeLinear (y_quantized, y_scale, y_zero_point) }",
        scales={"t": grid},
    )


GRIDS = {
    "one step": QuantParams.make(0.1, 0, INT8),
    "off centre": QuantParams.make(0.1, 7, UINT8),
    "per row": QuantParams.make([0.1, 0.2, 0.3, 0.4], 0, INT8, axis=0),
    "per column": QuantParams.make([0.1, 0.2, 0.3, 0.4, 0.5], [1, 2, 3, 4, 5], INT8, axis=1),
}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", GRIDS)
def test_the_same_rows_come_out_bit_for_bit(name: str, axis: int) -> None:
    model = lookup(GRIDS[name], axis)
    expected = run(model, IDS)[0]
    per_row = GRIDS[name].axis == axis
    result = apply(QuantizeEmbeddings(), model, Context(TARGET))
    if per_row and not GRIDS[name].symmetric:
        assert not result.modified
        return
    assert result.counts["quantized"] == 1
    table = model.constant(model.graph[0].inputs[0])
    assert table is not None
    assert table.dtype == (np.uint8 if name in ("one step", "off centre") else np.int8)
    assert [node.op_type for node in model.graph][1:] == (
        ["Gather", "Cast", "Mul"] if per_row else ["DequantizeLinear"]
    )
    np.testing.assert_array_equal(run(model, IDS)[0], expected)


@pytest.mark.parametrize(("axis", "rank"), [(0, 3), (1, 3), (2, 3)])
def test_tables_of_three_axes(axis: int, rank: int) -> None:
    shape = [4] * rank
    for channels in range(rank):
        grid = QuantParams.make([0.1, 0.2, 0.3, 0.4], 0, INT8, axis=channels)
        model = lookup(grid, axis, ", ".join(str(dim) for dim in shape))
        expected = run(model, IDS)[0]
        assert apply(QuantizeEmbeddings(), model).modified
        np.testing.assert_array_equal(run(model, IDS)[0], expected)


def test_two_lookups_share_the_integers() -> None:
    text = """g (int64[2, 3] i, float[4, 5] t) => (float[2, 3, 5] y, float[2, 3, 5] z)
              { y = Gather (t, i) z = Gather (t, i) }"""
    grid = GRIDS["one step"]
    model = model_of(text, {"t": table_on(grid, (4, 5))}, {"t": grid})
    expected = run(model, IDS)
    assert apply(QuantizeEmbeddings(), model).counts["quantized"] == 2
    assert len({node.inputs[0] for node in model.graph if node.op_type == "Gather"}) == 1
    for before, after in zip(expected, run(model, IDS), strict=True):
        np.testing.assert_array_equal(after, before)


def test_the_grid_of_the_rows_goes_with_them() -> None:
    model = lookup(GRIDS["one step"])
    model.scales.set(model.values()["y"], GRIDS["one step"])
    apply(QuantizeEmbeddings(), model)
    assert model.scales[model.graph.outputs[0]] is GRIDS["one step"]


def test_what_cannot_be_looked_up_in_bytes_stays() -> None:
    derived = GRIDS["one step"].with_(source=Provenance.DERIVED)
    for grid in (derived, QuantParams.make(0.1, 0, INT16)):
        assert not apply(QuantizeEmbeddings(), lookup(grid)).modified
    between = lookup(GRIDS["one step"])
    between.scales.set(between.values()["t"], QuantParams.make(0.07, 0, INT8))
    assert not apply(QuantizeEmbeddings(), between).modified
    unknown = lookup(GRIDS["one step"])
    unknown.scales.discard(unknown.values()["t"])
    assert not apply(QuantizeEmbeddings(), unknown).modified
