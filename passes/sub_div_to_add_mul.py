"""Write Sub and Div by constants as Add and Mul."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import Fact, Model, QuantDType, QuantParams
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class SubDivToAddMul(Pass):
    """Turn ``x - c`` into ``x + (-c)`` and ``x / c`` into ``x * (1/c)`` for float constants ``c``.

    onnxruntime has integer kernels for Add and Mul only. A product with a scalar moves on into a scale
    (``optimize-int8``). Where the result has no grid the node is left: no integer kernel could compute it, and the
    runtime recognises the division in a GELU or an attention as it is.

    A constant with a trained grid keeps it, mirrored: the levels change their sign around the zero point. A lowest
    level without a mirror image is a reason to leave the node alone, and so is the grid of a divisor, whose
    reciprocals lie on none. Divisors must be one number other than zero: reciprocals of different ones would share
    one step, too coarse for the small ones.
    """

    name = "sub-div-to-add-mul"
    requires = frozenset({Fact.CONSTANTS_LIFTED, Fact.FLOAT_WEIGHTS})
    numerics = Numerics.CLOSE

    def run(self, model: Model, ctx: Context) -> PassResult:
        counts = {"subtractions": 0, "divisions": 0}
        for node in model.nodes("Sub", "Div"):
            constant = model.constant(node.inputs[1])
            if node.domain != "" or constant is None or constant.dtype != np.float32:
                continue
            if node.outputs[0] not in model.scales:
                continue
            subtracts = node.op_type == "Sub"
            if (_negate if subtracts else _invert)(model, node, constant):
                counts["subtractions" if subtracts else "divisions"] += 1
        return PassResult(counts)


def _negate(model: Model, node: oir.Node, constant: npt.NDArray[Any]) -> bool:
    grid = model.scales.get(node.inputs[1])
    mirrored = None if grid is None else _mirrored(grid, constant)
    if grid is not None and mirrored is None:
        return False
    _rewrite(model, node, "Add", np.negative(constant), "negated", mirrored)
    return True


def _mirrored(grid: QuantParams, constant: npt.NDArray[Any]) -> QuantParams | None:
    """The grid of the negated constant; None where a level that occurs has no mirror image."""
    dtype: QuantDType = grid.dtype
    if dtype.signed and grid.symmetric:
        levels = grid.quantize(constant)
        return grid if not levels.size or int(levels.min()) >= -dtype.qmax else None
    zeros = (dtype.qmin + dtype.qmax - grid.zero_point).astype(np.int32)
    return grid.with_(zero_point=zeros, origin=f"{grid.origin}, negated")


def _invert(model: Model, node: oir.Node, constant: npt.NDArray[Any]) -> bool:
    if node.inputs[1] in model.scales or not constant.size or np.any(constant != constant.reshape(-1)[0]):
        return False
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.asarray(1.0 / constant.astype(np.float64), np.float32)
    if not np.all(np.isfinite(inverse)) or not np.all(np.abs(inverse) >= np.finfo(np.float32).tiny):
        return False
    _rewrite(model, node, "Mul", inverse, "inverse", None)
    return True


def _rewrite(
    model: Model, node: oir.Node, op_type: str, constant: npt.NDArray[Any], role: str, grid: QuantParams | None
) -> None:
    old = node.inputs[1]
    value = model.add_initializer(f"{old.name if old is not None else node.name}_{role}", constant)
    node.op_type = op_type
    node.replace_input_with(1, value)
    if grid is not None:
        model.scales.set(value, grid)
