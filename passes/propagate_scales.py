"""Carry known grids to the tensors that hold the same numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import networkx as nx
import numpy as np
import onnx_ir as oir

from qat2int8.ir import UINT8, Code, Diagnostic, Fact, Interval, Model, Provenance, QuantDType, QuantParams, Target
from qat2int8.ir.ranges import Ranges
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.registry import register
from qat2int8.passes.scale_groups import AxisMap, Tie, layer_inputs, ties_of


@register
@dataclass(frozen=True)
class PropagateScales(Pass):
    """Give tensors that must share a grid the same one.

    Tensors tied by MaxPool, Reshape, Flatten, Transpose, Squeeze, Unsqueeze, Slice, Split, Gather, Pad with
    zeros, nearest Resize and the like form groups: connected components, so no order of nodes matters. The
    strongest grid of a group wins, of equally strong ones the widest; a trained grid that loses is reported.
    Where a tensor is also read by something else, or by movement that ends on no grid, the grids behind it do
    not speak for all of its elements: it passes its own grid on and takes none.

    After that, in one sweep each way: inputs of a Concat that have no grid take its output's, and outputs of
    average pools, Relu, Clip and Concat take their input's. An average pool's output says nothing about its
    input's peaks, so nothing flows back through it (PaddlePaddle's ``_propagate_scales`` does that and clips).
    """

    name = "propagate-scales"
    requires = frozenset({Fact.NO_FAKE_QUANT})
    provides = frozenset({Fact.PROPAGATED})
    numerics = Numerics.QUANTIZING

    def run(self, model: Model, ctx: Context) -> PassResult:
        written = 0
        diagnostics: list[Diagnostic] = []
        while True:
            spread = _Spread(self, model, ctx.target)
            spread.sweep()
            written += spread.written
            diagnostics += spread.diagnostics
            # What a Concat gave to its inputs may complete what is known of a tensor further up.
            if not spread.written:
                return PassResult({"propagated": written}, tuple(diagnostics))


class _Spread:
    def __init__(self, owner: PropagateScales, model: Model, target: Target) -> None:
        self.owner = owner
        self.from_zero = target.zero_point == "any"
        self.layers = layer_inputs(model, target)
        self.ranges = Ranges(model)
        self.scales = model.scales
        self.model = model
        self.written = 0
        self.diagnostics: list[Diagnostic] = []
        self.graph: nx.Graph[oir.Value] = nx.Graph()
        self.one_way: dict[oir.Node, list[Tie]] = {}
        for tie in ties_of(model):
            if tie.mutual:
                self.graph.add_edge(tie.source, tie.target, tie=tie)
            else:
                self.one_way.setdefault(tie.node, []).append(tie)

    def sweep(self) -> None:
        self.unify_groups()
        for node in reversed(list(self.model.nodes("Concat"))):
            self.concat_backward(node)
        for node in self.model.nodes():
            self.forward(node)

    def unify_groups(self) -> None:
        for members in nx.connected_components(self.graph):
            known = [value for value in members if value in self.scales]
            # The whole grid is the key, so that neither names nor the order of a set matter.
            known.sort(key=lambda value: _strength(self.scales[value]), reverse=True)
            reached: set[oir.Value] = set()
            for root in known:
                # The strongest reaches all, unless it has a channel axis that a Reshape on the way loses.
                if root not in reached:
                    self.fill(root, reached)

    def fill(self, root: oir.Value, reached: set[oir.Value]) -> None:
        """Spread the grid of ``root`` over its group, remapping a channel axis on the way.

        What travels is that grid and not what stands on the way: an equal one that nobody trained stays there, and
        would lend its origin to all behind it.
        """
        reached.add(root)
        frontier = [(root, self.scales[root])]
        while frontier:
            here, carried = frontier.pop()
            for there in self.graph.neighbors(here):
                tie: Tie = self.graph.edges[here, there]["tie"]
                params = _across(carried, tie.forth if tie.source is here else tie.back)
                if there in reached or params is None or self.is_left_in_float(there, params):
                    continue
                reached.add(there)
                frontier.append((there, params))
                self.write(there, params)

    def write(self, value: oir.Value, params: QuantParams) -> None:
        present = self.scales.get(value)
        if present is not None and present.same_grid(params):
            return
        if present is not None and present.source >= Provenance.TRAINED:
            self.diagnostics.append(
                self.owner.note(
                    Code.SCALE_CONFLICT,
                    f"{present} from {present.origin} gives way to {params} from {params.origin}: "
                    "nothing but data movement lies between the two tensors",
                    value=value.name or "",
                    remedy="train both with one shared quantizer",
                )
            )
        self.scales.set(value, params)
        self.written += 1

    def is_left_in_float(self, value: oir.Value, params: QuantParams) -> bool:
        """Whether a grid that nobody trained would pull a layer into integers that training left in float."""
        return params.source < Provenance.CALIBRATED and value in self.layers and value not in self.scales

    def give(self, value: oir.Value, params: QuantParams) -> None:
        """Write to a tensor that has no grid, and to those of its group that have none."""
        if value not in self.scales and not self.is_left_in_float(value, params):
            self.write(value, params)
            if value in self.graph:
                self.fill(value, set(self.scales))

    def concat_backward(self, node: oir.Node) -> None:
        params = self.scales.get(node.outputs[0])
        if params is None or params.per_channel:
            return
        for value in node.inputs:
            if value is not None and not value.is_initializer() and _read_only_by(value, node):
                self.give(value, params)

    def forward(self, node: oir.Node) -> None:
        source = node.inputs[0] if node.inputs else None
        for tie in self.one_way.get(node, ()):
            params = self.scales.get(tie.source)
            moved = _across(params, tie.forth) if params is not None else None
            if moved is not None:
                self.give(tie.target, moved)
        if node.domain != "" or not node.outputs or node.outputs[0] in self.scales:
            return
        params = self.scales.get(source)
        if node.op_type in ("AveragePool", "GlobalAveragePool") and params is not None:
            self.give(node.outputs[0], params)
        elif node.op_type == "Clip" and params is not None:
            # Bounds beyond the grid would move with the saturation.
            if params.interval.contains(self.ranges.raw(node.outputs[0])):
                self.give(node.outputs[0], params)
        elif node.op_type == "Relu" and params is not None:
            self.give(node.outputs[0], _nonnegative(params) if self.from_zero else params)
            self.trace_relu(node)
        elif node.op_type == "Concat":
            self._concat_forward(node)

    def trace_relu(self, node: oir.Node) -> None:
        """What a Relu lets through of a trained tensor can be compared with it as well."""
        grid, traced = self.scales.get(node.outputs[0]), self.scales.traced(node.inputs[0])
        if grid is not None and traced is not None:
            self.scales.trace(node.outputs[0], replace(traced, grid=grid))

    def _concat_forward(self, node: oir.Node) -> None:
        grids = [self.scales.get(value) for value in node.inputs]
        first = grids[0]
        if first is not None and not first.per_channel and _all_same(first, grids):
            self.give(node.outputs[0], first)


def _strength(params: QuantParams) -> tuple[object, ...]:
    """Source first, then width; the rest only makes the order total."""
    span, dtype = params.span, params.dtype
    grid = (dtype.bits, dtype.signed, dtype.narrow_range, params.scale.tolist(), params.zero_point.tolist())
    return params.source, span.hi - span.lo, span.amax, params.per_channel, *grid, params.axis or 0, params.origin


def _across(params: QuantParams, axis_map: AxisMap) -> QuantParams | None:
    if params.axis is None:
        return params
    axis = axis_map(params.axis)
    return None if axis is None else params.with_(axis=axis)


def _nonnegative(params: QuantParams) -> QuantParams:
    """The levels of a grid that survive a Relu, on uint8: same step, zero at the bottom.

    Where a trained one ends the Relu's input saturated, so it ends there too.
    """
    if params.per_channel or params.dtype.bits > UINT8.bits or params.interval.lo >= 0.0:
        return params
    zero, top = np.zeros((), np.int32), params.dtype.qmax - int(params.zero_point)
    if params.source >= Provenance.TRAINED and top > 0:
        return params.with_(zero_point=zero, dtype=QuantDType.up_to(top))
    return params.with_(zero_point=zero, dtype=UINT8, trained=Interval(0.0, params.span.hi))


def _read_only_by(value: oir.Value, node: oir.Node) -> bool:
    return not value.is_graph_output() and all(use.node is node for use in value.uses())


def _all_same(first: QuantParams, grids: Iterable[QuantParams | None]) -> bool:
    return all(grid is not None and grid.same_grid(first) for grid in grids)
