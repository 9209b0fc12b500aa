"""Keep in float what was left in float."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as oir

from qat2int8.ir import Code, Diagnostic, Fact, Model, Severity
from qat2int8.passes.base import Context, Pass, PassResult
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class GuardFloatLayers(Pass):
    """Put a Max of one input in front of a layer in float that stands between a Dequantize and a Quantize.

    onnxruntime quantizes the float weight of such a layer by itself, with one step for the whole weight, and runs
    it in integers (``WeightBiasQuantization``, found with 1.31): an accuracy nobody asked for, on a layer somebody
    may have left out on purpose. A Max of one input computes nothing, and no optimizer of the runtime drops it.

    The same guard keeps ops in float that the target says are slower in integers (``faster_in_float``).

    Likewise behind each Dequantize of float8: the runtime makes integer kernels of what reads it, which take no
    such type, and then refuses the model.
    """

    name = "guard-float-layers"
    requires = frozenset({Fact.QDQ_PLACED})
    per_target = True

    def run(self, model: Model, ctx: Context) -> PassResult:
        guarded, notes = 0, list[Diagnostic]()
        slow = ctx.target.faster_in_float
        for node in model.nodes("Conv", "ConvTranspose", "Gemm", *slow):
            source = node.inputs[0]
            producer = source.producer() if source is not None else None
            if source is None or producer is None or producer.op_type != "DequantizeLinear":
                continue
            if not _is_quantized(node.outputs[0]):
                continue
            if node.op_type in slow:
                notes.append(self._faster_in_float(node, ctx))
            elif model.constant(node.inputs[1]) is None:
                continue
            guard = _guard(model, source, node.name or "")
            model.insert_before(node, guard)
            node.replace_input_with(0, guard.outputs[0])
            guarded += 1
        counts = {"guarded": guarded, "float8 guarded": _guard_float8(model)}
        return PassResult(counts, tuple(notes))

    def _faster_in_float(self, node: oir.Node, ctx: Context) -> Diagnostic:
        return self.note(
            Code.KEPT_FLOAT,
            f"{node.op_type} stays in float: faster in float than the integer kernel of {ctx.target.name}",
            node=node.name or "",
            severity=Severity.NOTE,
            remedy=_REMEDIES.get(node.op_type, ""),
        )


def _guard(model: Model, source: oir.Value, name: str) -> oir.Node:
    guard = oir.node("Max", [source], name=model.unique_name(f"{name}_guard"))
    result = guard.outputs[0]
    result.name = model.unique_name(f"{source.name}_guarded")
    result.type, result.shape = source.type, source.shape
    return guard


def _guard_float8(model: Model) -> int:
    guarded = 0
    for node in model.nodes("DequantizeLinear"):
        zero_point = node.inputs[2] if len(node.inputs) > 2 else None
        types = {value.dtype for value in (node.inputs[0], zero_point) if value is not None}
        result = node.outputs[0]
        uses = [use for use in result.uses() if use.node.op_type != "Max"]
        if not types & _FLOAT8 or not uses:
            continue
        guard = _guard(model, result, node.name or "")
        model.graph.insert_after(node, guard)
        for use in uses:
            use.node.replace_input_with(use.idx, guard.outputs[0])
        guarded += 1
    return guarded


_FLOAT8 = {
    oir.DataType.FLOAT8E4M3FN,
    oir.DataType.FLOAT8E4M3FNUZ,
    oir.DataType.FLOAT8E5M2,
    oir.DataType.FLOAT8E5M2FNUZ,
}


def _is_quantized(value: oir.Value) -> bool:
    """Whether a Quantize reads ``value``, at once or behind a Relu or Clip."""
    for use in value.uses():
        if use.node.op_type == "QuantizeLinear":
            return True
        if use.node.op_type in ("Relu", "Clip") and _is_quantized(use.node.outputs[0]):
            return True
    return False


_REMEDIES = {"AveragePool": "let padding count (count_include_pad): then it becomes a convolution"}
