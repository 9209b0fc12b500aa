"""Take the fake quants off the activations, so that the float graph underneath can be fused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as oir

from qat2int8.ir import Fact, Model
from qat2int8.ir.ranges import Ranges
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.fake_quant import FakeQuant, drop_unused_initializers, fake_quants, remove
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class RemoveFakeQuant(Pass):
    """Let the consumers of a fake-quantized activation read the float tensor itself.

    The grids must have been gathered; they stand on that tensor. Fake quants of weights, and those no grid can
    be read from, stay. So does the Dequantize of a graph input that holds integers.

    A grid that starts at zero on a tensor that can be negative is a Relu as well: exporters that quantize leave
    the Relu itself out, because the quantizer saturates there. It is put back, so that the layer computes the
    same whether or not it ends up in integers.
    """

    name = "remove-fake-quant"
    requires = frozenset({Fact.INPUT_SCALES})
    provides = frozenset({Fact.NO_FAKE_QUANT})
    numerics = Numerics.UNCLAMPED

    def run(self, model: Model, ctx: Context) -> PassResult:
        removed, freed = 0, dict[oir.Value, None]()
        quantized = dict[oir.Value, None]()
        for fake in fake_quants(model):
            if isinstance(fake, FakeQuant) and not fake.constant and not fake.is_given:
                tensor, unused = _remove(model, fake)
                freed.update(dict.fromkeys(unused))
                quantized[tensor] = None
                removed += 1
        drop_unused_initializers(model, freed)
        return PassResult({"removed": removed, "activations restored": _restore_activations(model, quantized)})


def _remove(model: Model, fake: FakeQuant) -> tuple[oir.Value, list[oir.Value]]:
    """Returns the tensor that was quantized, as it is known now, and the parameters nobody reads any more."""
    outputs = model.graph.outputs
    position = outputs.index(fake.output) if fake.output.is_graph_output() else None
    freed = remove(model, fake, fake.source)
    grid = model.scales.get(fake.source)
    if position is None:
        return fake.source, freed
    if grid is not None:
        model.scales.set(outputs[position], grid)
        model.scales.move_trace(fake.source, outputs[position])
    return outputs[position], freed


def _restore_activations(model: Model, quantized: Iterable[oir.Value]) -> int:
    ranges, restored = Ranges(model), 0
    for value in quantized:
        grid = model.scales.get(value)
        if grid is None or grid.interval.lo < 0.0 or ranges.raw(value).nonnegative:
            continue
        relu = oir.node("Relu", [value], name=model.unique_name(f"{value.name}_Relu"))
        clamped = relu.outputs[0]
        clamped.type, clamped.shape = value.type, value.shape
        producer = value.producer()
        if producer is not None:
            model.graph.insert_after(producer, relu)
        else:
            model.graph.insert_before(model.graph[0], relu)
        for use in list(value.uses()):
            if use.node is not relu:
                use.node.replace_input_with(use.idx, clamped)
        _hand_over(model, value, clamped)
        restored += 1
    return restored


def _hand_over(model: Model, value: oir.Value, clamped: oir.Value) -> None:
    """``clamped`` is the tensor that has the grid, and the graph output if ``value`` was one."""
    model.scales.move(value, clamped)
    name = value.name or ""
    if value.is_graph_output():
        outputs = model.graph.outputs
        outputs[outputs.index(value)] = clamped
        value.name = model.unique_name(f"{name}_unclamped")
        clamped.name = name
    else:
        clamped.name = model.unique_name(f"{name}_clamped")
