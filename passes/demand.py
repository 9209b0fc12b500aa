"""Backward range analysis: which part of a tensor's range can still be told apart at the grids behind it.

For ``y = Q(Relu(c + r))`` with ``r`` in ``[0, a]`` and a grid of ``y`` that ends at ``R``, values of ``c``
outside ``[-a, R]`` all give the same ``y``. So ``[-a, R]`` is a sound range for the grid of ``c`` although
nobody ever observed ``c``. Each rule below answers, for one consumer: clamping the input to which interval
leaves the output, clamped to what is demanded of it, as it is?
"""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as oir

from qat2int8.ir import UNBOUNDED, Interval, Model
from qat2int8.ir.ranges import Ranges, hard_sigmoid_coefficients
from qat2int8.passes.scale_groups import is_movement

__all__ = ["Demand"]

_MAX_DEPTH = 12
_MAX_VISITS = 512
"""Grids are rarely more than a few nodes away; beyond that the search gives up, which is sound. The second
bound keeps a question from walking every path of a densely connected graph."""


class Demand:
    """Answers what is demanded of a tensor, reading scales and ranges at the time of the question.

    Args:
        model: the model; its scale table says where the search ends.
        ranges: forward ranges of ``model``, for the other operands of Add and Mul.
    """

    def __init__(self, model: Model, ranges: Ranges) -> None:
        self.model = model
        self.ranges = ranges
        self._visits = 0

    def of(self, value: oir.Value) -> Interval:
        """The interval ``value`` may be clamped to without any grid behind it noticing.

        A grid that ``value`` has itself is not looked at. Unbounded where a consumer tells all values apart.
        """
        self._visits = 0
        return self._behind(value, _MAX_DEPTH)

    def _behind(self, value: oir.Value, depth: int) -> Interval:
        self._visits += 1
        if value.is_graph_output() or depth == 0 or self._visits > _MAX_VISITS:
            return UNBOUNDED
        hull: Interval | None = None
        for use in value.uses():
            rule = self._rule(use.node)
            span = UNBOUNDED if rule is None else rule(self, value, use.node, use.idx, depth - 1)
            hull = span if hull is None else hull | span
            if hull == UNBOUNDED:
                break
        return hull or UNBOUNDED

    def at(self, value: oir.Value, depth: int) -> Interval:
        """Like :meth:`of`, but a grid of ``value`` itself answers at once: its quantizer clamps there."""
        params = self.model.scales.get(value)
        return params.span if params is not None else self._behind(value, depth)

    def _rule(self, node: oir.Node) -> _Rule | None:
        if node.graph is not self.model.graph or node.domain != "":
            return None
        if is_movement(self.model, node):
            return _movement
        return _RULES.get(node.op_type)


_Rule = Callable[[Demand, oir.Value, oir.Node, int, int], Interval]


def _movement(demand: Demand, value: oir.Value, node: oir.Node, idx: int, depth: int) -> Interval:
    if idx != 0:
        return UNBOUNDED
    outputs = node.outputs if node.op_type == "Split" else node.outputs[:1]
    hull: Interval | None = None
    for output in outputs:
        # Nobody asks anything of an output that nobody reads.
        if output.uses() or output.is_graph_output():
            span = demand.at(output, depth)
            hull = span if hull is None else hull | span
    return hull or UNBOUNDED


def _concat(demand: Demand, value: oir.Value, node: oir.Node, idx: int, depth: int) -> Interval:
    return demand.at(node.outputs[0], depth)


def _relu(demand: Demand, value: oir.Value, node: oir.Node, idx: int, depth: int) -> Interval:
    span = demand.at(node.outputs[0], depth)
    return Interval(max(span.lo, 0.0), max(span.hi, 0.0))


def _clip(demand: Demand, value: oir.Value, node: oir.Node, idx: int, depth: int) -> Interval:
    if idx != 0:
        return UNBOUNDED
    span = demand.at(node.outputs[0], depth)
    lower, upper = demand.ranges.clip_bounds(node)
    return Interval(lower.lo, upper.hi) & span if lower.lo <= upper.hi else UNBOUNDED


def _add(demand: Demand, value: oir.Value, node: oir.Node, idx: int, depth: int) -> Interval:
    other = node.inputs[1 - idx]
    if other is value:
        return UNBOUNDED
    return _ordered(demand.at(node.outputs[0], depth), demand.ranges.seen(other))


def _ordered(span: Interval, other: Interval) -> Interval:
    """What ``x`` may be clamped to when ``x + other`` is clamped to ``span``."""
    return Interval(span.lo - other.hi, span.hi - other.lo)


def _sub(demand: Demand, value: oir.Value, node: oir.Node, idx: int, depth: int) -> Interval:
    other = node.inputs[1 - idx]
    if other is value:
        return UNBOUNDED
    span, against = demand.at(node.outputs[0], depth), demand.ranges.seen(other)
    if idx == 0:
        return _ordered(span, Interval(-against.hi, -against.lo))
    return _ordered(Interval(-span.hi, -span.lo), Interval(-against.hi, -against.lo))


def _mul(demand: Demand, value: oir.Value, node: oir.Node, idx: int, depth: int) -> Interval:
    other = node.inputs[1 - idx]
    if other is None or other is value:
        return UNBOUNDED
    if _is_sigmoid_of(demand.model, other, value):
        return _silu(demand, node, depth)
    if _is_hard_sigmoid_of(demand.model, other, value):
        return _hard_swish(demand, value, node, idx, depth)
    return _scaled(demand.at(node.outputs[0], depth), demand.ranges.seen(other))


def _scaled(span: Interval, factor: Interval) -> Interval:
    """What ``x`` may be clamped to when ``x * factor`` is clamped to ``span``; needs a factor away from zero."""
    if factor.hi < 0.0:
        span, factor = Interval(-span.hi, -span.lo), Interval(-factor.hi, -factor.lo)
    if factor.lo <= 0.0 or not factor.bounded:
        return UNBOUNDED
    return Interval(
        span.lo / (factor.lo if span.lo <= 0.0 else factor.hi),
        span.hi / (factor.lo if span.hi >= 0.0 else factor.hi),
    )


def _div(demand: Demand, value: oir.Value, node: oir.Node, idx: int, depth: int) -> Interval:
    divisor = demand.ranges.seen(node.inputs[1])
    if idx != 0 or not divisor.bounded or divisor.lo <= 0.0:
        return UNBOUNDED
    return _scaled(demand.at(node.outputs[0], depth), Interval(1.0 / divisor.hi, 1.0 / divisor.lo))


def _neg(demand: Demand, value: oir.Value, node: oir.Node, idx: int, depth: int) -> Interval:
    span = demand.at(node.outputs[0], depth)
    return Interval(-span.hi, -span.lo)


def _leaky_relu(demand: Demand, value: oir.Value, node: oir.Node, idx: int, depth: int) -> Interval:
    alpha = node.attributes.get_float("alpha", 0.01)
    if alpha <= 0.0:
        return UNBOUNDED
    span = demand.at(node.outputs[0], depth)
    return Interval(*(end / alpha if end < 0.0 else end for end in (span.lo, span.hi)))


def _hard_sigmoid(demand: Demand, value: oir.Value, node: oir.Node, idx: int, depth: int) -> Interval:
    product = _hard_swish_product(demand.model, value, node)
    if product is not None:
        return _hard_swish(demand, value, product, idx, depth)
    alpha, beta = hard_sigmoid_coefficients(node)
    if alpha <= 0.0:
        return UNBOUNDED
    span = demand.at(node.outputs[0], depth).clip(0.0, 1.0)
    return Interval((span.lo - beta) / alpha, (span.hi - beta) / alpha)


def _hard_swish(demand: Demand, value: oir.Value, node: oir.Node, idx: int, depth: int) -> Interval:
    top = demand.at(node.outputs[0], depth).hi
    if top == math.inf:
        return Interval(-3.0, math.inf)
    # Rising from x = 0 on: x * (x + 3) / 6 up to 3, the identity after it.
    top = max(top, 0.0)
    return Interval(-3.0, top if top >= 3.0 else (math.sqrt(9.0 + 24.0 * top) - 3.0) / 2.0)


def _sigmoid(demand: Demand, value: oir.Value, node: oir.Node, idx: int, depth: int) -> Interval:
    product = _silu_product(demand.model, value, node)
    if product is not None:
        return _silu(demand, product, depth)
    half = _half_step(demand.model, node.outputs[0])
    if half is None:
        return UNBOUNDED
    # Clamping where the output is within half a step of its limits moves it by at most one level.
    span = demand.at(node.outputs[0], depth).clip(half, 1.0 - half)
    return Interval(*(math.log(end / (1.0 - end)) for end in (span.lo, span.hi)))


def _silu(demand: Demand, node: oir.Node, depth: int) -> Interval:
    """Of ``x`` in ``x * Sigmoid(x)``: cut where the output stays within half a step of zero."""
    half = _half_step(demand.model, node.outputs[0])
    if half is None:
        return UNBOUNDED
    top = max(demand.at(node.outputs[0], depth).hi, 0.0)
    lo = -_bisect(lambda x: x / (1.0 + math.exp(x)) <= half, _SILU_VALLEY, 60.0)
    # x - SiLU(x) never exceeds 0.2785 on the positive side.
    hi = _bisect(lambda x: x / (1.0 + math.exp(-x)) >= top, 0.0, top + 0.3)
    return Interval(lo, hi)


_SILU_VALLEY = 1.2784645427610738
"""SiLU is lowest at minus this, and rises towards zero below it."""


def _bisect(holds: Callable[[float], bool], lo: float, hi: float) -> float:
    """A point of [lo, hi] at or just above the one from which on a monotone condition holds, as in ``hi``."""
    for _ in range(_BISECTIONS):
        middle = (lo + hi) / 2.0
        lo, hi = (lo, middle) if holds(middle) else (middle, hi)
    return hi


_BISECTIONS = 60
"""More halvings than a double has bits; a width to reach would never be reached far from zero."""


def _half_step(model: Model, value: oir.Value) -> float | None:
    """Half a step of the grid of ``value``; None without one, and for steps that float32 cannot resolve at 1."""
    params = model.scales.get(value)
    if params is None or params.per_channel or float(params.scale) < _FINEST:
        return None
    return min(float(params.scale) / 2.0, 0.25)


_FINEST = 1e-6


def _gate_of(model: Model, gate: oir.Value, value: oir.Value, op_type: str) -> oir.Node | None:
    """The ``op_type`` node that makes ``gate`` of ``value``.

    A gate on a grid of its own does not count: rounded and saturated, it is not the function the rules invert.
    """
    producer = gate.producer()
    if producer is None or producer.op_type != op_type or producer.domain != "" or gate in model.scales:
        return None
    return producer if producer.inputs[0] is value else None


def _is_sigmoid_of(model: Model, gate: oir.Value, value: oir.Value) -> bool:
    return _gate_of(model, gate, value, "Sigmoid") is not None


def _is_hard_sigmoid_of(model: Model, gate: oir.Value, value: oir.Value) -> bool:
    producer = _gate_of(model, gate, value, "HardSigmoid")
    if producer is None:
        return False
    alpha, beta = hard_sigmoid_coefficients(producer)
    return math.isclose(alpha, 1.0 / 6.0, rel_tol=1e-5) and beta == 0.5


def _silu_product(model: Model, value: oir.Value, sigmoid: oir.Node) -> oir.Node | None:
    """The Mul that makes SiLU of this Sigmoid, if the gate is read by nothing else."""
    return _gated_product(value, sigmoid) if _is_sigmoid_of(model, sigmoid.outputs[0], value) else None


def _hard_swish_product(model: Model, value: oir.Value, hard_sigmoid: oir.Node) -> oir.Node | None:
    gate = hard_sigmoid.outputs[0]
    return _gated_product(value, hard_sigmoid) if _is_hard_sigmoid_of(model, gate, value) else None


def _gated_product(value: oir.Value, gate_node: oir.Node) -> oir.Node | None:
    gate = gate_node.outputs[0]
    uses = list(gate.uses())
    if len(uses) != 1 or gate.is_graph_output():
        return None
    product = uses[0].node
    if product.op_type != "Mul" or product.domain != "" or product.graph is not gate_node.graph:
        return None
    return product if product.inputs[1 - uses[0].idx] is value else None


def _max(demand: Demand, value: oir.Value, node: oir.Node, idx: int, depth: int) -> Interval:
    span = demand.at(node.outputs[0], depth)
    floor = max((demand.ranges.seen(v).lo for v in node.inputs if v is not value), default=-math.inf)
    return Interval(max(span.lo, floor), max(span.hi, floor))


def _min(demand: Demand, value: oir.Value, node: oir.Node, idx: int, depth: int) -> Interval:
    span = demand.at(node.outputs[0], depth)
    ceiling = min((demand.ranges.seen(v).hi for v in node.inputs if v is not value), default=math.inf)
    return Interval(min(span.lo, ceiling), min(span.hi, ceiling))


_RULES: dict[str, _Rule] = {
    "Add": _add,
    "Clip": _clip,
    "Concat": _concat,
    "Div": _div,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "LeakyRelu": _leaky_relu,
    "Max": _max,
    "Min": _min,
    "Mul": _mul,
    "Neg": _neg,
    "Relu": _relu,
    "Sigmoid": _sigmoid,
    "Sub": _sub,
}
