"""Fold per-channel arithmetic with constants into the layer before it."""

from __future__ import annotations

from dataclasses import dataclass

from qat2int8.ir import Fact, Model
from qat2int8.passes.affine_chain import fold_elementwise
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class FuseConvAffine(Pass):
    """Conv, ConvTranspose or Gemm, then Mul, Div, Add or Sub by constants per channel: one layer.

    The chains of torch.ao divide by the factor of a BatchNormalization that then multiplies with it again, so
    a chain is folded in one go, BatchNormalizations in it included: where the factors cancel, the trained
    integers and even their signs come out untouched.
    """

    name = "fuse-conv-affine"
    requires = frozenset({Fact.FLOAT_WEIGHTS})
    numerics = Numerics.CLOSE

    def run(self, model: Model, ctx: Context) -> PassResult:
        layers, op_types = ("Conv", "ConvTranspose", "Gemm"), ("Mul", "Div", "Add", "Sub")
        folded, notes = fold_elementwise(self, model, layers, op_types, batch_norm=True)
        return PassResult({"folded": folded}, tuple(notes))
