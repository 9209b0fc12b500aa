"""Compute HardSigmoid by clipping the levels of its input."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import Fact, Model, Provenance
from qat2int8.ir.ranges import hard_sigmoid_coefficients
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.qdq_step import Step, read_step, reader_of
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class ClipHardSigmoid(Pass):
    """Replace ``DQ -> HardSigmoid -> Q`` by a Clip of the integers where both grids count the same levels.

    HardSigmoid is a line between two ends, so on a grid whose step is that line's (``complete-scales`` gives it to
    gates nobody trained) each level stands for the number that the level of the input is mapped to. All 256 are
    tried: on a trained grid none may differ, on a derived one by one level at most.

    onnxruntime has no integer kernel for HardSigmoid; the Clip of bytes costs next to nothing.
    """

    name = "clip-hard-sigmoid"
    requires = frozenset({Fact.QDQ_PLACED})
    numerics = Numerics.QUANTIZING
    per_target = True

    def run(self, model: Model, ctx: Context) -> PassResult:
        return PassResult({"clipped": sum(_clip(model, node) for node in model.nodes("HardSigmoid"))})


def _clip(model: Model, node: oir.Node) -> bool:
    source, gate = node.inputs[0], node.outputs[0]
    before = source.producer() if source is not None else None
    reader = reader_of(model, gate)
    if node.domain != "" or before is None or before.graph is not model.graph or reader is None:
        return False
    first, last = read_step(model, before), read_step(model, reader[0])
    if first is None or last is None or before.op_type != "DequantizeLinear" or not first.movable:
        return False
    integers = before.inputs[0]
    same_type = first.zero_point.dtype == last.zero_point.dtype
    if reader[0].op_type != "QuantizeLinear" or not last.movable or not same_type or integers is None:
        return False
    params = model.scales.get(gate)
    trained = params is not None and params.source >= Provenance.CALIBRATED
    levels = np.arange(first.type_levels[0], first.type_levels[1] + 1)
    wanted = _table(node, levels, first, last)
    lowest, highest = int(wanted.min()), int(wanted.max())
    if np.abs(np.clip(levels, lowest, highest) - wanted).max() > (0 if trained else 1):
        return False
    result = reader[0].outputs[0]
    bounds = [
        model.add_initializer(f"{gate.name}_level", np.asarray(bound, last.zero_point.dtype))
        for bound in (lowest, highest)
    ]
    clip = oir.node("Clip", [integers, *bounds], name=model.unique_name(f"{node.name}_Clip"))
    model.graph.insert_before(node, clip)
    clip.outputs[0].type, clip.outputs[0].shape = result.type, gate.shape
    model.replace_value(result, clip.outputs[0])
    model.remove(reader[0])
    model.remove(node)
    return True


def _table(node: oir.Node, levels: npt.NDArray[np.int64], first: Step, last: Step) -> npt.NDArray[np.int64]:
    """The level that each of ``levels`` is turned into."""
    alpha, beta = hard_sigmoid_coefficients(node)
    x = (levels - first.zero).astype(np.float32) * first.scale
    gate = np.clip(np.float32(alpha) * x + np.float32(beta), np.float32(0), np.float32(1))
    lowest, highest = last.type_levels
    turned = np.clip(np.rint(gate / last.scale) + last.zero, lowest, highest)
    return np.asarray(turned, np.int64)
