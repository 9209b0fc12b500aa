"""Turn an Add of a constant per channel into the bias of the convolution before it."""

from __future__ import annotations

from dataclasses import dataclass

from qat2int8.ir import Fact, Model
from qat2int8.passes.affine_chain import fold_elementwise
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class FuseConvBias(Pass):
    """Conv or ConvTranspose, then Add of a [1, C, 1, 1], [C, 1, 1] or one-element constant: a bias.

    The weights and their grid are not touched. An Add of another tensor (a residual) or of a constant that
    varies over the image stays.
    """

    name = "fuse-conv-bias"
    requires = frozenset({Fact.FLOAT_WEIGHTS})
    numerics = Numerics.CLOSE

    def run(self, model: Model, ctx: Context) -> PassResult:
        fused, notes = fold_elementwise(self, model, ("Conv", "ConvTranspose"), ("Add",))
        return PassResult({"fused": fused}, tuple(notes))
