"""Take the fake quants off the activations, so that the float graph underneath can be fused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
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
    same whether or not it ends up in integers. Of two fake quants in a row only the second leaves its grid; where
    the first saturates earlier, a Clip takes its place.
    """

    name = "remove-fake-quant"
    requires = frozenset({Fact.INPUT_SCALES})
    provides = frozenset({Fact.NO_FAKE_QUANT})
    numerics = Numerics.UNCLAMPED

    def run(self, model: Model, ctx: Context) -> PassResult:
        removed, clipped, freed = 0, 0, dict[oir.Value, None]()
        quantized = dict[oir.Value, None]()
        for fake in fake_quants(model):
            if isinstance(fake, FakeQuant) and not fake.constant and not fake.is_given:
                source = _saturated(model, fake)
                clipped += source is not fake.source
                tensor, unused = _remove(model, fake, source)
                freed.update(dict.fromkeys(unused))
                quantized[tensor] = None
                removed += 1
        drop_unused_initializers(model, freed)
        restored = _restore_activations(model, quantized)
        return PassResult({"removed": removed, "clips": clipped, "activations restored": restored})


def _saturated(model: Model, fake: FakeQuant) -> oir.Value:
    """The source of ``fake``, behind a Clip where another grid is kept of it that ends further out."""
    output, params, kept = fake.output, fake.params, model.scales.get(fake.source)
    readers = {use.node.op_type for use in output.uses()}
    if kept is None or params.per_channel or kept.per_channel or "QuantizeLinear" not in readers:
        return fake.source
    if len(fake.source.uses()) > 1 or fake.source.is_graph_output() or output.is_graph_output():
        return fake.source
    span, half = params.interval, float(kept.scale) / 2
    if span.lo <= kept.interval.lo + half and span.hi >= kept.interval.hi - half:
        return fake.source
    ends = np.asarray([span.lo, span.hi], np.float32)
    bounds = [model.add_initializer(f"{output.name}_bound", np.asarray(end)) for end in ends]
    clip = oir.node("Clip", [fake.source, *bounds], name=model.unique_name(f"{fake.nodes[-1].name}_Clip"))
    result = clip.outputs[0]
    result.type, result.shape = output.type, output.shape
    result.name = model.unique_name(f"{output.name}_clipped")
    model.insert_before(fake.nodes[0], clip)
    model.scales.move(fake.source, result)
    return result


def _remove(model: Model, fake: FakeQuant, source: oir.Value) -> tuple[oir.Value, list[oir.Value]]:
    """Returns the tensor that was quantized, as it is known now, and the parameters nobody reads any more."""
    outputs = model.graph.outputs
    position = outputs.index(fake.output) if fake.output.is_graph_output() else None
    freed = remove(model, fake, source)
    grid = model.scales.get(source)
    if position is None:
        return source, freed
    if grid is not None:
        model.scales.set(outputs[position], grid)
        model.scales.move_trace(source, outputs[position])
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
