"""Forward range analysis: which values each tensor can take, from what its producer can compute.

Two strengths of truth: without statistics a range is *sound*, no input can leave it; with them, BatchNorm
moments bound a tensor to ``mean +- sigmas * std`` per channel, which training observed and no proof covers
(Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, section 4.2.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir.interval import UNBOUNDED, Interval
from qat2int8.ir.model import ChannelMoments, Model
from qat2int8.ir.quant import Provenance, QuantParams

__all__ = ["VALUE_PRESERVING", "Ranges", "hard_sigmoid_coefficients", "moments_interval"]

VALUE_PRESERVING = frozenset(
    {
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "MaxPool",
        "GlobalMaxPool",
        "ReduceMax",
        "ReduceMin",
        "Reshape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
"""Ops whose every output element is one of the input's elements."""

_AVERAGING = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})


class Ranges:
    """Ranges of all tensors of a model's main graph, computed once in topological order.

    Args:
        model: its scale table is read: a tensor on a grid is seen by its consumers saturated to that grid.
        sigmas: how many standard deviations of BatchNorm statistics to believe in; None for sound ranges only.
    """

    def __init__(self, model: Model, sigmas: float | None = None) -> None:
        self._model = model
        self._sigmas = sigmas
        self._raw: dict[oir.Value, Interval] = {}
        self._constants: dict[oir.Value, Interval] = {}
        self._moments = dict(model.moments) if sigmas is not None else {}
        for node in model.graph:
            self._transfer(node)

    def raw(self, value: oir.Value | None) -> Interval:
        """What the producer of ``value`` can compute, before any quantizer on it."""
        if value is None:
            return UNBOUNDED
        return self._raw[value] if value in self._raw else self._constant(value)

    def seen(self, value: oir.Value | None) -> Interval:
        """What consumers of ``value`` can read: :meth:`raw`, saturated where its grid was trained to saturate.

        The scale table is read at the time of the call, so a grid written since narrows the answer.
        """
        params = self._model.scales.get(value)
        raw = self.raw(value)
        return raw if params is None else _on_grid(raw, params)

    def flag(self, value: oir.Value | None) -> bool | None:
        """A constant boolean; None where it is not known."""
        array = self._model.constant(value)
        return None if array is None or array.size != 1 else bool(array.reshape(())[()])

    def refresh(self, node: oir.Node) -> None:
        """Compute the outputs of ``node`` again, after grids of its inputs were written."""
        self._transfer(node)

    def clip_bounds(self, node: oir.Node) -> tuple[Interval, Interval]:
        """Ranges of the lower and of the upper bound of a Clip; an infinite point where it has none."""
        lower, upper = (*node.inputs, None, None)[1:3]
        lowest = node.attributes.get_float("min", -math.inf)
        highest = node.attributes.get_float("max", math.inf)
        return (
            self.seen(lower) if lower is not None else Interval(lowest, lowest),
            self.seen(upper) if upper is not None else Interval(highest, highest),
        )

    def hard_swish_source(self, product: oir.Node) -> oir.Value | None:
        """``x`` where ``product``, a Mul, computes ``x * HardSigmoid(x)`` and that is HardSwish.

        A gate on a trained grid does not count: it saturates and rounds on its own.
        """
        for gated, gate in (product.inputs, product.inputs[::-1]):
            maker = gate.producer() if gate is not None else None
            if maker is None or maker.op_type != "HardSigmoid" or maker.domain or maker.inputs[0] is not gated:
                continue
            alpha, beta = hard_sigmoid_coefficients(maker)
            params = self._model.scales.get(gate)
            plain = params is None or params.source < Provenance.CALIBRATED
            return gated if plain and math.isclose(alpha, 1.0 / 6.0, rel_tol=1e-5) and beta == 0.5 else None
        return None

    def _constant(self, value: oir.Value) -> Interval:
        if value not in self._constants:
            self._constants[value] = _hull(self._model.constant(value))
        return self._constants[value]

    def _transfer(self, node: oir.Node) -> None:
        if node.op_type == "Add" and node.domain == "" and self._moments:
            self._add_moments(node)
        rule = _TRANSFER.get(node.op_type) if node.domain == "" else None
        result = rule(self, node) if rule is not None else UNBOUNDED
        for index, output in enumerate(node.outputs):
            # Second outputs are indices and masks, but for Split, whose outputs are all alike.
            span = result if index == 0 or node.op_type == "Split" else UNBOUNDED
            moments = self._moments.get(output)
            if self._sigmas is not None and moments is not None:
                observed = moments_interval(moments, self._sigmas)
                # Statistics that contradict what is provable are of no use.
                disjoint = observed.hi < span.lo or span.hi < observed.lo
                span = span if disjoint else observed & span
            self._raw[output] = span

    def _add_moments(self, node: oir.Node) -> None:
        """A sum of two tensors with statistics has some too: channel by channel, which is tighter than adding
        two hulls. Standard deviations add up, as if the two were fully correlated."""
        left, right = (self._moments.get(value) if value is not None else None for value in node.inputs)
        if left is None or right is None or left.axis != right.axis or left.mean.shape != right.mean.shape:
            return
        # Broadcasting aligns tensors at their last axes: at unequal ranks the channels do not meet.
        ranks = {len(value.shape) for value in node.inputs if value is not None and value.shape is not None}
        if len(ranks) > 1:
            return
        origin = f"{left.origin} and {right.origin}"
        self._moments[node.outputs[0]] = ChannelMoments(
            left.mean + right.mean, left.std + right.std, left.axis, origin
        )


def moments_interval(moments: ChannelMoments, sigmas: float) -> Interval:
    """The hull over all channels of ``mean +- sigmas * std``."""
    spread = sigmas * moments.std
    return Interval(float(np.min(moments.mean - spread)), float(np.max(moments.mean + spread)))


def _hull(array: npt.NDArray[np.generic] | None) -> Interval:
    """All values of a float constant; integers are shapes and indices, whose arithmetic wraps and truncates."""
    if array is None or array.size == 0 or array.dtype.kind != "f" or np.isnan(array).any():
        return UNBOUNDED
    lo, hi = float(array.min()), float(array.max())
    # An end at the far infinity would make sums of infinities: [inf, inf] + [-inf, 0].
    return Interval(lo if lo < math.inf else -math.inf, hi if hi > -math.inf else math.inf)


def _on_grid(raw: Interval, params: QuantParams) -> Interval:
    """``raw`` after the quantizer: saturated, and rounded to a level, which may lie outside of ``raw``."""
    kept = raw.clip(params.span.lo, params.span.hi)
    steps = params.scale.astype(np.float64)
    lo = float(np.min(np.floor(kept.lo / steps) * steps))
    hi = float(np.max(np.ceil(kept.hi / steps) * steps))
    return Interval(min(lo, kept.lo), max(hi, kept.hi)).clip(params.span.lo, params.span.hi)


def hard_sigmoid_coefficients(node: oir.Node) -> tuple[float, float]:
    """(alpha, beta) of ``max(0, min(1, alpha * x + beta))``, with ONNX's defaults."""
    return node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)


def _same(ranges: Ranges, node: oir.Node) -> Interval:
    return ranges.seen(node.inputs[0])


def _dropout(ranges: Ranges, node: oir.Node) -> Interval:
    training = node.inputs[2] if len(node.inputs) > 2 else None
    flag = ranges.flag(training)
    # In training mode the survivors are scaled up.
    return ranges.seen(node.inputs[0]) if training is None or flag is False else UNBOUNDED


def _union(ranges: Ranges, node: oir.Node) -> Interval:
    spans = [ranges.seen(value) for value in node.inputs]
    return Interval(min(span.lo for span in spans), max(span.hi for span in spans))


def _average(ranges: Ranges, node: oir.Node) -> Interval:
    span = ranges.seen(node.inputs[0])
    # Padding can add zeros to the average (count_include_pad), so zero joins the range.
    return span | Interval(0.0, 0.0) if node.op_type == "AveragePool" else span


def _pad(ranges: Ranges, node: oir.Node) -> Interval:
    span = ranges.seen(node.inputs[0])
    if node.attributes.get_string("mode", "constant") != "constant":
        return span
    filler = node.inputs[2] if len(node.inputs) > 2 else None
    if filler is not None:
        return span | ranges.seen(filler)
    constant = node.attributes.get_float("value", 0.0)
    return span | Interval(constant, constant)


def _resize(ranges: Ranges, node: oir.Node) -> Interval:
    # Cubic interpolation overshoots, and extrapolation brings in a value of its own.
    plain = node.attributes.get_string("mode", "nearest") in ("nearest", "linear")
    crop = node.attributes.get_string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    return ranges.seen(node.inputs[0]) if plain and not crop else UNBOUNDED


def _clip(ranges: Ranges, node: oir.Node) -> Interval:
    span = ranges.seen(node.inputs[0])
    lower, upper = ranges.clip_bounds(node)
    # min(max(x, lower), upper): the upper bound wins where the two cross.
    return Interval(
        min(max(span.lo, lower.lo), upper.lo),
        min(max(span.hi, lower.hi), upper.hi),
    )


def _add(ranges: Ranges, node: oir.Node) -> Interval:
    return ranges.seen(node.inputs[0]) + ranges.seen(node.inputs[1])


def _sub(ranges: Ranges, node: oir.Node) -> Interval:
    return ranges.seen(node.inputs[0]) - ranges.seen(node.inputs[1])


def _mul(ranges: Ranges, node: oir.Node) -> Interval:
    source = ranges.hard_swish_source(node)
    if source is not None:
        return _dipping(ranges.seen(source), _hard_swish_at, _HARD_SWISH_VALLEY)
    if node.inputs[0] is node.inputs[1]:
        amax = ranges.seen(node.inputs[0]).amax
        return Interval(0.0, amax * amax)
    return ranges.seen(node.inputs[0]) * ranges.seen(node.inputs[1])


def _div(ranges: Ranges, node: oir.Node) -> Interval:
    divisor = ranges.seen(node.inputs[1])
    if not divisor.bounded or divisor.lo <= 0.0 <= divisor.hi:
        return UNBOUNDED
    return ranges.seen(node.inputs[0]) * Interval(1.0 / divisor.hi, 1.0 / divisor.lo)


def _max(ranges: Ranges, node: oir.Node) -> Interval:
    spans = [ranges.seen(value) for value in node.inputs]
    return Interval(max(span.lo for span in spans), max(span.hi for span in spans))


def _min(ranges: Ranges, node: oir.Node) -> Interval:
    spans = [ranges.seen(value) for value in node.inputs]
    return Interval(min(span.lo for span in spans), min(span.hi for span in spans))


def _leaky_relu(ranges: Ranges, node: oir.Node) -> Interval:
    span, alpha = ranges.seen(node.inputs[0]), node.attributes.get_float("alpha", 0.01)
    if alpha < 0.0:
        return UNBOUNDED
    negative = Interval(min(span.lo, 0.0), min(span.hi, 0.0)) * Interval(alpha, alpha)
    return negative + Interval(max(span.lo, 0.0), max(span.hi, 0.0))


def _hard_sigmoid(ranges: Ranges, node: oir.Node) -> Interval:
    alpha, beta = hard_sigmoid_coefficients(node)
    return (ranges.seen(node.inputs[0]) * Interval(alpha, alpha) + Interval(beta, beta)).clip(0.0, 1.0)


def _hard_swish(ranges: Ranges, node: oir.Node) -> Interval:
    return _dipping(ranges.seen(node.inputs[0]), _hard_swish_at, _HARD_SWISH_VALLEY)


def _hard_swish_at(x: float) -> float:
    return x * min(max(x / 6.0 + 0.5, 0.0), 1.0)


_HARD_SWISH_VALLEY = -1.5


def _gelu(ranges: Ranges, node: oir.Node) -> Interval:
    if node.attributes.get_string("approximate", "none") == "tanh":
        return _dipping(ranges.seen(node.inputs[0]), _gelu_tanh, _GELU_TANH_VALLEY)
    return _dipping(ranges.seen(node.inputs[0]), _gelu_at, _GELU_VALLEY)


def _gelu_at(x: float) -> float:
    return 0.5 * x * (1.0 + math.erf(x / math.sqrt(2.0)))


def _gelu_tanh(x: float) -> float:
    return 0.5 * x * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


_GELU_VALLEY = -0.7517915
_GELU_TANH_VALLEY = -0.7524614
"""Where the two spellings of Gelu are lowest."""


def _dipping(span: Interval, f: Callable[[float], float], valley: float) -> Interval:
    """Image of ``span`` under a function that falls until ``valley``, rises after it, and vanishes at the left."""
    at = [0.0 if end == -math.inf else (math.inf if end == math.inf else f(end)) for end in (span.lo, span.hi)]
    if span.lo <= valley <= span.hi:
        at.append(f(valley))
    return Interval(min(at), max(at))


def _logistic(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x > -700.0 else 0.0


def _monotone(f: Callable[[float], float]) -> Callable[[Ranges, oir.Node], Interval]:
    def rule(ranges: Ranges, node: oir.Node) -> Interval:
        span = ranges.seen(node.inputs[0])
        return Interval(f(span.lo), f(span.hi))

    return rule


def _abs(ranges: Ranges, node: oir.Node) -> Interval:
    span = ranges.seen(node.inputs[0])
    least = 0.0 if span.lo <= 0.0 <= span.hi else min(abs(span.lo), abs(span.hi))
    return Interval(least, span.amax)


_TRANSFER: dict[str, Callable[[Ranges, oir.Node], Interval]] = {
    **dict.fromkeys(VALUE_PRESERVING, _same),
    **dict.fromkeys(_AVERAGING, _average),
    "Abs": _abs,
    "Add": _add,
    "Clip": _clip,
    "Concat": _union,
    "Div": _div,
    "Dropout": _dropout,
    "Erf": _monotone(lambda x: math.erf(x)),
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "LeakyRelu": _leaky_relu,
    "LogSoftmax": lambda ranges, node: Interval(-math.inf, 0.0),
    "Max": _max,
    "Min": _min,
    "Mul": _mul,
    "Neg": lambda ranges, node: Interval(0.0, 0.0) - ranges.seen(node.inputs[0]),
    "Pad": _pad,
    "Relu": _monotone(lambda x: max(x, 0.0)),
    "Resize": _resize,
    "Sigmoid": _monotone(_logistic),
    "Softmax": lambda ranges, node: Interval(0.0, 1.0),
    "Sqrt": _monotone(lambda x: math.sqrt(max(x, 0.0))),
    "Sub": _sub,
    "Tanh": _monotone(math.tanh),
}
