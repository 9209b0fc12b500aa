"""Write HardSwish as the product it is, for runtimes that multiply integers."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as oir

from qat2int8.ir import Contract, Fact, Model
from qat2int8.passes.base import Context, Pass, PassResult
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class SplitHardSwish(Pass):
    """Turn the HardSwish behind a layer into ``x * HardSigmoid(x)``.

    onnxruntime's CPU provider has no kernel for HardSwish and does the same. But its integer kernel of Mul is
    found only when grids are looked for in the product, and HardSigmoid is no more than a Clip of levels
    (``clip-hard-sigmoid``). In the place of Dequantize, HardSigmoid, Mul and Quantize behind every layer of a
    MobileNet-V3 this saves a quarter of the network's time (``benchmarks/speed.py``).

    Only behind a layer whose weight lies on a grid: elsewhere nothing around it is in integers.
    """

    name = "split-hard-swish"
    requires = frozenset({Fact.NO_FAKE_QUANT, Fact.WEIGHT_SCALES})
    per_target = True

    def run(self, model: Model, ctx: Context) -> PassResult:
        split = 0
        for node in model.nodes("HardSwish"):
            source = node.inputs[0]
            if node.domain == "" and source is not None and _is_layer_on_grid(model, ctx, source.producer()):
                _split(model, node, source)
                split += 1
        return PassResult({"split": split})


def _is_layer_on_grid(model: Model, ctx: Context, layer: oir.Node | None) -> bool:
    rule = ctx.target.ops.get(layer.op_type) if layer is not None and layer.domain == "" else None
    if layer is None or rule is None or rule.contract is not Contract.COMPUTE or "Mul" not in ctx.target.ops:
        return False
    return layer.inputs[1] in model.scales


def _split(model: Model, node: oir.Node, source: oir.Value) -> None:
    gate = oir.node("HardSigmoid", [source], {"alpha": 1.0 / 6.0, "beta": 0.5})
    gate.name = model.unique_name(f"{node.name}_HardSigmoid")
    product = oir.node("Mul", [source, gate.outputs[0]], name=node.name)
    gate.outputs[0].name = model.unique_name(f"{node.outputs[0].name}_gate")
    for value in (gate.outputs[0], product.outputs[0]):
        value.type, value.shape = source.type, source.shape
    model.graph.insert_before(node, [gate, product])
    model.replace_value(node.outputs[0], product.outputs[0])
    model.remove(node)
