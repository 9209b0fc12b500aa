"""Take the fake quants off the activations, so that the float graph underneath can be fused."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as oir

from qat2int8.ir import Fact, Model
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.fake_quant import FakeQuant, drop_unused_initializers, fake_quants, remove
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class RemoveFakeQuant(Pass):
    """Let the consumers of a fake-quantized activation read the float tensor itself.

    The grids must have been gathered; they stand on that tensor. Fake quants of weights, and those no grid can
    be read from, stay.
    """

    name = "remove-fake-quant"
    requires = frozenset({Fact.INPUT_SCALES})
    provides = frozenset({Fact.NO_FAKE_QUANT})
    numerics = Numerics.QUANTIZING

    def run(self, model: Model, ctx: Context) -> PassResult:
        removed, freed = 0, dict[oir.Value, None]()
        for fake in fake_quants(model):
            if isinstance(fake, FakeQuant) and not fake.constant:
                freed.update(dict.fromkeys(_remove(model, fake)))
                removed += 1
        drop_unused_initializers(model, freed)
        return PassResult({"removed": removed})


def _remove(model: Model, fake: FakeQuant) -> list[oir.Value]:
    outputs = model.graph.outputs
    position = outputs.index(fake.output) if fake.output.is_graph_output() else None
    freed = remove(model, fake, fake.source)
    grid = model.scales.get(fake.source)
    if position is not None and grid is not None:
        model.scales.set(outputs[position], grid)
    return freed
