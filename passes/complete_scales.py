"""Find grids, without data, for the tensors nobody trained one for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from qat2int8.ir import INT8, Code, Contract, Diagnostic, Fact, Interval, Model, Provenance, QuantParams, Severity
from qat2int8.ir.ranges import Ranges, hard_sigmoid_coefficients
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.demand import Demand
from qat2int8.passes.fake_quant import stored_by
from qat2int8.passes.kernels import Kernel, kernel_of
from qat2int8.passes.registry import register
from qat2int8.passes.scale_groups import layer_inputs, moved


@register
@dataclass(frozen=True)
class CompleteScales(Pass):
    """Derive the grids that integer kernels still lack.

    A model trained in TensorRT style has fake quant on the inputs of Conv and Gemm only; a convolution whose
    result goes into a residual Add has none, and without one it runs in float. Its grid is the intersection of

    1. the demanded range: what the grids behind it can tell apart (:mod:`qat2int8.passes.demand`),
    2. the forward range: what its producer can compute (:mod:`qat2int8.ir.ranges`),
    3. what BatchNorm saw in training: ``beta +- sigmas * |gamma|`` of each channel.

    The gate of a HardSwish or of a squeeze-and-excitation block gets the levels of the tensor it is made from
    (``clip-hard-sigmoid``).

    Inputs of Conv, Gemm and MatMul are never invented: a layer without fake quant on its input was left in
    float by whoever trained it. Neither are graph outputs. What stays without a grid gets a diagnostic.

    Options:
        sigmas: how many standard deviations of BatchNorm statistics the grid must hold.
        report: whether a diagnostic says what stays without a grid; not where calibration is still to come.
    """

    name = "complete-scales"
    requires = frozenset({Fact.NO_FAKE_QUANT, Fact.PROPAGATED})
    provides = frozenset({Fact.COMPLETE_SCALES})
    invalidates = frozenset({Fact.PROPAGATED})
    numerics = Numerics.QUANTIZING

    sigmas: float = 6.0
    report: bool = True

    def run(self, model: Model, ctx: Context) -> PassResult:
        completion = _Completion(self, model, ctx)
        before = -1
        # A grid derived behind a tensor can bound it: sweep until nothing moves, rarely more than twice.
        while completion.derived > before:
            before = completion.derived
            completion.sweep()
        missing = tuple(completion.missing.values()) if self.report else ()
        return PassResult({"derived": completion.derived}, missing)


class _Completion:
    def __init__(self, owner: CompleteScales, model: Model, ctx: Context) -> None:
        self.owner = owner
        self.model = model
        self.target = ctx.target
        self.ranges = Ranges(model, owner.sigmas)
        self.demand = Demand(model, self.ranges)
        self.derived = 0
        self.missing: dict[oir.Value, Diagnostic] = {}
        self.integer: set[oir.Value] = set()
        """Tensors that an integer kernel computes."""
        self.layers = layer_inputs(model, ctx.target)

    def sweep(self) -> None:
        self.missing.clear()
        for node in self.model.nodes():
            self.ranges.refresh(node)
            kernel = kernel_of(self.model, node, self.target)
            if kernel is not None:
                self.visit(kernel)

    def visit(self, kernel: Kernel) -> None:
        scales = self.model.scales
        if kernel.rule.contract is Contract.COMPUTE:
            if not all(value in scales for value in kernel.inputs):
                return
            if kernel.weight is not None and kernel.weight not in scales:
                return
            if self.target.placement == "inputs":
                self.integer.update(kernel.node.outputs)
            if kernel.rule.float_output and kernel.output not in scales:
                return
        elif kernel.rule.contract is Contract.ELEMENTWISE and self.target.placement == "inputs":
            return  # grids that were trained will do: nothing is gained by one that nobody trained
        elif kernel.rule.contract in (Contract.ELEMENTWISE, Contract.RESIDUAL):
            if not any(value in self.integer for value in kernel.node.inputs):
                return
            if not all(self.derive(value, kernel.node) for value in kernel.inputs):
                return
        else:
            self.move(kernel)
            return
        for output in kernel.outputs:
            if self.derive(output, kernel.node):
                self.integer.add(output)

    def move(self, kernel: Kernel) -> None:
        """The outputs of data movement lie on the grid of its input."""
        if not all(value in self.integer for value in kernel.inputs):
            return
        for value in moved(kernel.node) if kernel.inputs else ():
            if value not in self.model.scales:
                if value.is_graph_output() or value in self.layers:
                    continue
                self.model.scales.set(value, self.model.scales[kernel.inputs[0]])
                self.derived += 1
            self.integer.add(value)

    def derive(self, value: oir.Value, node: oir.Node) -> bool:
        """Make sure that ``value``, which ``node`` reads or computes, has a grid; False when nothing bounds it."""
        if value in self.model.scales:
            return True
        if value.is_graph_output() or _has_wide_grid(value):
            return False
        levels = self.levels_of_input(value)
        if levels is not None:
            self.model.scales.set(value, levels)
            self.derived += 1
            return True
        reader = self.layers.get(value)
        if reader is not None:
            self.missing[value] = self._left_in_float(value, node, reader)
            return False
        demanded = self.demand.of(value)
        forward = self.ranges.raw(value)
        span = forward & demanded
        if not span.bounded:
            self.missing[value] = self._missing(value, node)
            return False
        params = self.target.grid_for(span, source=Provenance.DERIVED, origin=self._origin(value, span, demanded))
        self.model.scales.set(value, self.on_gate_levels(value, params))
        self.derived += 1
        return True

    def levels_of_input(self, value: oir.Value) -> QuantParams | None:
        """For a HardSigmoid of integers: the grid on which its result is its input's levels, clipped.

        The end of the ramp lies on a level, so that an open gate is 1 exactly.
        """
        gate = value.producer()
        if gate is None or (gate.domain, gate.op_type) != ("", "HardSigmoid"):
            return None
        source = gate.inputs[0]
        if source is None or source not in self.integer:
            return None
        lowered = self.target.lower(self.model.scales[source])
        if lowered is None or lowered.dtype.bits != self.target.activation_dtype.bits:
            return None
        alpha, beta = hard_sigmoid_coefficients(gate)
        ramp = round(1.0 / (alpha * float(lowered.scale))) if alpha > 0.0 else 0
        zero = int(lowered.zero_point) - round(beta / (alpha * float(lowered.scale))) if ramp > 0 else 0
        levels = self.target.activation_dtype
        if not _FEWEST_LEVELS <= ramp < 1 << levels.bits or not levels.qmin <= zero <= levels.qmax:
            return None
        origin = f"the levels of '{source.name}'"
        return QuantParams.make(1.0 / ramp, zero, levels, source=Provenance.DERIVED, origin=origin)

    def on_gate_levels(self, value: oir.Value, params: QuantParams) -> QuantParams:
        """``params``, a little coarser where a HardSigmoid reads the tensor: its ramp begins on a level."""
        gates = [use.node for use in value.uses() if use.node.op_type == "HardSigmoid" and use.node.domain == ""]
        alpha, beta = hard_sigmoid_coefficients(gates[0]) if gates else (0.0, 0.0)
        if alpha <= 0.0 or beta <= 0.0 or self.target.zero_point != "any":
            return params
        count = math.floor(beta / alpha / float(params.scale) + 1e-6)
        if count < 1:
            return params
        lowest = params.dtype.qmin
        step = beta / alpha / count
        zero = lowest + round(-params.interval.lo / step)
        return params.with_(scale=np.asarray(step, np.float32), zero_point=np.asarray(zero, np.int32))

    def _origin(self, value: oir.Value, span: Interval, demanded: Interval) -> str:
        ends = []
        for end, bound in (("lower", (span.lo, demanded.lo)), ("upper", (span.hi, demanded.hi))):
            ends.append(
                f"{end} end {'demanded behind it' if bound[0] == bound[1] else self._forward_origin(value)}"
            )
        return "; ".join(ends)

    def _forward_origin(self, value: oir.Value) -> str:
        moments = self.model.moments.get(value)
        return f"from {moments.origin}" if moments is not None else "from its producer's range"

    def _left_in_float(self, value: oir.Value, node: oir.Node, reader: oir.Node) -> Diagnostic:
        return self.owner.note(
            Code.SCALE_MISSING,
            f"{reader.op_type} '{reader.name}' reads this tensor and was trained without a fake quant on it",
            severity=Severity.WARNING,
            node=node.name or "",
            value=value.name or "",
            remedy="train with a fake quant on it, or give data",
        )

    def _missing(self, value: oir.Value, node: oir.Node) -> Diagnostic:
        return self.owner.note(
            Code.SCALE_MISSING,
            "nothing bounds this tensor: no fake quant, no BatchNorm statistics, no grid behind it that clamps it",
            severity=Severity.WARNING,
            node=node.name or "",
            value=value.name or "",
            remedy="train with a fake quant on it, or give data",
        )


def _has_wide_grid(value: oir.Value) -> bool:
    """Whether ``value`` was trained on more than 8 bits, which a derived grid would silently replace."""
    stored = (stored_by(use.node) for use in value.uses() if use.node.op_type == "QuantizeLinear")
    return any(dtype is not None and dtype.bitwidth > INT8.bits for dtype in stored)


_FEWEST_LEVELS = 32
"""Of a gate between 0 and 1. A coarser one would be heard; then it gets a grid of its own."""
