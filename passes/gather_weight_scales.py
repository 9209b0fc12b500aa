"""Read the grids that weights were trained on out of their fake quants."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qat2int8.ir import Code, Diagnostic, Fact, Model
from qat2int8.passes.base import Context, Pass, PassResult
from qat2int8.passes.fake_quant import Refusal, fake_quants
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class GatherWeightScales(Pass):
    """Record the grid of every weight that is fake quantized or stored quantized.

    The entry stands on the output of the DequantizeLinear, the float value the weight will be, until
    dequantize-weights puts an initializer there. Biases (int32) get none: their scale is always that of the
    input times that of the weight.

    Raises:
        InvalidModel: a scale, zero point or axis is wrong.
    """

    name = "gather-weight-scales"
    requires = frozenset({Fact.CONSTANTS_LIFTED})
    provides = frozenset({Fact.WEIGHT_SCALES})

    def run(self, model: Model, ctx: Context) -> PassResult:
        gathered, notes = 0, list[Diagnostic]()
        for fake in fake_quants(model):
            if not fake.constant:
                continue
            if isinstance(fake, Refusal):
                notes.append(self.note(Code.UNSUPPORTED_FAKE_QUANT, fake.reason, **fake.where))
            elif not fake.is_bias:
                before = model.scales.get(fake.output)
                conflict = model.scales.record(fake.output, fake.params, node=fake.nodes[-1].name or "")
                gathered += model.scales[fake.output] is not before
                if conflict is not None:
                    notes.append(replace(conflict, pass_name=self.name))
        return PassResult({"gathered": gathered}, tuple(notes))
