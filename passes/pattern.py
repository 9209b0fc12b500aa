"""Small questions that the recognition of decomposed functions asks again and again."""

from __future__ import annotations

import math
from collections.abc import Iterable

import onnx_ir as oir

from qat2int8.ir import Model, Provenance

__all__ = ["close", "is_private", "maker", "replace_by", "scalar", "with_scalar"]

_TOLERANCE = 2e-4
"""Relative; a constant that went through float16 is off by up to half of it."""


def close(number: float | None, expected: float) -> bool:
    """Whether ``number`` is ``expected``, perhaps rounded to float16."""
    return number is not None and math.isclose(number, expected, rel_tol=_TOLERANCE)


def scalar(model: Model, value: oir.Value | None) -> float | None:
    """The number in a float constant of one element, else None."""
    array = model.constant(value)
    return float(array.reshape(())) if array is not None and array.size == 1 and array.dtype.kind == "f" else None


def with_scalar(model: Model, node: oir.Node) -> tuple[oir.Value, float] | None:
    """(x, c) of a node of two inputs, one of them a constant number; None too where it makes x a larger tensor."""
    for index in (0, 1):
        constant, other = node.inputs[index], node.inputs[1 - index]
        number = scalar(model, constant)
        if number is None or other is None or constant is None or scalar(model, other) is not None:
            continue
        rank = None if constant.shape is None else constant.shape.rank()
        if rank and (other.shape is None or other.shape.rank() < rank):
            return None
        return other, number
    return None


def maker(model: Model, value: oir.Value | None, *op_types: str) -> oir.Node | None:
    """The node of the main graph, of one of ``op_types``, that computes ``value``."""
    node = value.producer() if value is not None else None
    if node is None or node.domain or node.op_type not in op_types or node.graph is not model.graph:
        return None
    return node


def is_private(model: Model, nodes: Iterable[oir.Node], result: oir.Value) -> bool:
    """Whether ``nodes`` can go, but for ``result``: nobody else reads a tensor of theirs, and none was trained on
    a grid of its own."""
    group = set(nodes)
    for node in group:
        for value in node.outputs:
            if value is result:
                continue
            grid = model.scales.get(value)
            if value.is_graph_output() or (grid is not None and grid.source >= Provenance.CALIBRATED):
                return False
            if any(use.node not in group for use in value.uses()):
                return False
    return True


def replace_by(model: Model, node: oir.Node, nodes: Iterable[oir.Node], result: oir.Value) -> None:
    """Let ``node`` compute ``result`` in the place of ``nodes``."""
    last = result.producer()
    assert last is not None
    model.insert_before(last, node)
    model.replace_value(result, node.outputs[0])
    # Reader before writer: a node goes when nobody reads it any more.
    left = list(dict.fromkeys(nodes))
    while left:
        gone = [old for old in left if not any(out.uses() for out in old.outputs)]
        assert gone, "a node of the pattern is read from outside"
        for old in gone:
            model.remove(old)
            left.remove(old)
