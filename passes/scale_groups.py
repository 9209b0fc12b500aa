"""Which tensors must or may share one grid: the "same scale" graph that propagation walks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as oir

from qat2int8.ir import Contract, Model, Provenance, Target

__all__ = ["AxisMap", "Tie", "is_movement", "layer_inputs", "moved", "ties_of"]

AxisMap = Callable[[int], int | None]
"""Where a channel axis of one tensor lies in the other; None when it does not survive."""


def layer_inputs(model: Model, target: Target) -> dict[oir.Value, oir.Node]:
    """Activations that a Conv, Gemm or MatMul reads, with that layer.

    Without a grid from training they stay without: the layer was left in float on purpose.
    """
    layers: dict[oir.Value, oir.Node] = {}
    for node in model.nodes():
        rule = target.ops.get(node.op_type) if node.domain == "" else None
        if rule is not None and rule.contract is Contract.COMPUTE:
            for value in node.inputs[:2]:
                if value is not None and model.constant(value) is None:
                    layers[value] = node
    return layers


@dataclass(frozen=True, eq=False)
class Tie:
    """Two tensors whose elements are the same numbers, moved or selected.

    ``forth`` and ``back`` carry a channel axis across. With ``mutual`` False only the input's grid may decide
    the output's: the output holds some of the input's elements, and its grid knows nothing of the others.
    """

    node: oir.Node
    source: oir.Value
    target: oir.Value
    forth: AxisMap
    back: AxisMap
    mutual: bool


def ties_of(model: Model) -> Iterator[Tie]:
    """All ties of the main graph, in topological order."""
    settled = _settled(model)
    for node in model.nodes():
        if not is_movement(model, node):
            continue
        source = node.inputs[0]
        assert source is not None
        forth, back = _axis_maps(node)
        # A constant is quantized on its own terms, never on those of an activation made from it.
        whole = node.op_type in _WHOLE or _is_only_way(source, node) or source in settled
        mutual = whole and not source.is_initializer() and not _rounds_twice(model, node)
        for output in moved(node):
            yield Tie(node, source, output, forth, back, mutual)


def _rounds_twice(model: Model, node: oir.Node) -> bool:
    """Whether training rounded a MaxPool's input and its output, each on a grid of its own.

    Rounding is monotone, so the pool can run on the second grid, and no other grid is needed for either.
    """
    before, after = (model.scales.get(value) for value in (node.inputs[0], node.outputs[0]))
    if node.op_type != "MaxPool" or before is None or after is None or before.per_channel or after.per_channel:
        return False
    return min(before.source, after.source) >= Provenance.TRAINED and not before.same_grid(after)


def moved(node: oir.Node) -> Sequence[oir.Value]:
    """The outputs of a movement that hold elements: of a Split all, of a MaxPool the first."""
    return node.outputs if node.op_type == "Split" else node.outputs[:1]


def is_read(value: oir.Value) -> bool:
    """Whether any node or caller reads ``value``."""
    return bool(value.uses()) or value.is_graph_output()


def is_movement(model: Model, node: oir.Node) -> bool:
    """Whether every element of ``node``'s output is an element of its first input, or zero."""
    if node.domain != "" or not node.inputs or node.inputs[0] is None:
        return False
    if node.op_type in _WHOLE or node.op_type in _SELECTING:
        return not (node.op_type == "MaxPool" and any(is_read(indices) for indices in node.outputs[1:]))
    if node.op_type == "Resize":
        crop = node.attributes.get_string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
        return node.attributes.get_string("mode", "nearest") == "nearest" and not crop
    if node.op_type == "Pad":
        return _pads_with_zero(model, node) or node.attributes.get_string("mode", "constant") != "constant"
    return False


def _pads_with_zero(model: Model, node: oir.Node) -> bool:
    """Whether a Pad in constant mode fills with 0.0, which every grid holds exactly."""
    if node.attributes.get_string("mode", "constant") != "constant":
        return False
    filler = node.inputs[2] if len(node.inputs) > 2 else None
    if filler is None:
        return node.attributes.get_float("value", 0.0) == 0.0
    value = model.constant(filler)
    return value is not None and bool((value == 0).all())


_WHOLE = frozenset(
    {"DepthToSpace", "Flatten", "Identity", "Reshape", "SpaceToDepth", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Every element of the input survives."""

_SELECTING = frozenset({"Expand", "Gather", "MaxPool", "Slice", "Split", "Tile"})
"""Some elements may vanish."""


def _settled(model: Model) -> set[oir.Value]:
    """Tensors that nothing but movement reads, all of whose ways out end on grids."""
    settled: set[oir.Value] = set()
    for node in reversed(model.graph):
        settled.update(value for value in node.outputs if _every_way_ends(model, value, settled))
    settled.update(value for value in model.graph.inputs if _every_way_ends(model, value, settled))
    return settled


def _every_way_ends(model: Model, value: oir.Value, settled: set[oir.Value]) -> bool:
    uses = value.uses()
    if value.is_graph_output() or not uses:
        return False
    return all(
        use.idx == 0
        and use.node.graph is model.graph
        and is_movement(model, use.node)
        and all(output in model.scales or output in settled for output in _read(use.node))
        for use in uses
    )


def _is_only_way(source: oir.Value, node: oir.Node) -> bool:
    return not source.is_graph_output() and len(source.uses()) == 1 and len(_read(node)) == 1


def _read(node: oir.Node) -> list[oir.Value]:
    return [value for value in moved(node) if value.uses() or value.is_graph_output()]


def _axis_maps(node: oir.Node) -> tuple[AxisMap, AxisMap]:
    if node.op_type == "Identity":
        return _unchanged, _unchanged
    if node.op_type == "MaxPool":
        return _unpooled, _unpooled
    if node.op_type == "Transpose":
        source = node.inputs[0]
        rank = len(source.shape) if source is not None and source.shape is not None else 0
        perm = list(node.attributes.get_ints("perm", tuple(range(rank))[::-1]))
        return (
            lambda axis: perm.index(axis) if axis in perm else None,
            lambda axis: perm[axis] if axis < len(perm) else None,
        )
    return _lost, _lost


def _unchanged(axis: int) -> int | None:
    return axis


def _unpooled(axis: int) -> int | None:
    return axis if axis in (0, 1) else None


def _lost(axis: int) -> int | None:
    return None
