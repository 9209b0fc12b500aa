"""Give layers that overflow on the target's processors unsigned weights, whose products are added in 32 bits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import Code, Diagnostic, Model, Severity
from qat2int8.passes.base import Context, Pass, PassResult
from qat2int8.passes.overflow import Product, overflowing_products
from qat2int8.passes.private_path import private_path
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class AvoidOverflow(Pass):
    """Store the int8 weights of layers that can overflow as uint8: 128 more, and the zero point 128 higher.

    The same numbers, from a kernel that is exact on every x86 processor and slower on those with VNNI: so it runs
    for targets with ``product_sums: narrow``, and only for layers that can overflow at all
    (:func:`overflowing_products`). A grid that starts at zero and was trained on 7 bits, as symmetric ones are
    behind a Relu, never does. For other targets of unsigned activations it tells how many layers would. A second
    operand that is computed becomes unsigned in the Quantize that makes it.

    onnxruntime has the option ``session.x64quantprecision`` for this. Whoever runs the model has to set it, and it
    changes layers that cannot overflow too.
    """

    name = "avoid-overflow"

    def run(self, model: Model, ctx: Context) -> PassResult:
        if ctx.target.runtime != "onnxruntime" or ctx.target.activation != "uint8":
            return PassResult()
        found = overflowing_products(model)
        if ctx.target.product_sums == "wide":
            return PassResult(diagnostics=tuple(self._told(found)))
        return PassResult({"weights": unsign(model, found)})

    def _told(self, found: list[Product]) -> Iterable[Diagnostic]:
        if not found:
            return
        layers = "1 layer overflows" if len(found) == 1 else f"{len(found)} layers overflow"
        yield self.note(
            Code.PRODUCT_OVERFLOW,
            f"{layers} on x86 processors without VNNI: wrong numbers",
            severity=Severity.NOTE,
            node=found[0].layer.name or "",
            remedy="for those processors convert with the target ort-x86-avx2",
        )


def unsign(model: Model, found: Iterable[Product]) -> int:
    """Make the signed operands of ``found`` unsigned; returns how many could be."""
    done: set[oir.Node] = set()
    changed = 0
    for product in found:
        # Layers can share a Dequantize.
        if product.holder in done:
            continue
        done.add(product.holder)
        levels = model.constant(product.weight)
        if levels is None:
            changed += _unsign_computed(model, product)
        else:
            changed += _unsign_constant(model, product, levels)
    return changed


def _unsign_constant(model: Model, product: Product, levels: npt.NDArray[Any]) -> bool:
    holder = product.holder
    zeros = np.zeros((), np.int8) if product.zero is None else model.constant(product.zero)
    if zeros is None:
        return False
    name = product.weight.name or "weight"
    unsigned = [model.add_initializer(f"{name}_unsigned", _raised(levels))]
    unsigned.append(model.add_initializer(f"{name}_zero_point", _raised(zeros)))
    if product.zero_point >= len(holder.inputs):
        holder.resize_inputs(product.zero_point + 1)
    holder.replace_input_with(product.data, unsigned[0])
    holder.replace_input_with(product.zero_point, unsigned[1])
    return True


def _unsign_computed(model: Model, product: Product) -> bool:
    """Change the Quantize that signs the operand, where there is one and nobody else reads its integers."""
    if product.holder.op_type != "DequantizeLinear":
        return False
    path = list(private_path(model, product.holder))
    if not path or path[-1].op_type != "QuantizeLinear":
        return False
    zeros = [
        model.constant(node.inputs[2]) if len(node.inputs) > 2 else None for node in (path[-1], product.holder)
    ]
    if zeros[0] is None or zeros[1] is None or not np.array_equal(zeros[0], zeros[1]):
        return False
    zero_point = model.add_initializer("zero_point", _raised(zeros[0]))
    for node in (path[-1], product.holder):
        node.replace_input_with(2, zero_point)
    for node in path:
        node.outputs[0].type = oir.TensorType(oir.DataType.UINT8)
    return True


def _raised(levels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    # In two's complement, adding 128 is turning the highest bit over.
    return levels.astype(np.uint8) ^ np.uint8(128)
