"""Read the fake quant of Paddle: the families fake_quantize, fake_dequantize and quantize_linear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as oir
import onnx_ir.passes.common as common

from qat2int8.ir import Code, Diagnostic, InvalidModel, Model, Severity, UnsupportedModel
from qat2int8.ir.quant import FloatArray
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.fake_quant import drop_unused_initializers
from qat2int8.passes.fake_quant_writer import Grid, NodeWriter, require_opset
from qat2int8.passes.gather_output_scales import KEY
from qat2int8.passes.output_channel import output_channel_axis
from qat2int8.passes.paddle_ops import (
    LEVELS,
    Role,
    attribute,
    channel_axis,
    grid_of,
    highest_of,
    is_paddle,
    levels_of,
    require_eight_bits,
    role_of,
    rounds_away,
    thresholds_of,
)
from qat2int8.passes.registry import register
from qat2int8.passes.scale_groups import is_movement

Array = npt.NDArray[Any]


@register
@dataclass(frozen=True)
class ReadPaddleFakeQuant(Pass):
    """Write Paddle's fake quant ops as Quantize, Clip, Dequantize, and frozen weights as integers.

    The ops keep their names and stand in any domain that is not ONNX's. Their thresholds t (``InScale``,
    ``Scale``, ``Scales``; the second input or an attribute) become steps t / 127. Three forms are read:

    - A quantizer with its dequantizer behind it, or one op that does both, on an activation or a weight.
    - A frozen layer: ``quantize -> Conv | MatMul | Gemm -> dequantize`` with whole numbers in float as weight.
      The dequantizer tells the weight's thresholds: ``127 * 127 / max_range``, or the first of its ``Scales``. The
      weight becomes ``w / 127 * t`` as integers behind a Dequantize, the layer reads the activation
      dequantized, and the dequantizer behind it goes.
    - An observer (``only_observer``, ``moving_average_abs_max_scale``): its threshold is noted on the node that
      computes the tensor as ``out_threshold``, which a fake quant on the same tensor overrules.

    The older ops round ties away from zero and ONNX to even, which is reported: constants are rounded here, as
    Paddle does it. A threshold of 0 says that nothing was observed; such a quantizer is taken off, and so is
    one that measures its threshold while the model runs. Numbers that are used otherwise, between quantizer and
    dequantizer, stay the float arithmetic they stand for.

    After steps 1.3 to 1.7 of Quant2Int8MkldnnPass. Unlike there the output channel of the layer says which axis of
    a weight the thresholds belong to, also for a square matrix.

    Raises:
        UnsupportedModel: not 8 bits, or whole numbers that are needed and have no threshold.
        InvalidModel: no threshold, one that is no magnitude, or as many as fit no axis of the weight.
    """

    name = "read-paddle-fake-quant"
    numerics = Numerics.QUANTIZING

    def run(self, model: Model, ctx: Context) -> PassResult:
        nodes = [node for node in model.graph.all_nodes() if is_paddle(node)]
        if not nodes:
            return PassResult({})
        for node in nodes:
            require_opset(model, node)
            require_eight_bits(node)
            _check_records(node)
        reader = _Reader(model, self)
        parameters = [value for node in nodes for value in node.inputs if value is not None]
        for node in nodes:
            reader.read(node)
        for node in nodes:
            if role_of(node) is Role.DEQUANTIZE:
                reader.dequantize(node)
        for node in nodes:
            reader.finish(node)
        infer = common.ShapeInferencePass()  # which ends at every op it does not know
        infer(model.ir)
        for node in reader.loose:
            reader.scale(node)
            infer(model.ir)
        drop_unused_initializers(model, [*parameters, *reader.records])
        return PassResult(reader.counts, tuple(reader.notes))


@dataclass(eq=False)
class _Reader:
    """One run of the pass.

    ``thresholds`` holds the quantizers of activations that are still there, None for those without a grid.
    ``in_reals`` are the uses of their outputs that mean the real number and no longer its level. ``loose`` are the
    dequantizers that stand alone, ``records`` the thresholds that quantizers passed on to dequantizers.
    """

    model: Model
    owner: Pass
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[Diagnostic] = field(default_factory=list)
    thresholds: dict[oir.Node, FloatArray | None] = field(default_factory=dict)
    in_reals: set[tuple[oir.Node, int]] = field(default_factory=set)
    loose: list[oir.Node] = field(default_factory=list)
    records: list[oir.Value] = field(default_factory=list)
    weights: dict[tuple[object, ...], oir.Value] = field(default_factory=dict)

    def read(self, node: oir.Node) -> None:
        """Everything but dequantizers, which need to know the quantizers."""
        role = role_of(node)
        if role is Role.DEQUANTIZE:
            return
        if role is Role.OBSERVE:
            self._observe(node)
            return
        thresholds, axis = thresholds_of(self.model, node), channel_axis(node)
        source = node.inputs[0]
        array = self.model.constant(source)
        if thresholds is not None and len(node.outputs) > 1 and node.outputs[1].name:
            kept = self.model.add_initializer(node.outputs[1].name, thresholds)
            node.outputs[1].replace_all_uses_with(kept)
            self.records.append(kept)
        if array is not None and thresholds is not None:
            _check_channels(node, array.shape, thresholds, axis)
            levels = levels_of(node, array, thresholds, axis)
            writer = NodeWriter(self.model, node)
            if role is Role.BOTH:
                writer.levels(levels, grid_of(node, thresholds, axis))
                self._count("weights read")
            else:
                writer.float_constant(levels)
            return
        if thresholds is not None and not np.any(thresholds):
            self._skipped(node, Code.FAKE_QUANT_DROPPED, "its threshold is 0: nothing was observed in training")
            thresholds = None
        elif thresholds is None:
            reason = "its threshold is measured on each input, so there is no grid"
            self._skipped(node, Code.UNSUPPORTED_FAKE_QUANT, reason)
        if role is Role.QUANTIZE:
            self.thresholds[node] = thresholds
        elif thresholds is None:
            self.model.bypass(node)
        else:
            self._write(node, thresholds)

    def dequantize(self, node: oir.Node) -> None:
        """Take off a dequantizer: with the quantizer before it, with its layer, or as the arithmetic it is."""
        source = node.inputs[0]
        if source is None:
            raise InvalidModel("input 0 is missing", where=f"{node.op_type} '{node.name}'")
        array, quantize = self.model.constant(source), source.producer()
        if array is not None and self._constant(node, array):
            return
        if quantize in self.thresholds and self._undoes(node, quantize):
            self.in_reals.update((use.node, use.idx) for use in node.outputs[0].uses())
            if node.outputs[0].is_graph_output():
                self.in_reals.add((quantize, _AS_OUTPUT))
            self.model.bypass(node)
        elif not self._frozen(node):
            self.loose.append(node)

    def finish(self, node: oir.Node) -> None:
        """Put Quantize and Dequantize in the place of a quantizer; levels that are read are made of its result."""
        if node not in self.thresholds:
            return
        thresholds, levels = self.thresholds[node], node.outputs[0]
        raw = [use for use in levels.uses() if (use.node, use.idx) not in self.in_reals]
        raw_output = levels.is_graph_output() and (node, _AS_OUTPUT) not in self.in_reals
        if raw or raw_output:
            self._restore_levels(node, thresholds, [(use.node, use.idx) for use in raw], raw_output)
        if thresholds is None:
            self.model.bypass(node)
        else:
            self._write(node, thresholds)

    # Quantizers

    def _write(self, node: oir.Node, thresholds: FloatArray) -> None:
        axis = channel_axis(node)
        source = node.inputs[0]
        if source is not None and source.shape is not None:
            _check_channels(node, tuple(source.shape), thresholds, axis)
        place = _place(node)
        if rounds_away(node):
            reason = "values halfway between two levels were rounded away from zero, from now on half to even"
            note = self.owner.note(Code.GRID_REQUANTIZED, reason, severity=Severity.NOTE, **place)
            self.notes.append(note)
        NodeWriter(self.model, node).fake_quant(grid_of(node, thresholds, axis))
        self._count("quantizers read")

    def _observe(self, node: oir.Node) -> None:
        source = node.inputs[0]
        maker = None if source is None else source.producer()
        observed = thresholds_of(self.model, node) if len(node.inputs) > 1 else None
        bears = maker is not None and not is_paddle(maker) and len(maker.outputs) == 1
        if maker is not None and bears and observed is not None and observed.ndim == 0:
            maker.metadata_props.setdefault(KEY, str(float(observed)))
        self.model.bypass(node)
        self._count("observers taken off")

    def _skipped(self, node: oir.Node, code: Code, reason: str) -> None:
        remedy = "train activations with fake_quantize_moving_average_abs_max, on data"
        self.notes.append(self.owner.note(code, f"taken off: {reason}", remedy=remedy, **_place(node)))
        self._count("quantizers without a grid taken off")

    def _restore_levels(
        self, node: oir.Node, thresholds: FloatArray | None, uses: list[tuple[oir.Node, int]], output: bool
    ) -> None:
        """Let what reads the levels of ``node`` read real numbers times the steps per unit."""
        if thresholds is None or thresholds.ndim:
            raise UnsupportedModel(
                "its whole numbers are read by something else than a dequantizer, and it has not one threshold",
                where=f"{node.op_type} '{node.name}'",
                remedy="export the model again, with a dequantizer behind each quantizer",
            )
        levels = node.outputs[0]
        factor = self.model.add_initializer(f"{levels.name}_levels", np.float32(LEVELS) / thresholds)
        name = self.model.unique_name(f"{levels.name}_whole")
        multiply = oir.node("Mul", [levels, factor], name=name)
        assert node.graph is not None
        node.graph.insert_after(node, multiply)
        multiply.outputs[0].name, multiply.outputs[0].type = name, oir.TensorType(oir.DataType.FLOAT)
        for reader, index in uses:
            reader.replace_input_with(index, multiply.outputs[0])
        if output:
            outputs, wanted = node.graph.outputs, levels.name
            outputs[outputs.index(levels)] = multiply.outputs[0]
            levels.name, multiply.outputs[0].name = self.model.unique_name(f"{wanted}_real"), wanted
        self._in_float(node)

    # Dequantizers

    def _constant(self, node: oir.Node, array: Array) -> bool:
        thresholds, axis = thresholds_of(self.model, node), channel_axis(node)
        if thresholds is None or not _are_levels(array) or highest_of(node) != LEVELS:
            return False
        _check_channels(node, array.shape, thresholds, axis)
        steps = _steps(thresholds)
        grid = Grid(steps, np.zeros(steps.shape, np.int32), -LEVELS - 1, LEVELS, axis if steps.ndim else None)
        NodeWriter(self.model, node, _STORAGE).levels(array, grid)
        self._count("weights read")
        return True

    def _undoes(self, node: oir.Node, quantize: oir.Node) -> bool:
        """Whether ``node`` gives back what ``quantize`` was given, rounded."""
        if highest_of(node) != LEVELS:
            return False
        there, back = self.thresholds[quantize], thresholds_of(self.model, node)
        if there is None:
            return back is None or not np.any(back)
        return back is not None and np.array_equal(there, back) and channel_axis(node) == channel_axis(quantize)

    def _frozen(self, node: oir.Node) -> bool:
        """Take ``node`` off behind a layer that computes with levels; False where there is no such layer."""
        result, _ = _moved_from(self.model, node, 0)
        layer = result.producer()
        if layer is None or layer.domain or layer.op_type not in _LAYERS or len(layer.inputs) > 2:
            return False
        weight, (levels, use) = layer.inputs[1], _moved_from(self.model, layer, 0)
        quantize, array = levels.producer(), self.model.constant(weight)
        thresholds = self._weight_thresholds(node)
        if array is None or weight is None or quantize not in self.thresholds or thresholds is None:
            return False
        if len(list(result.uses())) != 1 or result.is_graph_output():
            return False
        known, told = self.thresholds[quantize], thresholds_of(self.model, node, len(node.inputs) - 1)
        if known is not None and (told is None or not np.array_equal(known, told)):
            return False
        axis = None if thresholds.ndim == 0 else _weight_axis(layer, weight, array.shape, thresholds)
        layer.replace_input_with(1, self._weight(layer, weight, array, thresholds, axis))
        self.in_reals.add(use)
        self.model.bypass(node)
        self._count("weights read")
        return True

    def _weight_thresholds(self, node: oir.Node) -> FloatArray | None:
        """What a dequantizer behind a layer says of the layer's weight; None where it says nothing."""
        if "channel_wise" in node.op_type:
            return thresholds_of(self.model, node) if len(node.inputs) == 3 else None
        if node.op_type != "fake_dequantize_max_abs" or not highest_of(node) > 0:
            return None
        return np.asarray(LEVELS * LEVELS / highest_of(node), np.float32)

    def _weight(
        self,
        layer: oir.Node,
        weight: oir.Value,
        array: Array,
        thresholds: FloatArray,
        axis: int | None,
    ) -> oir.Value:
        """``w / 127 * t``: integers behind a Dequantize where the weight is whole, plain floats otherwise.

        Layers that share weight and thresholds share the result.
        """
        key = (weight, thresholds.tobytes(), axis)
        if key in self.weights:
            return self.weights[key]
        steps = _steps(thresholds)
        name = weight.name or "weight"
        if not _are_levels(array):
            spread = [1] * array.ndim
            if axis is not None:
                spread[axis] = -1
            floats = array.astype(np.float32) * (thresholds / np.float32(LEVELS)).reshape(spread)
            result = self.model.add_initializer(f"{name}_scaled", floats.astype(np.float32))
        else:
            integers = self.model.add_initializer(f"{name}_quantized", array.astype(np.int8))
            scale = self.model.add_initializer(f"{name}_scale", steps)
            zero_point = self.model.add_initializer(f"{name}_zero_point", np.zeros(steps.shape, np.int8))
            made = oir.node(
                "DequantizeLinear",
                [integers, scale, zero_point],
                {} if axis is None else {"axis": axis},
                name=self.model.unique_name(f"{name}_dequantized"),
            )
            anchor = layer if layer.graph is not self.model.graph else self.model.graph[0]
            self.model.insert_before(anchor, made)
            result = made.outputs[0]
            result.name, result.type = made.name, oir.TensorType(oir.DataType.FLOAT)
            result.shape = oir.Shape(array.shape)
        self.weights[key] = result
        return result

    def scale(self, node: oir.Node) -> None:
        """What a dequantizer computes, as one multiplication."""
        last = 2 if "channel_wise" in node.op_type and len(node.inputs) > 2 else 1
        known = [thresholds_of(self.model, node, index) for index in range(1, last + 1)]
        present = [each for each in known if each is not None]
        rank = None if node.inputs[0] is None or node.inputs[0].shape is None else len(node.inputs[0].shape)
        several = any(each.ndim for each in present)
        if len(present) < len(known) or (several and rank is None):
            raise UnsupportedModel(
                "its threshold is computed while the model runs, or the rank of its input is not known",
                where=f"{node.op_type} '{node.name}'",
                remedy="export the model again, in evaluation mode",
            )
        axis = channel_axis(node)
        if last > 1:
            axis = max(int(attribute(node, "x_num_col_dims", 1)), 1)
        factor: Array = np.ones((), np.float32)
        for each in present:
            factor = factor * (each / np.float32(highest_of(node)))
        if several:
            assert rank is not None
            factor = factor.reshape([-1 if index == axis else 1 for index in range(rank)])
        writer = NodeWriter(self.model, node)
        scale = writer.constant("scale", factor.astype(np.float32))
        writer.finish(writer.add("Mul", "dequantized", writer.source, scale))
        self._in_float(node)

    def _in_float(self, node: oir.Node) -> None:
        self._count("written in float")
        self.notes.append(
            self.owner.note(
                Code.UNSUPPORTED_FAKE_QUANT,
                f"kept in float: {node.op_type} is half of a pair, with no layer of constant weights in between",
                remedy="export the model with a dequantizer behind each quantizer or quantized layer",
                **_place(node),
            )
        )

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

_AS_OUTPUT = -1
"""The index of the use of a tensor as graph output."""

_STORAGE = (oir.DataType.FLOAT, oir.DataType.INT8)
"""In which types whole numbers are kept."""


def _steps(thresholds: FloatArray) -> FloatArray:
    """The steps of a weight; a channel with threshold 0 is zero throughout and gets 1."""
    return np.asarray(np.where(thresholds > 0, thresholds / np.float32(LEVELS), np.float32(1)), np.float32)


def _are_levels(array: Array) -> bool:
    return bool(np.all(np.abs(array.astype(np.float32)) <= LEVELS + 1) and np.all(array == np.rint(array)))


def _moved_from(model: Model, reader: oir.Node, index: int) -> tuple[oir.Value, tuple[oir.Node, int]]:
    """The tensor that data movement brings to ``reader`` alone, and where on that way it is read."""
    value = reader.inputs[index]
    assert value is not None
    while (
        (maker := value.producer()) is not None
        and is_movement(model, maker)
        and len(list(value.uses())) == 1
        and not value.is_graph_output()
        and maker.inputs[0] is not None
    ):
        value, reader, index = maker.inputs[0], maker, 0
    return value, (reader, index)


def _weight_axis(layer: oir.Node, weight: oir.Value, shape: Sequence[int], thresholds: FloatArray) -> int:
    axis = output_channel_axis(layer, len(shape))
    if axis is None or shape[axis] != thresholds.size:
        raise InvalidModel(
            f"the size of weight scales vector ({thresholds.size}) does not match the dimensions "
            f"({', '.join(map(str, shape))}) of the weights tensor {weight.name}",
            where=f"{layer.op_type} '{layer.name}'",
            remedy="give one threshold per output channel",
        )
    return axis


def _check_channels(node: oir.Node, shape: Sequence[object], thresholds: FloatArray, axis: int | None) -> None:
    if thresholds.ndim == 0:
        return
    if axis is None or axis >= len(shape) or (isinstance(shape[axis], int) and shape[axis] != thresholds.size):
        raise InvalidModel(
            f"{thresholds.size} thresholds do not match the dimensions ({', '.join(map(str, shape))}) of "
            f"'{node.inputs[0].name if node.inputs[0] is not None else ''}' on axis {axis}",
            where=f"{node.op_type} '{node.name}'",
            remedy="give one threshold per channel",
        )


def _check_records(node: oir.Node) -> None:
    """What training keeps beside the result may be read by dequantizers, and by nothing else."""
    for record in node.outputs[1:]:
        reads = [use.node for use in record.uses()]
        if record.is_graph_output() or any(not is_paddle(reader) for reader in reads):
            raise UnsupportedModel(
                f"'{record.name}', which only training needs, is read",
                where=f"{node.op_type} '{node.name}'",
                remedy="export the model in evaluation mode",
            )


def _place(node: oir.Node) -> dict[str, str]:
    return {"node": node.name or "", "value": node.outputs[0].name or ""}
