"""Tidy a graph of Q/DQ: cancel what undoes itself, merge what is double, move data as integers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import Contract, Model, QuantDType, QuantParams, Target
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.kernels import absorbs
from qat2int8.passes.registry import register
from qat2int8.passes.scale_groups import is_movement


@register
@dataclass(frozen=True)
class OptimizeInt8(Pass):
    """Squash pairs of Dequantize and Quantize, after PaddlePaddle's ``cpu_quantize_squash_pass``.

    * Quantizers (and dequantizers) of one tensor with equal parameters become one.
    * ``DQ -> Q`` with equal parameters vanishes; ``op -> Q1 -> DQ -> Q2`` becomes ``op -> Q2``.
    * Q moves up and DQ down through data movement, so that pools, reshapes and concats work on integers.
    * A Relu or Clip that the quantizer behind it computes by saturating vanishes.
    * A multiplication by a positive scalar goes into the scale of the Q behind it or the DQ before it.

    Rules of the original about fused residuals and bfloat16 have no counterpart in ONNX; the one that lets an op
    end in float is decided where quantizers are placed.
    """

    name = "optimize-int8"
    numerics = Numerics.QUANTIZING

    def run(self, model: Model, ctx: Context) -> PassResult:
        squasher = _Squasher(model, ctx.target)
        while squasher.sweep():
            pass
        return PassResult(squasher.counts)


@dataclass(frozen=True, eq=False)
class _Step:
    """A Quantize or Dequantize node with constant parameters."""

    node: oir.Node
    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.generic]
    axis: int | None

    def equals(self, other: _Step) -> bool:
        return (
            self.axis == other.axis
            and self.zero_point.dtype == other.zero_point.dtype
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
        )

    @property
    def key(self) -> tuple[object, ...]:
        return self.axis, self.zero_point.dtype.str, self.scale.tobytes(), self.zero_point.tobytes()


class _Squasher:
    def __init__(self, model: Model, target: Target) -> None:
        self.model = model
        self.target = target
        self.counts: Counter[str] = Counter()

    def sweep(self) -> bool:
        """One round over all rules; whether anything changed. Every change removes a node or moves a Q up or
        a DQ down, so the rounds come to an end."""
        before = sum(self.counts.values())
        self.merge_duplicates()
        for node in reversed(list(self.model.nodes("QuantizeLinear"))):
            self.scale_into_quantize(node)
            self.quantize_up(node)
        for node in self.model.nodes("DequantizeLinear"):
            self.scale_into_dequantize(node)
            self.dequantize_down(node)
        for node in self.model.nodes("Concat"):
            self.concat_on_integers(node)
        for node in self.model.nodes("QuantizeLinear"):
            self.squash(node)
        for node in self.model.nodes("Relu", "Clip"):
            self.absorb_activation(node)
        return sum(self.counts.values()) > before

    # Rules

    def merge_duplicates(self) -> None:
        kept: dict[tuple[object, ...], oir.Node] = {}
        for node in self.model.nodes("QuantizeLinear", "DequantizeLinear"):
            step = self.step(node)
            if step is None or node.outputs[0].is_graph_output():
                continue
            first = kept.setdefault((node.op_type, node.inputs[0], *step.key), node)
            if first is not node:
                node.outputs[0].replace_all_uses_with(first.outputs[0])
                self.drop(node)
                self.counts["duplicates merged"] += 1

    def squash(self, quantize: oir.Node) -> None:
        second, dequantize = self.step(quantize), _producer(quantize.inputs[0], "DequantizeLinear")
        first = self.step(dequantize) if dequantize is not None else None
        if second is None or first is None or dequantize is None:
            return
        integers = dequantize.inputs[0]
        assert integers is not None
        if first.equals(second):
            if quantize.outputs[0].is_graph_output():
                return
            quantize.outputs[0].replace_all_uses_with(integers)
            self.drop(quantize, dequantize)
            self.counts["dequantize-quantize pairs squashed"] += 1
            return
        origin = _producer(integers, "QuantizeLinear")
        if (
            origin is None
            or not _only_reader(integers, dequantize)
            or not _only_reader(dequantize.outputs[0], quantize)
        ):
            return
        quantize.replace_input_with(0, origin.inputs[0])
        self.drop(dequantize, origin)
        self.counts["requantizations squashed"] += 1

    def quantize_up(self, quantize: oir.Node) -> None:
        """``x -> move -> Q`` becomes ``x -> Q -> move``."""
        step, value = self.step(quantize), quantize.inputs[0]
        mover = value.producer() if value is not None else None
        if step is None or step.axis is not None or value is None or mover is None:
            return
        if len(mover.outputs) != 1 or not self.moves(mover) or not _only_reader(value, quantize):
            return
        source = mover.inputs[0]
        assert source is not None
        whole = mover.op_type in ("Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
        if not whole and _producer(source, "DequantizeLinear") is None:
            # Quantizing elements that a selection then drops costs more than it saves.
            return
        if self.quantized_otherwise(source, step):
            return
        quantize.replace_input_with(0, source)
        integers, moved = quantize.outputs[0], mover.outputs[0]
        self.model.graph.remove(quantize)
        self.model.graph.insert_before(mover, quantize)
        name, shape, type_ = integers.name, integers.shape, integers.type
        integers.replace_all_uses_with(moved, replace_graph_outputs=True)
        mover.replace_input_with(0, integers)
        integers.name = None
        moved.name, moved.type = name, type_
        integers.name, integers.shape = self.model.unique_name(f"{source.name}_quantized"), source.shape
        moved.shape = shape
        self.pad_with_zero_point(mover, step)
        self.counts["quantizes moved up"] += 1

    def dequantize_down(self, dequantize: oir.Node) -> None:
        """``DQ -> move`` becomes ``move -> DQ``, for every output of the move."""
        step, value = self.step(dequantize), dequantize.outputs[0]
        uses = list(value.uses())
        if step is None or step.axis is not None or value.is_graph_output() or len(uses) != 1 or uses[0].idx != 0:
            return
        mover = uses[0].node
        if not self.moves(mover):
            return
        integers = dequantize.inputs[0]
        assert integers is not None
        mover.replace_input_with(0, integers)
        self.pad_with_zero_point(mover, step)
        behind = mover
        for moved in mover.outputs:
            twin = oir.node("DequantizeLinear", [moved, *dequantize.inputs[1:]])
            twin.name = self.model.unique_name(f"{moved.name}_DequantizeLinear")
            result = twin.outputs[0]
            result.type, result.shape = moved.type, moved.shape
            moved.type = integers.type
            for use in list(moved.uses()):
                if use.node is not twin:
                    use.node.replace_input_with(use.idx, result)
            outputs = self.model.graph.outputs
            if moved.is_graph_output():
                outputs[list(outputs).index(moved)] = result
            result.name, moved.name = moved.name, self.model.unique_name(f"{moved.name}_quantized")
            self.model.graph.insert_after(behind, twin)
            behind = twin
        self.drop(dequantize)
        self.counts["dequantizes moved down"] += 1

    def concat_on_integers(self, concat: oir.Node) -> None:
        """``DQ, DQ -> Concat -> Q`` with one grid everywhere becomes a Concat of integers."""
        output = concat.outputs[0]
        uses = list(output.uses())
        last = self.step(uses[0].node) if len(uses) == 1 and uses[0].node.op_type == "QuantizeLinear" else None
        if last is None or last.axis is not None or output.is_graph_output() or "Concat" not in self.target.ops:
            return
        sources = []
        for value in concat.inputs:
            dequantize = _producer(value, "DequantizeLinear") if value is not None else None
            step = self.step(dequantize) if dequantize is not None else None
            if step is None or dequantize is None or not step.equals(last):
                return
            sources.append(dequantize)
        for index, dequantize in enumerate(sources):
            concat.replace_input_with(index, dequantize.inputs[0])
        integers = last.node.outputs[0]
        output.type = integers.type
        if integers.is_graph_output():
            self.model.replace_value(integers, output, keep_scale=False)
        else:
            integers.replace_all_uses_with(output)
        self.drop(last.node, *sources)
        self.counts["concats on integers"] += 1

    def absorb_activation(self, activation: oir.Node) -> None:
        output = activation.outputs[0]
        uses = list(output.uses())
        if len(uses) != 1 or output.is_graph_output() or uses[0].node.op_type != "QuantizeLinear":
            return
        step = self.step(uses[0].node)
        if step is None or step.axis is not None or activation.op_type not in self.target_absorbs():
            return
        params = QuantParams.make(step.scale, step.zero_point, self.levels(step))
        if absorbs(self.model, params, activation):
            source = activation.inputs[0]
            assert source is not None
            uses[0].node.replace_input_with(0, source)
            if len(source.uses()) == 2 and not source.is_graph_output():
                # Only the activation and the quantizer are left: what was known of the clamped tensor is now
                # true of the one that the quantizer clamps.
                self.model.scales.move(output, source)
            self.drop(activation)
            self.counts["activations absorbed"] += 1

    def scale_into_quantize(self, quantize: oir.Node) -> None:
        """``Mul(x, k) -> Q(s)`` becomes ``x -> Q(s / k)`` for a scalar k > 0."""
        step, value = self.step(quantize), quantize.inputs[0]
        product = _producer(value, "Mul") if value is not None else None
        factored = self.scalar_factor(product) if product is not None else None
        if (
            step is None
            or value is None
            or product is None
            or factored is None
            or not _only_reader(value, quantize)
        ):
            return
        source, factor = factored
        if self.quantized_otherwise(source, step):
            return
        quantize.replace_input_with(0, source)
        self.rescale(quantize, step.scale / np.float32(factor))
        self.drop(product)
        self.counts["scalings absorbed"] += 1

    def scale_into_dequantize(self, dequantize: oir.Node) -> None:
        """``DQ(s) -> Mul(k)`` becomes ``DQ(s * k)`` for a scalar k > 0."""
        step, value = self.step(dequantize), dequantize.outputs[0]
        uses = list(value.uses())
        if step is None or len(uses) != 1 or value.is_graph_output():
            return
        product = uses[0].node
        factored = self.scalar_factor(product)
        if factored is None or factored[0] is not value:
            return
        self.rescale(dequantize, step.scale * np.float32(factored[1]))
        self.model.bypass_to(product, value)
        self.counts["scalings absorbed"] += 1

    # Helpers

    def step(self, node: oir.Node) -> _Step | None:
        scale, zero_point = (self.model.constant(value) for value in (*node.inputs, None)[1:3])
        if scale is None or scale.dtype != np.float32 or zero_point is None:
            return None
        axis = None if scale.size == 1 else node.attributes.get_int("axis", 1)
        return _Step(node, scale.astype(np.float32, copy=False), zero_point, axis)

    def levels(self, step: _Step) -> QuantDType:
        """The levels that survive a Quantize: an integer Clip right behind it narrows them."""
        full = QuantDType.of_storage(oir.DataType.from_numpy(step.zero_point.dtype))
        assert full is not None
        uses = list(step.node.outputs[0].uses())
        if len(uses) == 1 and uses[0].node.op_type == "Clip" and len(uses[0].node.inputs) == 3:
            top = self.model.constant(uses[0].node.inputs[2])
            for bits in range(2, 8):
                narrow = QuantDType(bits, full.signed)
                if top is not None and int(top) == narrow.qmax:
                    return narrow
        return full

    def moves(self, node: oir.Node) -> bool:
        rule = self.target.ops.get(node.op_type)
        return rule is not None and rule.contract is Contract.MOVEMENT and is_movement(self.model, node)

    def target_absorbs(self) -> set[str]:
        return {name for rule in self.target.ops.values() for name in rule.absorbs}

    def quantized_otherwise(self, value: oir.Value, step: _Step) -> bool:
        """Whether another quantizer of ``value`` disagrees: a second one would keep its producer in float."""
        for use in value.uses():
            if use.node.op_type == "QuantizeLinear" and use.node is not step.node:
                other = self.step(use.node)
                if other is None or not other.equals(step):
                    return True
        return False

    def pad_with_zero_point(self, mover: oir.Node, step: _Step) -> None:
        if mover.op_type != "Pad" or mover.attributes.get_string("mode", "constant") != "constant":
            return
        filler = self.model.add_initializer(f"{mover.name}_value", step.zero_point.reshape(()))
        while len(mover.inputs) < 3:
            mover.resize_inputs(len(mover.inputs) + 1)
        mover.replace_input_with(2, filler)

    def scalar_factor(self, node: oir.Node) -> tuple[oir.Value, float] | None:
        """(x, k) of ``x * k`` with one constant float k > 0, or None."""
        if node.op_type != "Mul" or node.domain != "":
            return None
        for index in (0, 1):
            factor, source = self.model.constant(node.inputs[index]), node.inputs[1 - index]
            if factor is not None and factor.dtype == np.float32 and factor.size == 1 and source is not None:
                value = float(factor.reshape(-1)[0])
                same_rank = source.shape is not None and factor.ndim <= len(source.shape)
                return (source, value) if value > 0.0 and np.isfinite(value) and same_rank else None
        return None

    def rescale(self, node: oir.Node, scale: npt.NDArray[np.float32]) -> None:
        node.replace_input_with(1, self.model.add_initializer("scale", np.asarray(scale, np.float32)))

    def drop(self, *nodes: oir.Node) -> None:
        """Remove those of ``nodes`` that nobody reads any more."""
        for node in nodes:
            if node.graph is not None and not any(out.uses() or out.is_graph_output() for out in node.outputs):
                self.model.remove(node)


def _producer(value: oir.Value | None, op_type: str) -> oir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def _only_reader(value: oir.Value, node: oir.Node) -> bool:
    return not value.is_graph_output() and all(use.node is node for use in value.uses())
