"""Tidy a graph of Q/DQ: cancel what undoes itself, merge what is double, move data as integers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import Contract, Model, Target
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.clamp import read_clamp
from qat2int8.passes.kernels import absorbs
from qat2int8.passes.qdq_step import Step, levels_of, read_step, reader_of
from qat2int8.passes.registry import register
from qat2int8.passes.scale_groups import is_movement, is_read


@register
@dataclass(frozen=True)
class OptimizeInt8(Pass):
    """Squash pairs of Dequantize and Quantize, after PaddlePaddle's ``cpu_quantize_squash_pass``.

    Exact:

    * Quantizers (and dequantizers) of one tensor with equal parameters become one.
    * ``DQ -> Q`` with equal parameters vanishes.
    * Q moves up and DQ down through data movement, so that pools, reshapes and concats work on integers. A
      selection is only moved onto integers that are there already, or quantizing what it drops would cost more
      than it saves. A MaxPool between two grids takes the second: rounding is monotone, so the maximum of what is
      rounded is the maximum rounded.
    * A Relu, Clip, Max or Min that the quantizer behind it computes by saturating vanishes.

    By float rounding:

    * A multiplication by a positive scalar goes into the scale of the Q behind it or the DQ before it.

    By at most half a step of the grid that goes:

    * ``op -> Q1 -> DQ -> Q2`` becomes ``op -> Q2``; where Q1 saturates earlier, an integer Clip does so instead.
    * ``DQ1 -> Q2 -> DQ2 -> op`` becomes ``DQ1 -> op`` where Q2 clips nothing and ``op`` has no int32 bias, whose
      step would be tied to the second grid.

    Rules of the original about fused residuals and bfloat16 have no counterpart in ONNX; the one that lets an op
    end in float is decided where quantizers are placed.
    """

    name = "optimize-int8"
    numerics = Numerics.QUANTIZING
    per_target = True

    def run(self, model: Model, ctx: Context) -> PassResult:
        squasher = _Squasher(model, ctx.target)
        while squasher.sweep():
            pass
        return PassResult(squasher.counts)


_WHOLE = frozenset({"DepthToSpace", "Flatten", "Reshape", "SpaceToDepth", "Squeeze", "Transpose", "Unsqueeze"})
"""Data movement that keeps every element once."""


class _Squasher:
    def __init__(self, model: Model, target: Target) -> None:
        self.model = model
        self.target = target
        self.counts: Counter[str] = Counter()

    def sweep(self) -> bool:
        """One round over all rules; whether anything changed.

        Every change removes a node, or moves a Q up or a DQ down as far as it gets, so the rounds come to an end.
        """
        before = self.counts.total()
        self.merge_duplicates()
        quantizers = list(self.model.nodes("QuantizeLinear"))[::-1]
        for node in quantizers:
            while self.scale_into_quantize(node) or self.absorb_activation(node) or self.quantize_up(node):
                pass
        waiting = list(self.model.nodes("DequantizeLinear"))[::-1]
        while waiting:
            node = waiting.pop()
            while self.scale_into_dequantize(node):
                pass
            waiting.extend(self.dequantize_down(node))
        for node in self.model.nodes("Concat"):
            self.concat_on_integers(node)
        for node in quantizers:
            if node.graph is not None:
                self.squash(node)
        return self.counts.total() > before

    # Rules

    def merge_duplicates(self) -> None:
        kept: dict[tuple[object, ...], oir.Node] = {}
        for node in self.model.nodes("QuantizeLinear", "DequantizeLinear"):
            step = read_step(self.model, node)
            if step is None or node.outputs[0].is_graph_output():
                continue
            first = kept.setdefault((node.op_type, node.inputs[0], *step.key), node)
            if first is not node:
                node.outputs[0].replace_all_uses_with(first.outputs[0])
                self.model.scales.move_trace(node.outputs[0], first.outputs[0])
                self.drop(node)
                self.counts["duplicates merged"] += 1

    def squash(self, quantize: oir.Node) -> None:
        second = read_step(self.model, quantize)
        first = self.step_before(quantize.inputs[0], "DequantizeLinear")
        if second is None or first is None:
            return
        if first.equals(second):
            self.squash_pair(first.node, quantize)
        elif first.movable and second.movable and not self.requantize_at_origin(first, second):
            self.skip_requantization(first, second)

    def squash_pair(self, dequantize: oir.Node, quantize: oir.Node) -> None:
        integers, result = dequantize.inputs[0], quantize.outputs[0]
        assert integers is not None
        if not result.is_graph_output():
            result.replace_all_uses_with(integers)
            self.model.scales.move_trace(result, integers)
        elif integers.producer() is not None and not integers.is_graph_output():
            self.model.replace_value(result, integers, keep_scale=False)
        else:
            return
        self.drop(quantize, dequantize)
        self.counts["dequantize-quantize pairs squashed"] += 1

    def requantize_at_origin(self, first: Step, second: Step) -> bool:
        """``x -> Q1 -> DQ1 -> Q2`` becomes ``x -> Q2``, clipped to the levels that Q1 lets through."""
        quantize, dequantize = second.node, first.node
        integers = dequantize.inputs[0]
        origin = self.step_before(integers, "QuantizeLinear")
        if (
            origin is None
            or integers is None
            or not origin.movable
            or (origin.zero, origin.zero_point.dtype) != (first.zero, first.zero_point.dtype)
            or reader_of(self.model, integers) is None
            or reader_of(self.model, dequantize.outputs[0]) is None
        ):
            return False
        bounds = [second.level_of((level - first.zero) * float(first.scale)) for level in first.type_levels]
        lowest, highest = levels_of(self.model, second)
        clips = bounds[0] > lowest or bounds[1] < highest
        if clips and self.model.opset < _OPSET_OF_INTEGER_CLIP:
            return False
        if float(origin.scale) != float(first.scale):
            # A factor went into DQ1; it goes into Q2 with it.
            scale = np.float32(float(second.scale) * float(origin.scale) / float(first.scale))
            if not _usable(scale):
                return False
            self.rescale(quantize, scale)
        quantize.replace_input_with(0, origin.node.inputs[0])
        self.drop(dequantize, origin.node)
        if clips:
            self.clip(quantize, bounds, second)
        self.counts["requantizations squashed"] += 1
        return True

    def skip_requantization(self, first: Step, second: Step) -> None:
        """``DQ1 -> Q2 -> DQ2 -> op`` becomes ``DQ1 -> op``."""
        reader = reader_of(self.model, second.node.outputs[0])
        third = read_step(self.model, reader[0]) if reader is not None else None
        if third is None or third.node.op_type != "DequantizeLinear" or not third.equals(second):
            return
        ends = [(level - first.zero) * float(first.scale) for level in first.type_levels]
        fits = [abs(end - (second.level_of(end) - second.zero) * float(second.scale)) for end in ends]
        result = third.node.outputs[0]
        if (
            max(fits) > float(second.scale) * _HALF
            or first.zero_point.dtype != second.zero_point.dtype
            or result.is_graph_output()
            or not all(self.takes_any_grid(use.node) for use in result.uses())
        ):
            return
        result.replace_all_uses_with(first.node.outputs[0])
        self.drop(third.node, second.node)
        self.counts["requantizations skipped"] += 1

    def quantize_up(self, quantize: oir.Node) -> bool:
        """``x -> move -> Q`` becomes ``x -> Q -> move``."""
        step, value = read_step(self.model, quantize), quantize.inputs[0]
        mover = value.producer() if value is not None else None
        if step is None or not step.movable or value is None or mover is None or not self.moves(mover):
            return False
        if reader_of(self.model, value) is None or mover.op_type == "Split":
            return False
        source = mover.inputs[0]
        assert source is not None
        if mover.op_type not in _WHOLE and not self.is_on_integers(source, step, pools=mover.op_type == "MaxPool"):
            return False
        if self.quantized_otherwise(source, step):
            return False
        quantize.replace_input_with(0, source)
        integers, moved = quantize.outputs[0], mover.outputs[0]
        self.model.graph.remove(quantize)
        self.model.graph.insert_before(mover, quantize)
        name, shape, type_ = integers.name, integers.shape, integers.type
        self.model.scales.discard(moved)
        integers.replace_all_uses_with(moved, replace_graph_outputs=True)
        self.model.scales.move_trace(integers, moved)
        mover.replace_input_with(0, integers)
        integers.name = self.model.unique_name(f"{source.name}_quantized")
        moved.name, moved.type = name, type_
        integers.shape = None if source.shape is None else source.shape.copy()
        moved.shape = shape
        self.pad_with_zero_point(mover, step)
        self.counts["quantizes moved up"] += 1
        return True

    def dequantize_down(self, dequantize: oir.Node) -> list[oir.Node]:
        """``DQ -> move`` becomes ``move -> DQ``, for every output of the move; returns those Dequantizes."""
        step, value = read_step(self.model, dequantize), dequantize.outputs[0]
        reader, integers = reader_of(self.model, value), dequantize.inputs[0]
        if step is None or not step.movable or reader is None or reader[1] != 0 or not self.moves(reader[0]):
            return []
        if integers is None or self.model.constant(integers) is not None:
            # A constant is for constant folding, and onnxruntime knows a weight behind a move as it is.
            return []
        mover = reader[0]
        mover.replace_input_with(0, integers)
        self.pad_with_zero_point(mover, step)
        twins: list[oir.Node] = []
        for moved in mover.outputs if mover.op_type == "Split" else mover.outputs[:1]:
            twin = oir.node("DequantizeLinear", [moved, *dequantize.inputs[1:]])
            twin.name = self.model.unique_name(f"{moved.name}_DequantizeLinear")
            result = twin.outputs[0]
            result.type = moved.type
            result.shape = None if moved.shape is None else moved.shape.copy()
            moved.replace_all_uses_with(result, replace_graph_outputs=True)
            twin.replace_input_with(0, moved)
            moved.type = integers.type
            self.model.scales.move(moved, result)
            result.name, moved.name = moved.name, self.model.unique_name(f"{moved.name}_quantized")
            if is_read(result):
                self.model.graph.insert_after(twins[-1] if twins else mover, twin)
                twins.append(twin)
            else:
                twin.replace_input_with(0, None)
                self.model.scales.discard(result)
        self.drop(dequantize)
        self.counts["dequantizes moved down"] += 1
        return twins

    def concat_on_integers(self, concat: oir.Node) -> None:
        """``DQ, DQ -> Concat -> Q`` with one grid everywhere becomes a Concat of integers."""
        output = concat.outputs[0]
        reader = reader_of(self.model, output)
        last = read_step(self.model, reader[0]) if reader is not None else None
        if last is None or last.node.op_type != "QuantizeLinear" or not last.movable:
            return
        if "Concat" not in self.target.ops:
            return
        sources = [self.step_before(value, "DequantizeLinear") for value in concat.inputs]
        dequantizers = [step.node for step in sources if step is not None and step.equals(last)]
        if len(dequantizers) < len(sources):
            return
        for index, dequantize in enumerate(dequantizers):
            concat.replace_input_with(index, dequantize.inputs[0])
        integers = last.node.outputs[0]
        output.type = integers.type
        self.model.scales.discard(output)
        self.model.replace_value(integers, output, keep_scale=False)
        self.drop(last.node, *dequantizers)
        self.counts["concats on integers"] += 1

    def absorb_activation(self, quantize: oir.Node) -> bool:
        """``x -> Relu -> Q`` becomes ``x -> Q`` where the quantizer saturates at least as early."""
        step, output = read_step(self.model, quantize), quantize.inputs[0]
        activation = output.producer() if output is not None else None
        if step is None or not step.movable or output is None or activation is None:
            return False
        clamp = read_clamp(self.model, activation)
        if clamp is None or reader_of(self.model, output) is None:
            return False
        if not absorbs(self.model, activation, step.scale, step.zero, levels_of(self.model, step)):
            return False
        source = clamp.source
        quantize.replace_input_with(0, source)
        if len(source.uses()) == 2 and not source.is_graph_output():
            # Only the activation and the quantizer are left: what was known of the clamped tensor is now
            # true of the one that the quantizer clamps.
            self.model.scales.move(output, source)
        self.drop(activation)
        self.counts["activations absorbed"] += 1
        return True

    def scale_into_quantize(self, quantize: oir.Node) -> bool:
        """``Mul(x, k) -> Q(s)`` becomes ``x -> Q(s / k)`` for a scalar k > 0."""
        step, value = read_step(self.model, quantize), quantize.inputs[0]
        product = value.producer() if value is not None else None
        factored = self.scalar_factor(product) if product is not None else None
        if step is None or value is None or product is None or factored is None:
            return False
        source, factor = factored
        with np.errstate(over="ignore", under="ignore"):
            scale = step.scale / factor
        if not _usable(scale) or reader_of(self.model, value) is None or self.quantized_otherwise(source, step):
            return False
        quantize.replace_input_with(0, source)
        self.rescale(quantize, scale)
        self.drop(product)
        self.counts["scalings absorbed"] += 1
        return True

    def scale_into_dequantize(self, dequantize: oir.Node) -> bool:
        """``DQ(s) -> Mul(k)`` becomes ``DQ(s * k)`` for a scalar k > 0."""
        step, value = read_step(self.model, dequantize), dequantize.outputs[0]
        reader = reader_of(self.model, value)
        factored = self.scalar_factor(reader[0]) if reader is not None else None
        if step is None or reader is None or factored is None or factored[0] is not value:
            return False
        with np.errstate(over="ignore", under="ignore"):
            scale = step.scale * factored[1]
        if not _usable(scale):
            return False
        self.rescale(dequantize, scale)
        self.model.scales.discard(value)
        self.model.scales.move(reader[0].outputs[0], value)
        self.model.bypass_to(reader[0], value)
        self.counts["scalings absorbed"] += 1
        return True

    # Helpers

    def step_before(self, value: oir.Value | None, op_type: str) -> Step | None:
        """The Quantize or Dequantize of the main graph that computes ``value``."""
        node = value.producer() if value is not None else None
        if node is None or node.op_type != op_type or node.graph is not self.model.graph:
            return None
        return read_step(self.model, node)

    def is_on_integers(self, value: oir.Value, step: Step, *, pools: bool) -> bool:
        """Whether a Q of ``value`` would only turn integers into integers, at no cost or once instead of twice.

        A pool of floats between two quantizers costs more than the Q of all it reads.
        """
        dequantize = self.step_before(value, "DequantizeLinear")
        if dequantize is None:
            return False
        if pools:
            return True
        integers = dequantize.node.inputs[0]
        if dequantize.equals(step):
            return True
        return (
            integers is not None
            and self.step_before(integers, "QuantizeLinear") is not None
            and reader_of(self.model, integers) is not None
            and reader_of(self.model, value) is not None
        )

    def moves(self, node: oir.Node) -> bool:
        rule = self.target.ops.get(node.op_type)
        if rule is None or rule.contract is not Contract.MOVEMENT or node.graph is not self.model.graph:
            return False
        if node.op_type != "Split" and any(is_read(output) for output in node.outputs[1:]):
            return False
        return is_movement(self.model, node)

    def takes_any_grid(self, node: oir.Node) -> bool:
        """Whether ``node`` is an integer kernel that no bias ties to the step of its input."""
        rule = self.target.ops.get(node.op_type) if node.domain == "" else None
        if rule is None or rule.contract is Contract.MOVEMENT or node.graph is not self.model.graph:
            return False
        return rule.contract is Contract.ELEMENTWISE or len(node.inputs) < 3 or node.inputs[2] is None

    def quantized_otherwise(self, value: oir.Value, step: Step) -> bool:
        """Whether another quantizer of ``value`` disagrees: a second one would keep its producer in float."""
        if self.step_before(value, "DequantizeLinear") is not None:
            return False
        for use in value.uses():
            if use.node.op_type == "QuantizeLinear" and use.node is not step.node:
                other = read_step(self.model, use.node)
                if other is None or not other.equals(step):
                    return True
        return False

    def pad_with_zero_point(self, mover: oir.Node, step: Step) -> None:
        if mover.op_type != "Pad" or mover.attributes.get_string("mode", "constant") != "constant":
            return
        filler = self.model.add_initializer(f"{mover.outputs[0].name}_filler", step.zero_point)
        mover.resize_inputs(max(3, len(mover.inputs)))
        mover.replace_input_with(2, filler)

    def clip(self, quantize: oir.Node, bounds: list[int], step: Step) -> None:
        """Let an integer Clip to ``bounds`` follow ``quantize``, whose result keeps its name behind it."""
        result = quantize.outputs[0]
        limits = [
            self.model.add_initializer(f"{result.name}_level", np.asarray(bound, step.zero_point.dtype))
            for bound in bounds
        ]
        node = oir.node("Clip", [result, *limits], name=self.model.unique_name(f"{result.name}_Clip"))
        self.model.graph.insert_after(quantize, node)
        clipped = node.outputs[0]
        result.replace_all_uses_with(clipped, replace_graph_outputs=True)
        self.model.scales.move_trace(result, clipped)
        node.replace_input_with(0, result)
        clipped.type, clipped.shape = result.type, None if result.shape is None else result.shape.copy()
        clipped.name, result.name = result.name, self.model.unique_name(f"{result.name}_unclipped")

    def scalar_factor(self, node: oir.Node) -> tuple[oir.Value, np.float32] | None:
        """(x, k) of ``x * k`` with one constant float k > 0, or None."""
        if node.op_type != "Mul" or node.domain != "" or node.graph is not self.model.graph:
            return None
        for index in (0, 1):
            factor, source = self.model.constant(node.inputs[index]), node.inputs[1 - index]
            if factor is not None and factor.dtype == np.float32 and factor.size == 1 and source is not None:
                value = np.float32(factor.item())
                same_rank = factor.ndim == 0 or (source.shape is not None and factor.ndim <= len(source.shape))
                return (source, value) if _usable(value) and same_rank else None
        return None

    def rescale(self, node: oir.Node, scale: npt.NDArray[np.float32] | np.float32) -> None:
        name = f"{node.outputs[0].name}_scale"
        node.replace_input_with(1, self.model.add_initializer(name, np.asarray(scale, np.float32)))

    def drop(self, *nodes: oir.Node) -> None:
        """Remove those of ``nodes`` that nobody reads any more."""
        for node in nodes:
            if node.graph is not None and not any(is_read(output) for output in node.outputs):
                self.model.remove(node)


_OPSET_OF_INTEGER_CLIP = 12
_HALF = 0.5 + 1e-4
"""Half a step, and some float rounding."""


def _usable(scale: npt.NDArray[np.float32] | np.float32) -> bool:
    """Whether ``scale`` is a step: positive, finite, and not so small that digits are lost."""
    return bool(np.all(np.isfinite(scale)) and np.all(scale >= np.finfo(np.float32).tiny))
