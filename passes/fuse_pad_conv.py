"""Fold a Pad with zeros into the convolution behind it."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as oir

from qat2int8.ir import Fact, Model
from qat2int8.passes.base import Context, Pass, PassResult
from qat2int8.passes.registry import register
from qat2int8.passes.scale_groups import is_movement
from qat2int8.passes.sole_consumer import sole_consumer


@register
@dataclass(frozen=True)
class FusePadConv(Pass):
    """Pad with zeros, then Conv: one Conv with larger pads.

    TensorFlow pads in front of convolutions of stride 2, and so does much code for PyTorch. A convolution is
    padded for nothing, while a Pad writes the whole tensor once more.

    Only constant pads of spatial axes that add zeros, in front of a Conv that is the only reader and says its own
    pads. The tensor takes over the grid of the padded one; where it has another, or is read by others, which
    training left in float, the Pad stays and runs on integers.
    """

    name = "fuse-pad-conv"
    requires = frozenset({Fact.CONSTANTS_LIFTED, Fact.NO_FAKE_QUANT})

    def run(self, model: Model, ctx: Context) -> PassResult:
        fused = 0
        for node in model.nodes("Pad"):
            found = _fusable(model, node)
            if found is not None:
                _fuse(model, node, *found)
                fused += 1
        return PassResult({"fused": fused})


def _fusable(model: Model, node: oir.Node) -> tuple[oir.Node, list[int]] | None:
    """The Conv behind ``node``, and its pads when it pads itself."""
    result = node.outputs[0]
    conv = sole_consumer(model, result)
    mode = node.attributes.get_string("mode", "constant")
    if mode != "constant" or not is_movement(model, node) or conv is None:
        return None
    if conv.op_type != "Conv" or conv.domain != "" or conv.inputs[0] is not result:
        return None
    if conv.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    added = _spatial_pads(model, node)
    if added is None or any(pad < 0 for pad in added) or not _may_share_grid(model, node):
        return None
    own = [0] * len(added)
    if conv.attributes.get_string("auto_pad", "NOTSET") == "NOTSET":
        own = list(conv.attributes.get_ints("pads", own))
    return conv, [mine + pad for mine, pad in zip(own, added, strict=True)]


def _spatial_pads(model: Model, node: oir.Node) -> list[int] | None:
    """What is added to spatial axes, beginnings and then ends; None where others grow or it is not known."""
    source = node.inputs[0]
    pads = model.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if pads is None or source is None or source.shape is None:
        return None
    rank = source.shape.rank()
    axes = list(range(rank))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        given = model.constant(node.inputs[3])
        if given is None:
            return None
        axes = [int(axis) % rank for axis in given.reshape(-1)]
    begins, ends = [0] * rank, [0] * rank
    for axis, begin, end in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        begins[axis], ends[axis] = int(begin), int(end)
    if any(begins[:2]) or any(ends[:2]):
        return None
    return begins[2:] + ends[2:]


def _may_share_grid(model: Model, node: oir.Node) -> bool:
    """Whether the tensor in front of ``node`` has, or can be given, the grid of the one behind it."""
    source, grid = node.inputs[0], model.scales.get(node.outputs[0])
    assert source is not None
    present = model.scales.get(source)
    if grid is None or present is None:
        return grid is None or sole_consumer(model, source) is node
    return present.same_grid(grid)


def _fuse(model: Model, node: oir.Node, conv: oir.Node, pads: list[int]) -> None:
    source, padded = node.inputs[0], node.outputs[0]
    assert source is not None
    if source not in model.scales:
        model.scales.move(padded, source)
    conv.replace_input_with(0, source)
    conv.attributes.pop("auto_pad", None)
    conv.attributes["pads"] = oir.AttrInt64s("pads", pads)
    model.remove(node)
