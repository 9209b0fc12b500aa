"""Read a chain of sums and products as a polynomial in one tensor."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as oir

from qat2int8.ir import Model
from qat2int8.passes.pattern import maker, scalar, with_scalar

__all__ = ["Polynomial", "polynomial"]

_MAX_DEPTH = 8
_MAX_DEGREE = 6


@dataclass(frozen=True, eq=False)
class Polynomial:
    """Coefficients by power, none of them zero, and the nodes that compute it."""

    coefficients: dict[int, float]
    nodes: list[oir.Node] = field(default_factory=list)


def polynomial(model: Model, value: oir.Value | None, x: oir.Value) -> Polynomial | None:
    """``value`` as a polynomial in ``x``; None where it is none, or of a degree no activation has."""
    return _read(model, value, x, _MAX_DEPTH)


def _read(model: Model, value: oir.Value | None, x: oir.Value, depth: int) -> Polynomial | None:
    if value is x:
        return Polynomial({1: 1.0})
    if depth == 0:
        return None
    node = maker(model, value, "Add", "Mul", "Div", "Pow")
    if node is None:
        return None
    factored = with_scalar(model, node)
    if factored is not None:
        inner = _read(model, factored[0], x, depth - 1)
        return None if inner is None else _with_number(model, node, inner, factored[1])
    if node.op_type not in ("Add", "Mul"):
        return None
    left, right = (_read(model, operand, x, depth - 1) for operand in node.inputs)
    if left is None or right is None:
        return None
    combined = _sum if node.op_type == "Add" else _product
    coefficients = combined(left.coefficients, right.coefficients)
    return _checked(coefficients, [*left.nodes, *right.nodes, node])


def _with_number(model: Model, node: oir.Node, inner: Polynomial, number: float) -> Polynomial | None:
    """``inner`` plus, times, over or to the power of a constant."""
    first = scalar(model, node.inputs[0]) is None
    coefficients: dict[int, float] | None = None
    match node.op_type:
        case "Add":
            coefficients = _sum(inner.coefficients, {0: number})
        case "Mul":
            coefficients = _product(inner.coefficients, {0: number})
        case "Div" if first and number != 0.0:
            coefficients = _product(inner.coefficients, {0: 1.0 / number})
        case "Pow" if first and number in (2.0, 3.0):
            coefficients = inner.coefficients
            for _ in range(int(number) - 1):
                coefficients = _product(coefficients, inner.coefficients)
    return None if coefficients is None else _checked(coefficients, [*inner.nodes, node])


def _checked(coefficients: dict[int, float], nodes: list[oir.Node]) -> Polynomial | None:
    return Polynomial(coefficients, nodes) if max(coefficients, default=0) <= _MAX_DEGREE else None


def _sum(left: dict[int, float], right: dict[int, float]) -> dict[int, float]:
    total = {power: left.get(power, 0.0) + right.get(power, 0.0) for power in left | right}
    return {power: coefficient for power, coefficient in total.items() if coefficient != 0.0}


def _product(left: dict[int, float], right: dict[int, float]) -> dict[int, float]:
    product: dict[int, float] = {}
    for power, coefficient in left.items():
        product = _sum(product, {power + other: coefficient * factor for other, factor in right.items()})
    return product
