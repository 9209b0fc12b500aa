"""Let the weights of integer layers share no zero point, for a runtime that cannot load them otherwise."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as oir

from qat2int8.ir import Model
from qat2int8.passes.base import Context, Pass, PassResult
from qat2int8.passes.overflow import products
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class OwnZeroPoints(Pass):
    """Give every int8 weight a zero point of its own.

    With the session option ``session.x64quantprecision``, which some applications set for every model they open,
    onnxruntime (1.31) makes int8 weights unsigned and stores each new zero point under a name derived from the
    old one; for the second layer with the same zero point it fails to load the model (``s8_to_u8.cc``). A byte for
    each channel avoids that.
    """

    name = "own-zero-points"
    per_target = True

    def run(self, model: Model, ctx: Context) -> PassResult:
        owners: dict[oir.Value, oir.Node] = {}
        copied = 0
        for product in products(model):
            holder, zero_point = product.holder, product.zero
            array = model.constant(zero_point)
            if zero_point is None or array is None or owners.setdefault(zero_point, holder) is holder:
                continue
            own = model.add_initializer(zero_point.name or "zero_point", array)
            owners[own] = holder
            holder.replace_input_with(product.zero_point, own)
            copied += 1
        return PassResult({"copied": copied})
