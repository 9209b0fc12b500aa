"""Bring activations into the form a quantizer absorbs, directly behind the layer that computes them."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as oir

from qat2int8.ir import Diagnostic, Fact, Model
from qat2int8.passes.affine_chain import drop_grid
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.clamp import CLAMP_OPS, RELU, Clamp, read_clamp, write_clamp
from qat2int8.passes.registry import register
from qat2int8.passes.sole_consumer import sole_consumer

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add")
_MOVES = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")


@register
@dataclass(frozen=True)
class FuseConvRelu(Pass):
    """One Relu or Clip behind each layer, in front of pooling and data movement.

    ONNX has no float op for a layer with its activation; the quantizer behind a Relu or Clip absorbs it when
    it stands right behind the layer. So Max and Min with a constant become Relu or Clip, runs of clamps
    become one, and a clamp behind MaxPool, Reshape, Flatten, Transpose, Squeeze or Unsqueeze moves in front:
    clamping is monotone, so all of this is exact on finite numbers (a Clip without a bound has the largest
    finite number for one).
    """

    name = "fuse-conv-relu"
    requires = frozenset({Fact.FLOAT_WEIGHTS})
    numerics = Numerics.EXACT

    def run(self, model: Model, ctx: Context) -> PassResult:
        if model.opset < 11:  # Clip has its bounds as attributes there
            return PassResult()
        notes: list[Diagnostic] = []
        canonicalised = moved = 0
        for node in model.nodes(*CLAMP_OPS):
            clamp = read_clamp(model, node)
            if clamp is None:
                continue
            canonicalised += self._canonicalise(model, clamp, notes)
            moved += self._move(model, node, notes)
        return PassResult({"canonicalised": canonicalised, "moved": moved}, tuple(notes))

    def _canonicalise(self, model: Model, clamp: Clamp, notes: list[Diagnostic]) -> bool:
        """Merge the clamp before this one into it and write it as Relu or Clip."""
        node, producer = clamp.node, clamp.source.producer()
        inner = read_clamp(model, producer) if producer is not None else None
        if inner is not None and sole_consumer(model, clamp.source) is node:
            notes += hand_down_grid(self, model, clamp.source, node.outputs[0])
            write_clamp(model, clamp, inner.source, inner.then(clamp), clamp.dtype or inner.dtype)
            model.graph.remove(inner.node, safe=True)
            return True
        wanted = "Relu" if clamp.span == RELU else "Clip"
        if node.op_type == wanted:
            return False
        write_clamp(model, clamp, clamp.source, clamp.span, clamp.dtype)
        return True

    def _move(self, model: Model, node: oir.Node, notes: list[Diagnostic]) -> bool:
        """Put the clamp between the layer and the data movement that separates them."""
        chain = _movement_before(model, node)
        if not chain:
            return False
        top, bottom = chain[-1], chain[0]
        source, final = top.inputs[0], node.outputs[0]
        assert source is not None
        notes += hand_down_grid(self, model, bottom.outputs[0], final)
        for mover in chain[1:]:
            notes += drop_grid(self, model, mover.outputs[0], replaced_by=final)
        for mover in chain:
            model.moments.pop(mover.outputs[0], None)
        model.replace_value(final, bottom.outputs[0])
        node.replace_input_with(0, source)
        top.replace_input_with(0, final)
        final.name = model.unique_name(f"{source.name}_clamped")
        final.shape, final.type = source.shape, source.type
        model.graph.remove(node)
        model.graph.insert_before(top, node)
        return True


def hand_down_grid(pass_: Pass, model: Model, vanishing: oir.Value, final: oir.Value) -> list[Diagnostic]:
    """Let the clamped tensor have the grid of the one before the clamp, unless it has its own.

    Clamping a tensor that lies on a grid leaves it on that grid, so nothing trained is lost.
    """
    if final in model.scales:
        return drop_grid(pass_, model, vanishing, replaced_by=final)
    model.scales.move(vanishing, final)
    return []


def _movement_before(model: Model, node: oir.Node) -> list[oir.Node]:
    """The data movement between ``node`` and a layer, nearest first; empty when there is none or no layer."""
    chain: list[oir.Node] = []
    reader, value = node, node.inputs[0]
    while value is not None and sole_consumer(model, value) is reader:
        producer = value.producer()
        if producer is None or producer.domain or producer.graph is not model.graph:
            return []
        if producer.op_type in _LAYERS:
            return chain
        if producer.op_type not in _MOVES or not _commutes(producer):
            return []
        chain.append(producer)
        reader, value = producer, producer.inputs[0]
    return []


def _commutes(node: oir.Node) -> bool:
    """Whether clamping before the node equals clamping behind it.

    Not for a MaxPool that also says where its maxima were, nor where a window could lie in the padding
    alone: the fill value is not clamped.
    """
    if node.op_type != "MaxPool":
        return True
    indices = len(node.outputs) > 1 and bool(node.outputs[1].name)
    dilated = any(step != 1 for step in node.attributes.get_ints("dilations", ()))
    return not indices and not dilated and not node.attributes.get_int("ceil_mode", 0)
