"""Find grids, without data, for the tensors nobody trained one for."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as oir

from qat2int8.ir import Code, Contract, Diagnostic, Fact, Interval, Model, Provenance, Severity
from qat2int8.ir.ranges import Ranges
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.demand import Demand
from qat2int8.passes.kernels import Kernel, kernel_of
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class CompleteScales(Pass):
    """Derive the grids that integer kernels still lack.

    A model trained in TensorRT style has fake quant on the inputs of Conv and Gemm only; a convolution whose
    result goes into a residual Add has none, and without one it runs in float. Its grid is the intersection of

    1. the demanded range: what the grids behind it can tell apart (:mod:`qat2int8.passes.demand`),
    2. the forward range: what its producer can compute (:mod:`qat2int8.ir.ranges`),
    3. what BatchNorm saw in training: ``beta +- sigmas * |gamma|`` of each channel.

    Inputs of Conv, Gemm and MatMul are never invented: a layer without fake quant on its input was left in
    float by whoever trained it. Neither are graph outputs. What stays without a grid gets a diagnostic.

    Options:
        sigmas: how many standard deviations of BatchNorm statistics the grid must hold.
    """

    name = "complete-scales"
    requires = frozenset({Fact.NO_FAKE_QUANT, Fact.PROPAGATED})
    provides = frozenset({Fact.COMPLETE_SCALES})
    invalidates = frozenset({Fact.PROPAGATED})
    numerics = Numerics.QUANTIZING

    sigmas: float = 6.0

    def run(self, model: Model, ctx: Context) -> PassResult:
        completion = _Completion(self, model, ctx)
        for node in model.nodes():
            kernel = kernel_of(model, node, ctx.target)
            if kernel is not None:
                completion.visit(kernel)
        return PassResult({"derived": completion.derived}, tuple(completion.diagnostics))


class _Completion:
    def __init__(self, owner: CompleteScales, model: Model, ctx: Context) -> None:
        self.owner = owner
        self.model = model
        self.target = ctx.target
        self.ranges = Ranges(model, owner.sigmas)
        self.demand = Demand(model, self.ranges)
        self.derived = 0
        self.diagnostics: list[Diagnostic] = []
        self.integer: set[oir.Value] = set()
        """Tensors that an integer kernel computes."""

    def visit(self, kernel: Kernel) -> None:
        scales = self.model.scales
        if kernel.rule.contract is Contract.COMPUTE:
            if not all(value in scales for value in kernel.inputs):
                return
            if kernel.weight is not None and kernel.weight not in scales:
                return
            if kernel.rule.float_output and kernel.output not in scales:
                return
        elif kernel.rule.contract is Contract.ELEMENTWISE:
            if not any(value in self.integer for value in kernel.inputs):
                return
            if not all(self.derive(value, kernel.node) for value in kernel.inputs):
                return
        elif not any(value in self.integer for value in kernel.inputs):
            return
        if self.derive(kernel.output, kernel.node):
            self.integer.add(kernel.output)

    def derive(self, value: oir.Value, node: oir.Node) -> bool:
        """Make sure that ``value``, which ``node`` reads or computes, has a grid; False when nothing bounds it."""
        if value in self.model.scales:
            return True
        if value.is_graph_output():
            return False
        demanded = self.demand.of(value)
        forward = self.ranges.raw(value)
        span = forward & demanded
        if not span.bounded:
            self.diagnostics.append(self._missing(value, node))
            return False
        params = self.target.grid_for(span, source=Provenance.DERIVED, origin=self._origin(value, span, demanded))
        self.model.scales.set(value, params)
        self.derived += 1
        return True

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

    def _missing(self, value: oir.Value, node: oir.Node) -> Diagnostic:
        return self.owner.note(
            Code.SCALE_MISSING,
            "nothing bounds this tensor: no fake quant, no BatchNorm statistics, no grid behind it that clamps it",
            severity=Severity.WARNING,
            node=node.name or "",
            value=value.name or "",
            remedy="train with a fake quant on it",
        )
