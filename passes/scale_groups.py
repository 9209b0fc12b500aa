"""Which tensors must or may share one grid: the "same scale" graph that propagation walks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as oir

from qat2int8.ir import Model

__all__ = ["AxisMap", "Tie", "ties_of"]

AxisMap = Callable[[int], int | None]
"""Where a channel axis of one tensor lies in the other; None when it does not survive."""


@dataclass(frozen=True, eq=False)
class Tie:
    """Two tensors whose elements are the same numbers, moved or selected.

    ``forth`` and ``back`` carry a channel axis across. With ``mutual`` False only the input's grid may decide
    the output's: the output holds some of the input's elements, and somebody else reads the others.
    """

    source: oir.Value
    target: oir.Value
    forth: AxisMap
    back: AxisMap
    mutual: bool


def ties_of(model: Model) -> Iterator[Tie]:
    """All ties of the main graph, in topological order."""
    for node in model.nodes():
        if not is_movement(model, node):
            continue
        source = node.inputs[0]
        assert source is not None
        forth, back = _axis_maps(node)
        mutual = node.op_type in _WHOLE or _only_movement_reads(source)
        for output in node.outputs if node.op_type == "Split" else node.outputs[:1]:
            yield Tie(source, output, forth, back, mutual)


def is_movement(model: Model, node: oir.Node) -> bool:
    """Whether every element of ``node``'s output is an element of its first input, or zero."""
    if node.domain != "" or not node.inputs or node.inputs[0] is None:
        return False
    if node.op_type in _WHOLE or node.op_type in _SELECTING:
        return not (node.op_type == "MaxPool" and len(node.outputs) > 1 and bool(node.outputs[1].uses()))
    if node.op_type == "Resize":
        crop = node.attributes.get_string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
        return node.attributes.get_string("mode", "nearest") == "nearest" and not crop
    if node.op_type == "Pad":
        return pads_with_zero(model, node) or node.attributes.get_string("mode", "constant") != "constant"
    return False


def pads_with_zero(model: Model, node: oir.Node) -> bool:
    """Whether a Pad in constant mode fills with 0.0, which every grid holds exactly."""
    if node.attributes.get_string("mode", "constant") != "constant":
        return False
    filler = node.inputs[2] if len(node.inputs) > 2 else None
    if filler is None:
        return True
    value = model.constant(filler)
    return value is not None and bool((value == 0).all())


_WHOLE = frozenset(
    {"DepthToSpace", "Flatten", "Identity", "Reshape", "SpaceToDepth", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Every element of the input survives."""

_SELECTING = frozenset({"Expand", "Gather", "MaxPool", "Slice", "Split", "Tile"})
"""Some elements may vanish."""


def _only_movement_reads(value: oir.Value) -> bool:
    movers = _WHOLE | _SELECTING | {"Pad", "Resize"}
    return not value.is_graph_output() and all(use.node.op_type in movers for use in value.uses())


def _axis_maps(node: oir.Node) -> tuple[AxisMap, AxisMap]:
    if node.op_type in ("Identity", "MaxPool", "Pad", "Resize"):
        return _unchanged, _unchanged
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


def _lost(axis: int) -> int | None:
    return None
