"""Bring a model up to the opset that the target's integer kernels need, or that its functions have ops in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

import onnx
import onnx.version_converter
import onnx_ir as oir

from qat2int8.ir import Fact, Model, UnsupportedModel
from qat2int8.ir.substitute import substitute, substituted
from qat2int8.passes.base import Context, Pass, PassResult
from qat2int8.passes.registry import register

_SPELLED_OUT = (
    (frozenset({"Erf"}), 20),
    (frozenset({"Tanh", "Pow"}), 20),
    (frozenset({"ReduceMean", "Sqrt"}), 17),
    (frozenset({"ReduceMean", "Pow"}), 17),
    (frozenset({"HardSigmoid", "Mul"}), 14),
    (frozenset({"Clip", "Add", "Mul", "Div"}), 14),
)
"""Ops of which older exporters build a function that has an op of its own since this opset: Gelu, its
approximation, LayerNormalization and HardSwish."""

_STUBBED_BYTES = 1 << 10
"""Tensors above this size are weights, which no conversion looks into."""


@register
@dataclass(frozen=True)
class RaiseOpset(Pass):
    """Convert a model older than ``target.min_opset`` with ONNX's own version converter.

    Per-channel Quantize and Dequantize exist from opset 13, an integer MaxPool from opset 12. A model that spells
    out a GELU, LayerNormalization or HardSwish is raised to the opset that has the op, as long as the converter
    and the target go along; without, it stays as it is. Stands first in a pipeline: values get new identities, so
    nothing may be known about them yet.

    Raises:
        UnsupportedModel: the model is older than the target wants, and the converter knows no way for an op.
    """

    name = "raise-opset"
    invalidates = frozenset({Fact.CONSTANTS_LIFTED})

    def run(self, model: Model, ctx: Context) -> PassResult:
        before, needed = model.opset, ctx.target.min_opset
        for wanted in sorted({needed, _useful(model, ctx)}, reverse=True):
            if model.opset >= wanted:
                break
            try:
                _convert(model, wanted)
            except Exception as error:  # the converter raises bare RuntimeError and worse
                if wanted == needed:
                    reason = (str(error).strip().splitlines() or [""])[0]
                    raise UnsupportedModel(
                        f"opset {before} cannot be raised to {needed}: {reason[:200]}",
                        remedy=f"export the model with opset {needed} or later",
                    ) from error
        return PassResult({"opset versions": model.opset - before})


def _useful(model: Model, ctx: Context) -> int:
    """The opset with an op for what the model spells out; at least that of the target."""
    # The converter passes by the bodies of functions.
    if model.ir.functions:
        return ctx.target.min_opset
    ops = {node.op_type for node in model.nodes() if not node.domain}
    found = max((opset for parts, opset in _SPELLED_OUT if parts <= ops), default=0)
    return max(ctx.target.min_opset, min(found, ctx.target.max_opset))


def _convert(model: Model, wanted: int) -> None:
    weights: list[oir.TensorProtocol] = []

    def stub(tensor: oir.TensorProtocol) -> oir.TensorProtocol:
        if tensor.nbytes <= _STUBBED_BYTES and not isinstance(tensor, oir.ExternalTensor):
            return tensor
        weights.append(tensor)
        key, shape = str(len(weights) - 1), oir.Shape(tensor.shape.numpy())
        return oir.ExternalTensor(key, None, None, tensor.dtype, shape=shape, name=tensor.name or "")

    with substituted(model.ir, stub):
        proto = model.to_proto()
    ir = oir.from_proto(onnx.version_converter.convert_version(proto, wanted))
    substitute(ir, lambda tensor: weights[int(str(tensor.location))] if _is_stub(tensor) else tensor)
    model.ir = ir
    model.scales.clear()
    model.moments.clear()


def _is_stub(tensor: oir.TensorProtocol) -> TypeGuard[oir.ExternalTensor]:
    return isinstance(tensor, oir.ExternalTensor)
