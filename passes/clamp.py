"""Relu, Clip, Max and Min with constants: one thing, a clamp to an interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import Interval, Model

CLAMP_OPS = ("Relu", "Clip", "Max", "Min")

RELU = Interval(0.0, math.inf)
"""What a Relu clamps to."""


@dataclass(frozen=True, eq=False)
class Clamp:
    """``node`` limits ``source`` to ``span``; ``dtype`` is the numpy type of its bounds, None for a Relu."""

    node: oir.Node
    source: oir.Value
    span: Interval
    dtype: np.dtype[Any] | None

    def then(self, after: Clamp) -> Interval:
        """The one clamp that equals this one followed by ``after``."""
        return self.span.clip(after.span.lo, after.span.hi)


def read_clamp(model: Model, node: oir.Node) -> Clamp | None:
    """What a node of :data:`CLAMP_OPS` clamps to, or None where its bounds are not usable.

    Bounds have to be constant float scalars, the lower one not above the upper one.
    """
    if node.domain or node.op_type not in CLAMP_OPS:
        return None
    if node.op_type in ("Max", "Min"):
        return _of_extremum(model, node)
    source = node.inputs[0]
    if source is None:
        return None
    if node.op_type == "Relu":
        return Clamp(node, source, RELU, None)
    bounds: list[npt.NDArray[Any] | None] = []
    for value in (*node.inputs[1:3], None, None)[:2]:
        bound = None if value is None else _scalar(model, value)
        if value is not None and bound is None:
            return None
        bounds.append(bound)
    lo = -math.inf if bounds[0] is None else _open(bounds[0])
    hi = math.inf if bounds[1] is None else _open(bounds[1])
    given = [bound for bound in bounds if bound is not None]
    if not given or not lo <= hi or lo == math.inf or hi == -math.inf:
        return None
    return Clamp(node, source, Interval(lo, hi), given[0].dtype)


def write_clamp(
    model: Model, clamp: Clamp, source: oir.Value, span: Interval, dtype: np.dtype[Any] | None
) -> None:
    """Make the node of ``clamp`` limit ``source`` to ``span``: a Relu where that says it all, else a Clip."""
    node = clamp.node
    node.replace_input_with(0, source)
    node.resize_inputs(1)
    if span == RELU:
        node.op_type = "Relu"
        return
    node.op_type = "Clip"
    for index, (role, bound) in enumerate((("min", span.lo), ("max", span.hi)), start=1):
        if math.isfinite(bound):
            node.resize_inputs(index + 1)
            value = model.add_initializer(f"{node.outputs[0].name}_{role}", np.asarray(bound, dtype))
            node.replace_input_with(index, value)


def _of_extremum(model: Model, node: oir.Node) -> Clamp | None:
    if len(node.inputs) != 2:
        return None
    for source, value in (node.inputs, reversed(node.inputs)):
        bound = None if value is None else _scalar(model, value)
        if source is None or bound is None or _widens(source, bound):
            continue
        limit = _open(bound)
        if not math.isfinite(limit):
            return None
        span = Interval(lo=limit) if node.op_type == "Max" else Interval(hi=limit)
        return Clamp(node, source, span, bound.dtype)
    return None


def _scalar(model: Model, value: oir.Value) -> npt.NDArray[Any] | None:
    """The float in a one-element initializer; a Constant node is not one, it might stand behind its reader."""
    array = model.constant(value) if value.is_initializer() else None
    if array is None or array.size != 1 or array.dtype.kind != "f":
        return None
    return array


def _open(bound: npt.NDArray[Any]) -> float:
    """The bound; the largest finite number of its type means "none", as exporters write it."""
    number = float(bound.reshape(()))
    return math.copysign(math.inf, number) if abs(number) >= float(np.finfo(bound.dtype).max) else number


def _widens(source: oir.Value, bound: npt.NDArray[Any]) -> bool:
    """Whether broadcasting against ``bound`` might give the result a higher rank than ``source`` has."""
    return bound.ndim > 0 and (source.shape is None or source.shape.rank() < bound.ndim)
