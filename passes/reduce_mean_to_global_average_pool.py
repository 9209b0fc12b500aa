"""Write the mean over a whole image as the pool it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from qat2int8.ir import Fact, Model
from qat2int8.passes.base import Context, Pass, PassResult
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class ReduceMeanToGlobalAveragePool(Pass):
    """Turn a ReduceMean over all spatial axes into GlobalAveragePool, and a Flatten where axes vanish.

    onnxruntime's CPU provider has an integer kernel for GlobalAveragePool and none for ReduceMean; in NHWC it
    takes a third of the time of the float one. Grids must not have been spread yet, so that they reach the pool.

    Only float32 tensors of a known rank of four or more, with constant axes that are exactly the spatial ones. The
    mean over the last of three axes is part of a LayerNormalization more often than of a network of Conv1d.
    """

    name = "reduce-mean-to-global-average-pool"
    requires = frozenset({Fact.CONSTANTS_LIFTED})

    def run(self, model: Model, ctx: Context) -> PassResult:
        replaced = 0
        for node in model.nodes("ReduceMean"):
            source = node.inputs[0]
            if node.domain or source is None or source.dtype is not oir.DataType.FLOAT or source.shape is None:
                continue
            rank = source.shape.rank()
            if rank > 3 and _axes(model, node, rank) == list(range(2, rank)):
                _replace(model, node, source)
                replaced += 1
        return PassResult({"replaced": replaced})


def _axes(model: Model, node: oir.Node, rank: int) -> list[int] | None:
    """The axes that are reduced, counted from the front; None where they are not known."""
    if "axes" in node.attributes:
        given = node.attributes.get_ints("axes", ())
    else:
        array = model.constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if array is None:
            return None  # all axes or none, or axes that are computed
        given = tuple(int(axis) for axis in np.atleast_1d(array))
    return sorted(axis % rank for axis in given)


def _replace(model: Model, node: oir.Node, source: oir.Value) -> None:
    result = node.outputs[0]
    pool = oir.node("GlobalAveragePool", [source], name=node.name)
    model.insert_before(node, pool)
    if node.attributes.get_int("keepdims", 1):
        model.replace_value(result, pool.outputs[0])
        model.remove(node)
        return
    pooled = pool.outputs[0]
    pooled.name, pooled.type = model.unique_name(f"{result.name}_pooled"), source.type
    assert source.shape is not None
    pooled.shape = oir.Shape([*source.shape[:2], *[1] * (source.shape.rank() - 2)])
    grid = model.scales.get(result)
    flatten = oir.node("Flatten", [pooled], {"axis": 1}, name=model.unique_name(f"{node.name}_Flatten"))
    model.insert_before(node, flatten)
    model.replace_value(result, flatten.outputs[0])
    model.remove(node)
    if grid is not None:
        model.scales.set(pooled, grid)
