"""Read the grids that activations were trained on out of their fake quants."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as oir

from qat2int8.ir import Code, Diagnostic, Fact, Model, QuantParams, ScaleTable, TrainedTensor
from qat2int8.passes.base import Context, Pass, PassResult
from qat2int8.passes.fake_quant import FakeQuant, Refusal, fake_quants
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class GatherInputScales(Pass):
    """Record the grid of every fake-quantized activation on the float tensor that is quantized.

    A graph input that holds integers, as TensorFlow Lite's models have it, is dequantized and never quantized: its
    grid stands on the dequantized tensor.

    Where one fake quant follows another directly, both speak of the same tensor, the one in front of the first;
    if they differ, the last one is kept, because its consumers were trained on it. Where two fake quants
    read one tensor side by side, the wider grid is kept. Both cases are reported.

    Raises:
        InvalidModel: a scale, zero point or axis is wrong.
    """

    name = "gather-input-scales"
    requires = frozenset({Fact.CONSTANTS_LIFTED})
    provides = frozenset({Fact.INPUT_SCALES})

    def run(self, model: Model, ctx: Context) -> PassResult:
        found, roots, last = ScaleTable(), dict[oir.Value, FakeQuant](), dict[oir.Value, FakeQuant]()
        notes: list[Diagnostic | None] = []
        for fake in fake_quants(model):
            if fake.constant:
                continue
            if isinstance(fake, Refusal):
                notes.append(self.note(Code.UNSUPPORTED_FAKE_QUANT, fake.reason, **fake.where))
                continue
            before = roots.get(fake.source)
            root = fake.source if before is None else _root(fake.source, roots)
            roots[fake.output] = fake
            last[root] = fake
            if before is None:
                notes.append(found.record(root, fake.params, node=fake.nodes[-1].name or ""))
            elif not found[root].same_grid(fake.params):
                notes.append(self._chained(root, found[root], fake))
                found.set(root, fake.params)
        gathered = 0
        for value, params in found.items():
            present = model.scales.get(value)
            notes.append(model.scales.record(value, params))
            gathered += model.scales[value] is not present
            if model.scales.traced(value) is None:
                fake = last[value]
                model.scales.trace(value, TrainedTensor.of(fake.source, fake.nodes[:-1], params))
        return PassResult(
            {"gathered": gathered}, tuple(replace(note, pass_name=self.name) for note in notes if note)
        )

    def _chained(self, root: oir.Value, lost: QuantParams, fake: FakeQuant) -> Diagnostic:
        return self.note(
            Code.SCALE_CONFLICT,
            f"two grids one after the other: {fake.params} from {fake.params.origin} is used, "
            f"{lost} from {lost.origin} is not",
            node=fake.nodes[-1].name or "",
            value=root.name or "",
            remedy="give both one shared quantizer in training",
        )


def _root(value: oir.Value, fakes: dict[oir.Value, FakeQuant]) -> oir.Value:
    """The tensor in front of the first of a chain of fake quants."""
    while value in fakes and not fakes[value].is_given:
        value = fakes[value].source
    return value
