"""Recognise a HardSwish that is written in primitives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as oir

from qat2int8.ir import Interval, Model
from qat2int8.ir.ranges import hard_sigmoid_coefficients
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.clamp import read_clamp
from qat2int8.passes.pattern import close, is_private, maker, replace_by, with_scalar
from qat2int8.passes.registry import register
from qat2int8.passes.sole_consumer import sole_consumer


@register
@dataclass(frozen=True)
class FuseHardSwish(Pass):
    """``x * HardSigmoid(x)`` with slope 1/6, and ``x * Clip(x + 3, 0, 6) / 6`` in any order: HardSwish.

    As one op its range is known (:mod:`qat2int8.ir.ranges`), what lies below -3 need not be told apart
    (:mod:`qat2int8.passes.demand`), and the tensor in the middle needs no grid. A chain in which a tensor has a
    trained grid, or is read by others, stays as it is. HardSwish exists from opset 14. The formula is that of
    Howard et al., "Searching for MobileNetV3", 2019.
    """

    name = "fuse-hard-swish"
    numerics = Numerics.CLOSE

    def run(self, model: Model, ctx: Context) -> PassResult:
        fused = 0
        if model.opset < _OPSET_OF_HARD_SWISH:
            return PassResult({"fused": fused})
        for node in model.nodes("HardSigmoid", "Clip"):
            for source, nodes in _gates(model, node):
                if _fuse(model, source, nodes):
                    fused += 1
                    break
        return PassResult({"fused": fused})


_OPSET_OF_HARD_SWISH = 14
_UNIT, _SIX = 1.0, 6.0


def _gates(model: Model, node: oir.Node) -> Iterator[tuple[oir.Value, list[oir.Node]]]:
    """(x, nodes) where the last of nodes computes x * HardSigmoid(x)."""
    if node.op_type == "HardSigmoid":
        alpha, beta = hard_sigmoid_coefficients(node)
        if close(alpha, 1.0 / 6.0) and close(beta, 0.5) and node.inputs[0] is not None:
            yield from _products(model, node.inputs[0], [node], _UNIT)
        return
    clamp = read_clamp(model, node)
    if clamp is None or clamp.span != Interval(0.0, _SIX):
        return
    shift = maker(model, clamp.source, "Add")
    shifted = None if shift is None else with_scalar(model, shift)
    if shift is not None and shifted is not None and close(shifted[1], 3.0):
        yield from _products(model, shifted[0], [shift, node], _SIX)


def _products(
    model: Model, x: oir.Value, nodes: list[oir.Node], divisor: float
) -> Iterator[tuple[oir.Value, list[oir.Node]]]:
    """Multiply what the last of ``nodes`` computes by x, and divide by ``divisor`` where it is not one."""
    value = nodes[-1].outputs[0]
    node = sole_consumer(model, value)
    if node is None or node.domain:
        return
    if node.op_type == "Mul" and set(node.inputs) == {value, x}:
        if divisor == _UNIT:
            yield x, [*nodes, node]
            return
        last = sole_consumer(model, node.outputs[0])
        if last is not None and _divides(model, last, node.outputs[0], divisor):
            yield x, [*nodes, node, last]
    elif divisor != _UNIT and _divides(model, node, value, divisor):
        yield from _products(model, x, [*nodes, node], _UNIT)


def _divides(model: Model, node: oir.Node, value: oir.Value, divisor: float) -> bool:
    factored = with_scalar(model, node) if not node.domain and node.op_type in ("Mul", "Div") else None
    if factored is None or factored[0] is not value:
        return False
    if node.op_type == "Mul":
        return close(factored[1], 1.0 / divisor)
    return node.inputs[0] is value and close(factored[1], divisor)


def _fuse(model: Model, source: oir.Value, nodes: list[oir.Node]) -> bool:
    result = nodes[-1].outputs[0]
    if source.dtype is not oir.DataType.FLOAT or not is_private(model, nodes, result):
        return False
    replace_by(model, oir.node("HardSwish", [source], name=nodes[-1].name), nodes, result)
    return True
