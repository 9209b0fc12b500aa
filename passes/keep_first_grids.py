"""Round twice where training did and one kernel would round once."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import onnx_ir as oir

from qat2int8.ir import Code, Contract, Diagnostic, Fact, Model, Provenance, QuantParams, Severity, Target
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.clamp import read_clamp
from qat2int8.passes.kernels import Kernel, kernel_of
from qat2int8.passes.registry import register
from qat2int8.passes.sole_consumer import sole_consumer


class FirstGrid(enum.StrEnum):
    """What becomes of a trained grid in front of an activation that has one behind it, too."""

    AUTO = "auto"
    """Kept where leaving it out could move a value by more than one level of the second."""
    KEEP = "keep"
    """Kept wherever the target can, as the file says."""
    DROP = "drop"
    """Left out: the fastest."""


@register
@dataclass(frozen=True)
class KeepFirstGrids(Pass):
    """Turn a Relu between two trained grids into a LeakyRelu of slope zero, which ends on levels itself.

    A layer absorbs the Relu behind it, and then only the grid behind the Relu is applied. Where training put a
    grid in front as well, values were rounded twice. A LeakyRelu is not absorbed, and onnxruntime computes it from
    levels to levels with a table of 256 entries (``QLinearLeakyRelu``): slope zero gives the Relu and the second
    rounding, exactly. A Clip from zero up is one too where the second grid does the rest.

    Leaving out a step ``s1`` in front of ``s2`` moves what is rounded by up to ``s1 / 2``; the level stays within
    one of the trained one if that is no more than ``s2``. With a third grid behind a MaxPool, to which the pool's
    input is brought, the halves of both lost steps count. A table costs time on every value, so ``auto``
    keeps the first grid only beyond that.

    A second grid that reaches well past the first one says that training did not compute the first:
    nothing larger than its end could have been seen behind it. ``auto`` leaves such a grid out. Each grid that is
    left out is reported.

    Options:
        first_grid: ``auto`` (default), ``keep`` or ``drop``.
    """

    name = "keep-first-grids"
    requires = frozenset({Fact.NO_FAKE_QUANT, Fact.WEIGHT_SCALES})
    numerics = Numerics.QUANTIZING
    per_target = True

    first_grid: FirstGrid = FirstGrid.AUTO

    def run(self, model: Model, ctx: Context) -> PassResult:
        kept = dropped = 0
        notes: list[Diagnostic] = []
        for node in model.nodes():
            kernel = kernel_of(model, node, ctx.target)
            if kernel is None or kernel.activation is None or not _is_placeable(model, kernel, ctx.target):
                continue
            first, second = _trained(model, node.outputs[0]), _trained(model, kernel.activation.outputs[0])
            if first is None or second is None or first.scale == second.scale:
                continue
            shift = _shift(model, kernel.activation.outputs[0], first, second)
            reason = self._against(shift, first, second) or _obstacle(model, kernel.activation, ctx.target)
            if not reason:
                _requantize(kernel.activation)
                kept += 1
                continue
            model.scales.discard(node.outputs[0])
            notes.append(
                self.note(
                    Code.FAKE_QUANT_DROPPED,
                    f"{first} from {first.origin} is left out in front of {kernel.activation.op_type} and "
                    f"{second}, which moves what is rounded by up to {shift:.2f} levels: {reason}",
                    severity=Severity.NOTE,
                    node=node.name or "",
                    value=node.outputs[0].name or "",
                )
            )
            dropped += 1
        return PassResult({"kept": kept, "dropped": dropped}, tuple(notes))

    def _against(self, shift: float, first: QuantParams, second: QuantParams) -> str:
        """Why the first grid is to go; empty where it is to stay."""
        if self.first_grid is FirstGrid.DROP:
            return "as asked"
        if self.first_grid is FirstGrid.KEEP:
            return ""
        if second.interval.hi > first.interval.hi * _OBSERVED:
            return "the second grid reaches past the first, so training did not compute the first"
        return "" if shift > _ONE_LEVEL else "no level moves by more than one"


_OBSERVED = 1.125
"""How much further than the first grid the second may reach; observers that average lag behind one another."""

_ONE_LEVEL = 1.0


def _trained(model: Model, value: oir.Value) -> QuantParams | None:
    params = model.scales.get(value)
    if params is None or params.per_channel or params.source < Provenance.TRAINED:
        return None
    return params


def _shift(model: Model, value: oir.Value, first: QuantParams, second: QuantParams) -> float:
    """How far, in levels of the last grid, a value can lie from where all trained roundings put it."""
    pool = sole_consumer(model, value)
    last = _trained(model, pool.outputs[0]) if pool is not None and pool.op_type == "MaxPool" else None
    if last is None or last.scale == second.scale:
        return float(first.scale) / float(second.scale) / 2
    return (float(first.scale) + float(second.scale)) / float(last.scale) / 2


def _is_placeable(model: Model, kernel: Kernel, target: Target) -> bool:
    """Whether the layer will be in integers; a LeakyRelu of floats would be no more than a slow Relu."""
    grids = [model.scales.get(value) for value in (*kernel.inputs, *kernel.node.outputs)]
    if any(grid is None or target.lower(grid) is None for grid in grids):
        return False
    return kernel.weight is None or kernel.weight in model.scales


def _obstacle(model: Model, activation: oir.Node, target: Target) -> str:
    """Why the target cannot round twice; empty where it can."""
    rule = target.ops.get("LeakyRelu")
    if rule is None or rule.contract is not Contract.ELEMENTWISE:
        return f"{target.name} has no integer LeakyRelu to round twice with"
    clamp = read_clamp(model, activation)
    return "" if clamp is not None and clamp.span.lo == 0.0 else "only a clamp that begins at zero rounds twice"


def _requantize(activation: oir.Node) -> None:
    """What a Clip has beyond a Relu, the second grid does: that is why a layer could absorb it."""
    activation.op_type = "LeakyRelu"
    activation.resize_inputs(1)
    activation.attributes.clear()
    activation.attributes.add(oir.AttrFloat32("alpha", 0.0))
