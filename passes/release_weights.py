"""Make floats of constants that no integer kernel can read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import Fact, Model
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.fake_quant import Refusal, drop_unused_initializers, fake_quants
from qat2int8.passes.one_node import evaluate
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class ReleaseWeights(Pass):
    """Replace each quantized constant of a form that was refused by the float initializer it stands for.

    Weights with a step per block, of 16 bits or of float8. Behind the Dequantize of such a one onnxruntime (1.31)
    may build a kernel all the same: MatMulNBits, which quantizes a float activation on the fly; or
    MatMulIntegerToFloat and QLinearMatMul, which fail at the first run on steps per block and cannot even be
    loaded with float8. The trained values are kept to the bit; only their storage grows.
    """

    name = "release-weights"
    requires = frozenset({Fact.QDQ_PLACED})
    numerics = Numerics.CLOSE
    per_target = True

    def run(self, model: Model, ctx: Context) -> PassResult:
        released, freed = 0, list[oir.Value]()
        for refused in list(fake_quants(model)):
            if not isinstance(refused, Refusal) or not refused.constant or refused.output.is_graph_output():
                continue
            values = _values(model, refused.output)
            if values is None or values.dtype != np.float32:
                continue
            freed += _replace(model, refused.output, values)
            released += 1
        drop_unused_initializers(model, freed)
        return PassResult({"released": released})


def _values(model: Model, value: oir.Value | None) -> npt.NDArray[Any] | None:
    """What a chain of quantization nodes makes of constants; None where it is not known before the model runs."""
    array, node = model.constant(value), value.producer() if value is not None else None
    if array is not None or node is None or node.op_type not in _CHAIN:
        return array
    arrays: dict[str, npt.NDArray[Any]] = {}
    for source in node.inputs:
        if source is None:
            continue
        above = _values(model, source)
        if above is None:
            return None
        arrays[source.name or ""] = above
    # onnxruntime's domain has the same two ops for 16 bits before opset 21.
    plain = oir.node(node.op_type, node.inputs, node.attributes, num_outputs=1)
    plain.outputs[0].name = node.outputs[0].name
    results = evaluate(plain, arrays, max(model.opset, _OPSET_OF_16_BITS))
    for index in range(len(plain.inputs)):
        plain.replace_input_with(index, None)
    return None if results is None else results[0]


_CHAIN = ("Cast", "Clip", "DequantizeLinear", "QuantizeLinear")
_OPSET_OF_16_BITS = 21


def _replace(model: Model, output: oir.Value, values: npt.NDArray[Any]) -> list[oir.Value]:
    """Let the readers of ``output`` read ``values``, and remove what computed it; returns what that read."""
    weight = model.add_initializer(output.name or "", values)
    model.scales.discard(output)
    output.replace_all_uses_with(weight)
    freed: list[oir.Value] = []
    node = output.producer()
    while node is not None and not any(result.uses() or result.is_graph_output() for result in node.outputs):
        freed += [value for value in node.inputs if value is not None]
        above = node.inputs[0]
        model.graph.remove(node, safe=True)
        node = above.producer() if above is not None else None
    return freed
