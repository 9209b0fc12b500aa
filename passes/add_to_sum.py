"""Keep a runtime from fusing a residual Add with the LayerNormalization behind it."""

from __future__ import annotations

from dataclasses import dataclass

from qat2int8.ir import Model
from qat2int8.passes.base import Context, Pass, PassResult
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class AddToSum(Pass):
    """Write the Add in front of a LayerNormalization as a Sum, which computes the same.

    onnxruntime makes one SkipLayerNormalization of Add and LayerNormalization, and its CPU kernel (1.31) takes
    0.51 ms for 128x768 numbers where the two take 0.10 ms: that is 12 % of a BERT-base in integers. The fusion
    looks for an Add.
    """

    name = "add-to-sum"
    per_target = True

    def run(self, model: Model, ctx: Context) -> PassResult:
        rewritten = 0
        for norm in model.nodes("LayerNormalization"):
            source = norm.inputs[0]
            add = source.producer() if source is not None else None
            if add is None or add.domain or add.op_type != "Add":
                continue
            add.op_type = "Sum"
            rewritten += 1
        return PassResult({"rewritten": rewritten})
