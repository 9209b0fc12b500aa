"""Make every weight a float initializer that lies on its trained grid."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as oir

from qat2int8.ir import Code, Diagnostic, Fact, FloatArray, Model, QuantParams
from qat2int8.passes.base import Context, Pass, PassResult
from qat2int8.passes.fake_quant import FakeQuant, drop_unused_initializers, fake_quants, remove
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class DequantizeWeights(Pass):
    """Replace the fake quant of each weight and bias by the float initializer it computes.

    A weight's entry in the scale table moves to the initializer, and quantizing the initializer with it gives
    back the integers of the fake quant, bit for bit; where float32 cannot hold that (steps near its smallest or
    largest numbers) the fake quant stays. A Transpose of such a weight is applied to it, so that later passes
    see a plain constant: the axis of its grid follows.
    """

    name = "dequantize-weights"
    requires = frozenset({Fact.WEIGHT_SCALES})
    provides = frozenset({Fact.FLOAT_WEIGHTS})

    def run(self, model: Model, ctx: Context) -> PassResult:
        work = _Dequantizer(model)
        notes = tuple(
            self._refused(fake)
            for fake in fake_quants(model)
            if isinstance(fake, FakeQuant) and fake.constant and not work.dequantize(fake)
        )
        work.drop_unused()
        return PassResult({"dequantized": work.dequantized, "transposes folded": work.transposed}, notes)

    def _refused(self, fake: FakeQuant) -> Diagnostic:
        return self.note(
            Code.UNSUPPORTED_FAKE_QUANT,
            "the weight is not a constant yet, or float32 does not give its integers back",
            node=fake.nodes[-1].name or "",
            value=fake.output.name or "",
            remedy="fold constants before, and look for NaN or extreme scales in the weight",
        )


@dataclass
class _Dequantizer:
    """One run of the pass, with what it made already: a weight that several nodes share is made once."""

    model: Model
    dequantized: int = 0
    transposed: int = 0
    _weights: dict[oir.Value, list[tuple[QuantParams, oir.Value]]] = field(default_factory=dict)
    _freed: dict[oir.Value, None] = field(default_factory=dict)
    _transposes: dict[tuple[oir.Value, tuple[int, ...]], oir.Value] = field(default_factory=dict)

    def dequantize(self, fake: FakeQuant) -> bool:
        """Put an initializer in the place of ``fake``; returns whether its values allow that."""
        made = self._weights.setdefault(fake.source, [])
        weight = next((value for params, value in made if params.same_grid(fake.params)), None)
        fresh = weight is None
        if weight is None:
            values = _values(self.model, fake)
            if values is None:
                return False
            weight = self.model.add_initializer(fake.output.name or "", values)
            made.append((fake.params, weight))
        is_output, readers = fake.output.is_graph_output(), _readers(fake.output)
        self.model.scales.move(fake.output, weight)
        self._freed.update(dict.fromkeys(remove(self.model, fake, weight)))
        if fresh:
            drop_unused_initializers(self.model, [fake.source])
        if fresh and fake.source.dtype is oir.DataType.FLOAT and not fake.source.is_initializer():
            weight.name = fake.source.name
        elif fresh and not is_output:
            weight.name = fake.output.name
        self.dequantized += 1
        self._fold_transposes(weight, readers)
        return True

    def _fold_transposes(self, weight: oir.Value, readers: Iterable[oir.Node]) -> None:
        """Replace each Transpose among the ``readers`` of ``weight`` by a transposed initializer."""
        grid, tensor = self.model.scales.get(weight), self.model.constant(weight)
        if grid is None or tensor is None:
            return
        for node in readers:
            output = node.outputs[0]
            if (node.domain, node.op_type) != ("", "Transpose") or node.graph is not self.model.graph:
                continue
            if output.is_graph_output():
                continue
            perm = tuple(node.attributes.get_ints("perm", ())) or tuple(reversed(range(tensor.ndim)))
            turned = self._transposes.get((weight, perm))
            fresh = turned is None
            if turned is None:
                turned = self.model.add_initializer(
                    output.name or "", np.ascontiguousarray(tensor.transpose(perm))
                )
                self._transposes[weight, perm] = turned
                axis = None if grid.axis is None else perm.index(grid.axis)
                self.model.scales.set(turned, grid.with_(axis=axis))
            next_readers = _readers(output)
            oir.convenience.replace_all_uses_with(output, turned)
            self.model.graph.remove(node, safe=True)
            if fresh:
                turned.name = output.name
            self.transposed += 1
            self._fold_transposes(turned, next_readers)

    def drop_unused(self) -> None:
        """Remove the scales nobody reads now, and the weights of which only transposes are read."""
        drop_unused_initializers(self.model, [*self._freed, *(weight for weight, _ in self._transposes)])


def _readers(value: oir.Value) -> list[oir.Node]:
    return list(dict.fromkeys(use.node for use in value.uses()))


def _values(model: Model, fake: FakeQuant) -> FloatArray | None:
    """What a constant fake quant computes, or None where quantizing that would not give its integers back."""
    source = model.constant(fake.source)
    if source is None:
        return None
    params = fake.params
    with np.errstate(over="ignore", invalid="ignore"):
        if fake.source.dtype is oir.DataType.FLOAT:
            if np.any(np.isnan(source)):
                return None
            integers = params.quantize(source)
        else:
            integers = np.clip(source, params.dtype.qmin, params.dtype.qmax)
        values = params.dequantize(integers)
        if not (fake.is_bias or _reversible(params)) and not np.array_equal(params.quantize(values), integers):
            return None
    return values


def _reversible(params: QuantParams) -> bool:
    """Whether ``quantize(dequantize(q)) == q`` needs no check: two roundings of relative size 2**-24 move a level
    of 16 bits by less than half, as long as the products are normal float32 numbers."""
    limits = np.finfo(np.float32)
    highest = float(params.scale.max()) * 2.0**params.dtype.bits
    return (
        params.dtype.bits <= 16 and float(params.scale.min()) >= float(limits.tiny) and highest < float(limits.max)
    )
