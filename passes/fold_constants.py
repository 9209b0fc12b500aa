"""Compute at conversion time what depends on nothing but constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import Fact, Model
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.one_node import evaluate
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace nodes whose inputs are all constants by initializers.

    Exporters compute zero points as ``ConstantOfShape -> Cast`` and weights as ``Mul(weight, factor)`` or
    ``Transpose(weight)``. Quantize and Dequantize are left: what they say about grids is read by other passes.
    Evaluated by the reference implementation of ONNX, one node at a time.

    Options:
        size_limit: largest result, in elements, that is folded.
    """

    name = "fold-constants"
    requires = frozenset({Fact.CONSTANTS_LIFTED})
    numerics = Numerics.CLOSE

    size_limit: int = 1 << 26

    def run(self, model: Model, ctx: Context) -> PassResult:
        folded = 0
        for node in model.nodes():
            results = self._results(model, node)
            if results is None:
                continue
            for output, result in zip(node.outputs, results, strict=True):
                name = output.name or node.name or "folded"
                output.name = None
                constant = model.add_initializer(name, result)
                constant.name = name
                output.replace_all_uses_with(constant)
            model.remove(node)
            folded += 1
        return PassResult({"folded": folded})

    def _results(self, model: Model, node: oir.Node) -> list[npt.NDArray[Any]] | None:
        if node.domain != "" or node.op_type in _KEPT or any(out.is_graph_output() for out in node.outputs):
            return None
        if not node.inputs or any(isinstance(a.value, oir.Graph) for a in node.attributes.values()):
            return None
        arrays: dict[str, npt.NDArray[Any]] = {}
        for value in node.inputs:
            if value is None:
                continue
            array = model.constant(value)
            if array is None:
                return None
            arrays[value.name or ""] = array
        if node.op_type in _GROWING and not self._fits(node, arrays):
            return None
        return evaluate(node, arrays, model.opset)

    def _fits(self, node: oir.Node, arrays: dict[str, npt.NDArray[Any]]) -> bool:
        shape = arrays[node.inputs[-1].name or ""] if node.inputs[-1] is not None else np.zeros(0)
        return float(np.prod(np.abs(shape.astype(np.float64)))) <= self.size_limit


_KEPT = frozenset({"Constant", "DequantizeLinear", "DynamicQuantizeLinear", "Identity", "QuantizeLinear"}) | {
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}

_GROWING = frozenset({"ConstantOfShape", "Expand", "Tile"})
