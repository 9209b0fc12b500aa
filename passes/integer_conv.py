"""A convolution between Dequantize and Quantize nodes, with constants whose channels can be changed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import Model
from qat2int8.passes.qdq_step import Step, read_step, reader_of

__all__ = ["ConstantOperand", "IntegerConv", "integers_behind", "read_integer_conv"]

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, eq=False)
class ConstantOperand:
    """Integers behind a Dequantize with constant parameters, as input ``index`` of a layer.

    Attributes:
        index: which input of the layer.
        step: the Dequantize.
        levels: the integers.
    """

    index: int
    step: Step
    levels: Array

    def replace(self, model: Model, node: oir.Node, levels: Array, channels: Array | None = None) -> None:
        """Let ``node`` read ``levels``; whoever else reads the old ones goes on to.

        Args:
            model: the model ``node`` is in.
            node: the layer.
            levels: the new integers.
            channels: for every output channel of the new integers, of which old one it has step and zero point;
                None where they stay.
        """
        old = self.step.node
        name = old.inputs[0].name if old.inputs[0] is not None else self.step.node.name
        parameters = list(old.inputs[1:3])
        if channels is not None:
            parameters = [
                model.add_initializer(f"{name}_{label}", array if self.step.axis is None else array[channels])
                for label, array in (("scale", self.step.scale), ("zero_point", self.step.zero_point))
            ]
        integers = model.add_initializer(f"{name}_laid_out", levels)
        twin = oir.node("DequantizeLinear", [integers, *parameters])
        twin.name = model.unique_name(f"{integers.name}_DequantizeLinear")
        twin.attributes.update(old.attributes)
        result = twin.outputs[0]
        result.name = model.unique_name(f"{integers.name}_dequantized")
        result.type, result.shape = oir.TensorType(oir.DataType.FLOAT), oir.Shape(levels.shape)
        model.insert_before(node, twin)
        node.replace_input_with(self.index, result)
        if not old.outputs[0].uses() and not old.outputs[0].is_graph_output():
            model.remove(old)


@dataclass(frozen=True, eq=False)
class IntegerConv:
    """A Conv of the main graph whose weight [M, C / group, ...] and bias [M] are constant integers.

    Both have one step for all, or one for each output channel.
    """

    node: oir.Node
    weight: ConstantOperand
    bias: ConstantOperand | None

    @property
    def outputs(self) -> int:
        """How many channels it computes."""
        return int(self.weight.levels.shape[0])

    @property
    def is_dense(self) -> bool:
        """Whether every output reads every input channel."""
        return self.node.attributes.get_int("group", 1) == 1

    @property
    def is_depthwise(self) -> bool:
        """Whether every output reads the input channel of its own number, and no other."""
        group = self.node.attributes.get_int("group", 1)
        return group == self.outputs > 1 and self.weight.levels.shape[1] == 1


def read_integer_conv(model: Model, node: oir.Node) -> IntegerConv | None:
    """``node`` as such a convolution, or None."""
    if node.op_type != "Conv" or node.domain != "" or node.graph is not model.graph:
        return None
    weight = _read_constant(model, node, 1)
    if weight is None or weight.levels.ndim < 3:
        return None
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return IntegerConv(node, weight, None)
    bias = _read_constant(model, node, 2)
    return None if bias is None else IntegerConv(node, weight, bias)


def integers_behind(model: Model, node: oir.Node) -> list[oir.Value] | None:
    """The tensors from the output of ``node`` to the integers it is quantized to; None where it is not.

    Between them stand one Quantize with one step, and Relu or Clip with the same bounds for all channels, in
    front of it or right behind it. Nothing but the last of the tensors has another reader.
    """
    tensors, quantized = [node.outputs[0]], False
    while True:
        reader = reader_of(model, tensors[-1])
        if reader is None or reader[1] != 0 or reader[0].domain != "":
            break
        follower = reader[0]
        if follower.op_type == "QuantizeLinear" and not quantized:
            step = read_step(model, follower)
            if step is None or not step.movable:
                return None
            quantized = True
        elif follower.op_type not in ("Relu", "Clip") or not _bounds_are_scalar(model, follower):
            break
        tensors.append(follower.outputs[0])
    return tensors if quantized else None


def _bounds_are_scalar(model: Model, node: oir.Node) -> bool:
    arrays = [model.constant(bound) for bound in node.inputs[1:] if bound is not None]
    return all(array is not None and array.size == 1 for array in arrays)


def _read_constant(model: Model, node: oir.Node, index: int) -> ConstantOperand | None:
    value = node.inputs[index]
    producer = value.producer() if value is not None else None
    step = read_step(model, producer) if producer is not None and producer.op_type == "DequantizeLinear" else None
    levels = model.constant(step.node.inputs[0]) if step is not None else None
    if step is None or levels is None or step.axis not in (None, 0):
        return None
    return ConstantOperand(index, step, levels)
