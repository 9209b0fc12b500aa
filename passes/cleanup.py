"""Sweep out what the passes before left behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as oir
import onnx_ir.passes.common as common

from qat2int8.ir import Model, QuantParams
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class Cleanup(Pass):
    """Remove dead nodes, unused initializers, functions and opset imports; let equal initializers be one.

    Entries of the scale table and statistics of tensors that are no longer in the graph go too. Graph inputs
    stay even when nothing reads them.

    Options:
        share_up_to: initializers of at most this many elements are compared.
    """

    share_up_to: int = 1024

    name = "cleanup"
    numerics = Numerics.EXACT

    def run(self, model: Model, ctx: Context) -> PassResult:
        shared = _share_equal_initializers(model, self.share_up_to)
        before, slots = _inventory(model), _slots(model)
        common.RemoveUnusedNodesPass()(model.ir)
        common.RemoveUnusedFunctionsPass()(model.ir)  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass()(model.ir)
        after, kept = _inventory(model), _slots(model)
        removed = {f"{what} removed": count - after[what] for what, count in before.items()}
        trimmed = sum(slots[node] - count for node, count in kept.items())
        forgotten = _forget_vanished(model)
        if any(removed.values()):
            model.forget_names()
        return PassResult(
            {
                "initializers shared": shared,
                **removed,
                "slots trimmed": trimmed,
                "table entries removed": forgotten,
            }
        )


def _inventory(model: Model) -> dict[str, int]:
    ir = model.ir
    imports = [ir.opset_imports, *(function.opset_imports for function in ir.functions.values())]
    return {
        "nodes": sum(1 for _ in ir.graph.all_nodes()),
        "initializers": len(ir.graph.initializers),
        "functions": len(ir.functions),
        "opset imports": sum(len(each) for each in imports),
    }


def _slots(model: Model) -> dict[oir.Node, int]:
    """Inputs, outputs and attributes of each node: the sweep also trims optional ones nobody uses."""
    return {
        node: len(node.inputs) + sum(1 for out in node.outputs if out.name) + len(node.attributes)
        for node in model.graph.all_nodes()
    }


def _share_equal_initializers(model: Model, limit: int) -> int:
    """Let consumers of bit-equal initializers on equal grids read the first of them.

    Two weights with the same values but different grids are not the same tensor, which the library's own
    deduplication cannot know.
    """
    first: dict[tuple[Any, ...], oir.Value] = {}
    shared = 0
    for name, value in tuple(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.size > limit or tensor.dtype == oir.DataType.STRING:
            continue
        if value.is_graph_input() or value.is_graph_output():
            continue
        key = (tensor.dtype, tuple(tensor.shape), tensor.tobytes(), _grid_key(model.scales.get(value)))
        keeper = first.setdefault(key, value)
        if keeper is not value:
            oir.convenience.replace_all_uses_with(value, keeper)
            del model.graph.initializers[name]
            shared += 1
    return shared


def _grid_key(grid: QuantParams | None) -> tuple[Any, ...] | None:
    if grid is None:
        return None
    return grid.dtype, grid.axis, grid.source, grid.scale.tobytes(), grid.zero_point.tobytes()


def _forget_vanished(model: Model) -> int:
    """Drop what the tables know about tensors that are no longer in the graph."""
    present = {*model.graph.inputs, *model.graph.initializers.values()}
    for node in model.graph.all_nodes():
        present.update(node.outputs)
    stale = [value for value in model.scales if value not in present]
    for value in stale:
        model.scales.discard(value)
    unknown = [value for value in model.moments if value not in present]
    for value in unknown:
        del model.moments[value]
    return len(stale) + len(unknown)
