"""Bring a model up to the opset that the target's integer kernels need."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx.version_converter
import onnx_ir as oir

from qat2int8.ir import Fact, Model, UnsupportedModel
from qat2int8.passes.base import Context, Pass, PassResult
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class RaiseOpset(Pass):
    """Convert a model older than ``target.min_opset`` with ONNX's own version converter.

    Per-channel Quantize and Dequantize exist from opset 13, an integer MaxPool from opset 12. Stands first in a
    pipeline: values get new identities, so nothing may be known about them yet.

    Raises:
        UnsupportedModel: the converter knows no way for one of the ops.
    """

    name = "raise-opset"
    invalidates = frozenset({Fact.CONSTANTS_LIFTED})

    def run(self, model: Model, ctx: Context) -> PassResult:
        wanted = ctx.target.min_opset
        if model.opset >= wanted:
            return PassResult()
        try:
            converted = onnx.version_converter.convert_version(model.to_proto(), wanted)
        except Exception as error:  # the converter raises bare RuntimeError and worse
            reason = (str(error).strip().splitlines() or [""])[0]
            raise UnsupportedModel(
                f"opset {model.opset} cannot be raised to {wanted}: {reason[:200]}",
                remedy=f"export the model with opset {wanted} or later",
            ) from error
        raised = wanted - model.opset
        external = {name: value.const_value for name, value in model.graph.initializers.items()}
        model.ir = oir.from_proto(converted)
        for name, value in model.graph.initializers.items():
            if isinstance(external.get(name), oir.ExternalTensor):
                value.const_value = external[name]
        model.scales.clear()
        model.moments.clear()
        return PassResult({"opset versions": raised})
