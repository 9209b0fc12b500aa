"""Read the grids that training wrote onto the nodes themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as oir

from qat2int8.ir import INT8, Fact, InvalidModel, Model, QuantParams
from qat2int8.passes.base import Context, Pass, PassResult
from qat2int8.passes.registry import register

KEY = "out_threshold"


@register
@dataclass(frozen=True)
class GatherOutputScales(Pass):
    """Record int8 grids from ``out_threshold``, the largest magnitude a node's outputs took in training.

    It is an attribute (on nodes of custom domains) or an entry of the node's metadata; a threshold t means the
    symmetric int8 grid with scale t / 127, and 0 that nothing was observed. A tensor that a quantizer reads or
    writes, or that has a grid already, gets none: a fake quant is the better witness.

    Raises:
        InvalidModel: a threshold is not a number, is negative or infinite.
    """

    name = "gather-output-scales"
    requires = frozenset({Fact.CONSTANTS_LIFTED})
    provides = frozenset({Fact.OUTPUT_SCALES})

    def run(self, model: Model, ctx: Context) -> PassResult:
        thresholds = {node: _threshold(node) for node in model.nodes()}
        if not any(thresholds.values()):
            return PassResult({"gathered": 0})
        settled = {
            value
            for node in thresholds
            if node.op_type in ("QuantizeLinear", "DequantizeLinear")
            for value in (*node.inputs[:1], *node.outputs)
        }
        gathered = 0
        for node, threshold in thresholds.items():
            if not threshold:
                continue
            grid = _grid(node, threshold)
            for index, output in enumerate(node.outputs):
                if output in settled or output in model.scales or not _is_float(model, node, index):
                    continue
                model.scales.set(output, grid)
                gathered += 1
        return PassResult({"gathered": gathered})


def _grid(node: oir.Node, threshold: float) -> QuantParams:
    try:
        return QuantParams.make(np.float32(threshold / INT8.qmax), dtype=INT8, origin=f"{KEY} of '{node.name}'")
    except InvalidModel as error:
        raise InvalidModel(error.what, where=_where(node), remedy="train it again or remove it") from error


def _threshold(node: oir.Node) -> float:
    """The threshold of a node; 0.0 where it has none."""
    attribute = node.attributes.get(KEY)
    value = attribute.value if attribute is not None else node.metadata_props.get(KEY, 0.0)
    try:
        threshold = float(value)
    except (TypeError, ValueError):
        threshold = math.nan
    if not math.isfinite(threshold) or threshold < 0:
        raise InvalidModel(
            f"{KEY} is {value!r}, not a magnitude", where=_where(node), remedy="train it again or remove it"
        )
    return threshold


def _where(node: oir.Node) -> str:
    return f"{node.op_type} '{node.name}' [{node.outputs[0].name}]"


def _is_float(model: Model, node: oir.Node, index: int) -> bool:
    """Whether an output carries float32; where no type is recorded, whether its operator can produce it."""
    output = node.outputs[index]
    if not output.name:
        return False
    if output.dtype is not None:
        return output.dtype is oir.DataType.FLOAT
    version = model.ir.opset_imports.get(node.domain, 1)
    if not onnx.defs.has(node.op_type, version, node.domain):
        return True
    schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    formal = schema.outputs[min(index, len(schema.outputs) - 1)]
    return "tensor(float)" in formal.types
