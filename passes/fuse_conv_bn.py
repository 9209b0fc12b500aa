"""Fold BatchNormalization into the layer before it."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as oir

from qat2int8.ir import Code, Diagnostic, Fact, Model, Severity
from qat2int8.passes.affine_chain import batch_norm_link, batch_norm_moments, fold_chain
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.channel_affine import LAYER_OPS, Layer, NotFoldable
from qat2int8.passes.registry import register
from qat2int8.passes.sole_consumer import sole_consumer


@register
@dataclass(frozen=True)
class FuseConvBn(Pass):
    """Conv, ConvTranspose, Gemm or MatMul, then BatchNormalization: one layer; trained weight grids follow.

    With ``k = gamma / sqrt(var + eps)`` per output channel, ``W' = W * k`` and ``b' = (b - mean) * k + beta``.
    The trained integers stay: the step of a channel becomes ``step * |k|``, the sign of ``k`` goes into the
    integers. What a BatchNormalization says about its output (mean beta, deviation |gamma|) is recorded,
    whether it is folded or not.
    """

    name = "fuse-conv-bn"
    requires = frozenset({Fact.FLOAT_WEIGHTS})
    provides = frozenset({Fact.BN_FOLDED})
    numerics = Numerics.CLOSE

    def run(self, model: Model, ctx: Context) -> PassResult:
        notes: list[Diagnostic] = []
        fused = recorded = 0
        for node in model.nodes("BatchNormalization"):
            try:
                notes += self._fold(model, node)
                fused += 1
            except NotFoldable as refusal:
                reason, where = f"not folded: {refusal.reason}", node.name or ""
                notes.append(
                    self.note(Code.NOT_FUSED, reason, severity=Severity.NOTE, node=where, remedy=refusal.remedy)
                )
                recorded += _record_moments(model, node)
        return PassResult({"fused": fused, "statistics recorded": recorded}, tuple(notes))

    def _fold(self, model: Model, node: oir.Node) -> list[Diagnostic]:
        link = batch_norm_link(model, node)
        source = node.inputs[0]
        producer = source.producer() if source is not None else None
        if source is None or producer is None:
            raise NotFoldable("its input is not computed by a layer")
        if producer.domain or producer.op_type not in LAYER_OPS:
            raise NotFoldable(f"its input comes from {producer.op_type} '{producer.name}', not from a layer")
        if source.is_graph_output():
            raise NotFoldable(f"the layer's output '{source.name}' is a graph output")
        if sole_consumer(model, source) is not node:
            raise NotFoldable(f"the layer's output '{source.name}' is read by other nodes too")
        layer = Layer.of(model, producer)
        if link.affine.factor.size != layer.channels:
            raise NotFoldable("its parameters do not run along the output channels of the layer")
        return fold_chain(self, model, layer, [link])


def _record_moments(model: Model, node: oir.Node) -> bool:
    """Write down what the output was in training; whether that was news."""
    moments, output = batch_norm_moments(model, node), node.outputs[0]
    if moments is None or output in model.moments:
        return False
    model.moments[output] = moments
    return True
