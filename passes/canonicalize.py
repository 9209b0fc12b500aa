"""Bring a model into the one shape the other passes expect."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as oir
import onnx_ir.passes.common as common

from qat2int8.ir import Code, Fact, Model, Severity
from qat2int8.passes.base import Context, Pass, PassResult
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class Canonicalize(Pass):
    """Inline functions, lift constants to initializers, drop Identity nodes, infer shapes, name every node.

    Quantize and Dequantize of the domain com.microsoft become those of ONNX where both know the type: shape
    inference ends at the former. Initializers that are also graph inputs (the habit of IR version 3) are frozen:
    onnxruntime fuses nothing that a caller could override.
    """

    name = "canonicalize"
    provides = frozenset({Fact.CONSTANTS_LIFTED})

    def run(self, model: Model, ctx: Context) -> PassResult:
        frozen = [v.name or "" for v in model.graph.inputs if v.name in model.graph.initializers]
        functions = len(model.ir.functions)
        model.ir = common.InlinePass()(model.ir).model
        constants, identities = len(list(model.nodes("Constant"))), len(list(model.nodes("Identity")))
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model.ir)
        common.RemoveInitializersFromInputsPass()(model.ir)
        common.IdentityEliminationPass()(model.ir)
        common.TopologicalSortPass()(model.ir)
        renamed = _rename_contrib(model)
        unknown = sum(out.shape is None for node in model.graph for out in node.outputs)
        common.ShapeInferencePass()(model.ir)
        unknown -= sum(out.shape is None for node in model.graph for out in node.outputs)
        named = 0
        model.forget_names()
        for node in model.nodes():
            if not node.name:
                node.name = model.unique_name(f"{node.op_type}_{node.outputs[0].name}")
                named += 1
        counts = {
            "functions inlined": functions,
            "constants lifted": constants - len(list(model.nodes("Constant"))),
            "identities removed": identities - len(list(model.nodes("Identity"))),
            "inputs frozen": len(frozen),
            "quantizers renamed": renamed,
            "nodes named": named,
            "shapes inferred": unknown,
        }
        notes = tuple(
            self.note(
                Code.INITIALIZER_INPUT_FROZEN,
                "an initializer that was also a graph input is now a constant",
                severity=Severity.NOTE,
                value=name,
                remedy="pass it as a plain input if callers override it",
            )
            for name in frozen
        )
        return PassResult(counts, notes)


def _rename_contrib(model: Model) -> int:
    """Move quantizers of 8 bits from com.microsoft to ONNX; returns how many."""
    renamed = 0
    for node in model.graph.all_nodes():
        if node.domain != "com.microsoft" or node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        typed = node.inputs[2] if len(node.inputs) > 2 else None
        if typed is None and node.op_type == "DequantizeLinear":
            typed = node.inputs[0]
        # A Quantize without zero point writes uint8 in both domains.
        if typed is None or typed.dtype in (oir.DataType.UINT8, oir.DataType.INT8):
            node.domain = ""
            renamed += 1
    return renamed
