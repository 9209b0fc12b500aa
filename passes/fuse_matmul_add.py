"""Turn MatMul and the Add of its bias into one Gemm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import Code, Diagnostic, Fact, Model, Severity
from qat2int8.passes.affine_chain import drop_grid
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.channel_affine import NotFoldable
from qat2int8.passes.registry import register
from qat2int8.passes.sole_consumer import sole_consumer


@register
@dataclass(frozen=True)
class FuseMatmulAdd(Pass):
    """MatMul with a constant matrix, then Add of a constant row: Gemm. Also Gemm without C, then Add.

    An integer Gemm carries its bias as int32; a MatMul whose bias is added in float has no integer kernel in
    onnxruntime at all. Inputs of rank 3 and more are flattened to two dimensions by a Reshape and back. The
    matrix and its grid (axis 1) stay as they are.
    """

    name = "fuse-matmul-add"
    requires = frozenset({Fact.FLOAT_WEIGHTS})
    numerics = Numerics.CLOSE

    def run(self, model: Model, ctx: Context) -> PassResult:
        notes: list[Diagnostic] = []
        counts = {"fused": 0, "flattened": 0}
        for layer in model.nodes("MatMul", "Gemm"):
            match = _match(model, layer)
            if match is None:
                continue
            try:
                leading = _leading_dims(layer, match)
                notes += drop_grid(self, model, layer.outputs[0], replaced_by=match.add.outputs[0])
                model.moments.pop(layer.outputs[0], None)
                if leading is None:
                    _fuse(model, layer, match)
                    counts["fused"] += 1
                else:
                    _fuse_flattened(model, layer, match, leading)
                    counts["flattened"] += 1
            except NotFoldable as refusal:
                reason = f"the bias added in '{match.add.name}' is not fused: {refusal.reason}"
                where = {"node": layer.name or "", "remedy": refusal.remedy}
                notes.append(self.note(Code.NOT_FUSED, reason, severity=Severity.NOTE, **where))
        return PassResult(counts, tuple(notes))


@dataclass(frozen=True, eq=False)
class _Match:
    """A layer's weight of shape (K, N), and the Add of a constant behind it."""

    weights: npt.NDArray[Any]
    columns: int
    add: oir.Node
    operand: oir.Value
    constant: npt.NDArray[Any]


def _match(model: Model, layer: oir.Node) -> _Match | None:
    weights = model.constant(layer.inputs[1])
    if weights is None or weights.ndim != 2 or weights.dtype.kind != "f":
        return None
    if len(layer.inputs) > 2 and layer.inputs[2] is not None:
        return None
    add = sole_consumer(model, layer.outputs[0])
    if add is None or add.domain or add.op_type != "Add":
        return None
    operand = add.inputs[1 if add.inputs[0] is layer.outputs[0] else 0]
    constant = model.constant(operand)
    if operand is None or constant is None:
        return None
    columns = weights.shape[0 if layer.attributes.get_int("transB", 0) else 1]
    return _Match(weights, columns, add, operand, constant)


def _leading_dims(layer: oir.Node, match: _Match) -> list[int] | None:
    """The output's dimensions before the last, the unknown one -1; None where it is two-dimensional.

    Raises:
        NotFoldable: the shapes do not allow a Gemm.
    """
    dims: list[int | oir.SymbolicDim] = [-1, -1]
    if layer.op_type == "MatMul":
        source, result = layer.inputs[0], layer.outputs[0]
        shape = source.shape if source is not None and source.shape is not None else result.shape
        if shape is None:
            raise NotFoldable("the rank of its input is not known", "run shape inference on the model")
        dims = list(shape)
    elif layer.attributes.get_float("alpha", 1.0) != 1.0:
        raise NotFoldable("an integer Gemm with a bias has to have alpha = 1")
    constant = match.constant
    row = constant.ndim == 0 or (constant.shape[-1] == constant.size)
    if len(dims) < 2 or constant.ndim > len(dims) or not row or constant.size not in (1, match.columns):
        raise NotFoldable(f"a constant of shape {list(constant.shape)} is not one number per column")
    if len(dims) == 2:
        return None
    leading = [dim if isinstance(dim, int) else -1 for dim in dims[:-1]]
    if leading.count(-1) > 1:
        raise NotFoldable(
            "more than one dimension of its input is unknown", "export the model with fixed dimensions but one"
        )
    if 0 in leading:
        raise NotFoldable("its input is empty")
    return leading


def _fuse(model: Model, layer: oir.Node, match: _Match) -> None:
    """Let the layer itself add the bias and take the place of the Add."""
    bias = _bias(model, layer, match)
    layer.op_type = "Gemm"
    layer.attributes.pop("beta", None)
    layer.resize_inputs(3)
    layer.replace_input_with(2, bias)
    model.replace_value(match.add.outputs[0], layer.outputs[0])
    model.graph.remove(match.add, safe=True)


def _fuse_flattened(model: Model, matmul: oir.Node, match: _Match, leading: list[int]) -> None:
    """Reshape, Gemm and Reshape in the place of MatMul and Add; both new tensors lie on the grids of the old."""
    source, weight, final = matmul.inputs[0], matmul.inputs[1], match.add.outputs[0]
    assert source is not None
    rows = None if -1 in leading else math.prod(leading)
    name = matmul.name or final.name
    shapes = [
        model.add_initializer(f"{name}.{role}", np.array(dims, np.int64))
        for role, dims in (("flat_shape", [-1, match.weights.shape[0]]), ("shape", [*leading, match.columns]))
    ]
    flatten = oir.node("Reshape", [source, shapes[0]], name=model.unique_name(f"{name}.flatten"))
    gemm = oir.node("Gemm", [flatten.outputs[0], weight, _bias(model, matmul, match)], name=matmul.name)
    restore = oir.node("Reshape", [gemm.outputs[0], shapes[1]], name=model.unique_name(f"{name}.restore"))
    for node in (flatten, gemm, restore):
        model.insert_before(matmul, node)
    for node, like, columns in ((flatten, source, match.weights.shape[0]), (gemm, final, match.columns)):
        output = node.outputs[0]
        output.name = model.unique_name(f"{node.name}_out")
        output.type, output.shape = final.type, oir.Shape([rows, columns])
        grid = model.scales.get(like)
        if grid is not None and not grid.per_channel:
            model.scales.set(output, grid)
    model.replace_value(final, restore.outputs[0])
    model.graph.remove([match.add, matmul], safe=True)


def _bias(model: Model, layer: oir.Node, match: _Match) -> oir.Value:
    """The constant as a vector; the same initializer where it is one already."""
    if match.operand.is_initializer() and match.constant.shape == (match.columns,):
        return match.operand
    vector = np.broadcast_to(match.constant.reshape(-1), (match.columns,)).copy()
    return model.add_initializer(f"{layer.name}.bias", vector)
