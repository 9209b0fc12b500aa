"""Look rows up in the integers of a table, and dequantize only those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import INT8, Fact, FloatArray, Model, Provenance, QuantParams
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class QuantizeEmbeddings(Pass):
    """``Gather(float table)`` becomes ``Gather(int8 table) -> Dequantize`` where the table was trained on a grid.

    The same numbers from a quarter of the bytes: the table is the largest tensor of many language models. Left as
    ``Dequantize -> Gather``, onnxruntime (1.31) would dequantize the whole table in every run, which for 30522x768
    numbers takes 335 times as long as the lookup. A step per row is looked up beside the row and multiplied onto
    it; a step per column moves behind the indices. Where a layer has the same table for its weight (tied
    embeddings), each of the two keeps its own integers.

    Grids of more than 8 bits, and steps per row with zero points, stay as they are.
    """

    name = "quantize-embeddings"
    requires = frozenset({Fact.QDQ_PLACED})
    numerics = Numerics.CLOSE

    def run(self, model: Model, ctx: Context) -> PassResult:
        quantized = 0
        written: dict[oir.Value, oir.Value] = {}
        for node in model.nodes("Gather"):
            table = node.inputs[0]
            grid = model.scales.get(table) if table is not None and table.is_initializer() else None
            array = model.constant(table)
            if table is None or grid is None or array is None or array.dtype != np.float32:
                continue
            params = ctx.target.lower(grid) or grid
            lookup = _lookup(node, params, array.ndim)
            if lookup is None or grid.source < Provenance.TRAINED or (table not in written and _off(array, grid)):
                continue
            if table not in written:
                written[table] = model.add_initializer(f"{table.name}_quantized", params.quantize(array))
            node.replace_input_with(0, written[table])
            _dequantize(model, node, params, lookup)
            quantized += 1
        return PassResult({"quantized": quantized})


@dataclass(frozen=True)
class _Lookup:
    """How what was looked up is dequantized: along ``axis`` of the result, or row by row of the table."""

    axis: int | None = None
    per_row: bool = False


def _lookup(node: oir.Node, params: QuantParams, rank: int) -> _Lookup | None:
    """None where there is no way to dequantize behind the Gather."""
    if params.dtype.bits > INT8.bits:
        return None
    if params.axis is None:
        return _Lookup()
    gathered, channels = node.attributes.get_int("axis", 0) % rank, params.axis % rank
    if channels == gathered:
        return _Lookup(per_row=True) if params.symmetric else None
    if channels < gathered:
        return _Lookup(channels)
    indices = node.inputs[1]
    if indices is None or indices.shape is None:
        return None
    return _Lookup(channels - 1 + indices.shape.rank())


def _off(array: npt.NDArray[Any], grid: QuantParams) -> bool:
    """Whether values lie between the levels."""
    error = np.abs(grid.dequantize(grid.quantize(array)) - array)
    return bool(error.size == 0 or error.max() > 1e-3 * float(grid.scale.min()))


def _dequantize(model: Model, node: oir.Node, params: QuantParams, lookup: _Lookup) -> None:
    """Put the nodes behind ``node`` that turn the integers it now looks up into what it looked up before."""
    rows = node.outputs[0]
    name, storage = rows.name or node.name or "rows", params.dtype.storage
    if lookup.per_row:
        table = node.inputs[0]
        assert table is not None
        assert table.shape is not None
        assert params.axis is not None
        steps = _spread(params.scale, params.axis, table.shape.rank())
        scale = model.add_initializer(f"{name}_scale", steps)
        axis = {"axis": node.attributes.get_int("axis", 0)}
        nodes = [
            oir.node("Gather", [scale, node.inputs[1]], axis, name=model.unique_name(f"{name}_scale_Gather")),
            oir.node("Cast", [rows], {"to": int(oir.DataType.FLOAT)}, name=model.unique_name(f"{name}_Cast")),
        ]
        for made, role in zip(nodes, ("scale_rows", "levels"), strict=True):
            made.outputs[0].name = model.unique_name(f"{name}_{role}")
            made.outputs[0].type = oir.TensorType(oir.DataType.FLOAT)
        nodes.append(
            oir.node("Mul", [made.outputs[0] for made in nodes[::-1]], name=model.unique_name(f"{name}_Mul"))
        )
    else:
        scale = model.add_initializer(f"{name}_scale", params.scale)
        zero_point = model.add_initializer(f"{name}_zero_point", params.zero_point.astype(params.dtype.numpy))
        attributes = {} if lookup.axis is None else {"axis": lookup.axis}
        label = model.unique_name(f"{name}_DequantizeLinear")
        nodes = [oir.node("DequantizeLinear", [rows, scale, zero_point], attributes, name=label)]
    _follow(model, node, nodes)
    rows.name, rows.type = model.unique_name(f"{name}_quantized"), oir.TensorType(storage)


def _follow(model: Model, node: oir.Node, nodes: Sequence[oir.Node]) -> None:
    """Let the last of ``nodes``, which stand behind ``node`` and read it, give its readers what they read."""
    rows, result = node.outputs[0], nodes[-1].outputs[0]
    own = [(use.node, use.idx) for use in rows.uses() if use.node in nodes]
    model.graph.insert_after(node, nodes)
    model.replace_value(rows, result)
    for reader, index in own:
        reader.replace_input_with(index, rows)
    rows.shape = None if result.shape is None else result.shape.copy()


def _spread(steps: FloatArray, axis: int, rank: int) -> FloatArray:
    """``steps`` along ``axis`` of a tensor of ``rank`` axes."""
    shape = [1] * rank
    shape[axis] = -1
    return steps.reshape(shape)
