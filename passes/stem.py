"""The first convolution of an image network, on integers: three channels in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import Model

__all__ = ["CHANNELS", "Stem", "find_stem"]

CHANNELS = 3
"""Of an image; other narrow inputs gained nothing from what is done for stems."""


@dataclass(frozen=True, eq=False)
class Stem:
    """A Conv whose input and weight come from Dequantize nodes.

    Attributes:
        conv: the convolution, of one group.
        data, dequantizer: the Dequantize nodes of its input and its weight.
        activations: the integers behind ``data``, per tensor.
        weights: the integers of the weight [M, 3, ...].
        zero: their zero point, the level of weights that are added.
    """

    conv: oir.Node
    data: oir.Node
    dequantizer: oir.Node
    activations: oir.Value
    weights: npt.NDArray[np.generic]
    zero: int

    @property
    def is_channels_last(self) -> bool:
        """Whether the integers come transposed from an image whose channels lie last, as TensorFlow has them.

        The runtime's kernels work on that layout, so the Transpose vanishes, and what is done to channels in
        between is done to the innermost axis.
        """
        transpose = self.activations.producer()
        if transpose is None or transpose.op_type != "Transpose" or transpose.domain != "":
            return False
        perm = list(transpose.attributes.get_ints("perm", ()))
        return len(perm) > 2 and perm == [0, len(perm) - 1, *range(1, len(perm) - 1)]

    def replace(self, model: Model, node: oir.Node, name: str, weights: npt.NDArray[np.generic]) -> None:
        """Let the convolution read what ``node`` makes of the integers (``name``), through new ``weights``."""
        node.name = model.unique_name(node.name or name)
        changed = node.outputs[0]
        changed.name, changed.type = model.unique_name(name), self.activations.type
        data = _twin(model, self.data, changed)
        stored = self.dequantizer.inputs[0]
        wider = model.add_initializer(f"{stored.name if stored is not None else name}_stem", weights)
        weight = _twin(model, self.dequantizer, wider)
        weight.outputs[0].shape = oir.Shape(weights.shape)
        model.graph.insert_before(self.conv, [node, data, weight])
        self.conv.replace_input_with(0, data.outputs[0])
        self.conv.replace_input_with(1, weight.outputs[0])
        for old in (self.data, self.dequantizer):
            if not old.outputs[0].uses() and not old.outputs[0].is_graph_output():
                model.remove(old)


def find_stem(model: Model, conv: oir.Node) -> Stem | None:
    """``conv`` as a stem, or None when it is none or not in integers."""
    data, dequantizer = _dequantizer(conv.inputs[0]), _dequantizer(conv.inputs[1])
    if data is None or dequantizer is None or conv.attributes.get_int("group", 1) != 1:
        return None
    weights, zero_point = model.constant(dequantizer.inputs[0]), model.constant(dequantizer.inputs[2])
    if weights is None or zero_point is None or not zero_point.size or weights.shape[1] != CHANNELS:
        return None
    zero = int(zero_point.reshape(-1)[0])
    if np.any(zero_point != zero):
        return None
    activations, level = data.inputs[0], model.constant(data.inputs[2])
    if activations is None or level is None or level.size != 1:
        return None
    if dequantizer.attributes.get_int("axis", 1) == 1 and zero_point.size > 1:
        return None
    return Stem(conv, data, dequantizer, activations, weights, zero)


def _dequantizer(value: oir.Value | None) -> oir.Node | None:
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear" or node.domain != "" or len(node.inputs) < 3:
        return None
    return node


def _twin(model: Model, dequantize: oir.Node, integers: oir.Value) -> oir.Node:
    """The same Dequantize for other integers."""
    twin = oir.node("DequantizeLinear", [integers, *dequantize.inputs[1:]])
    twin.name = model.unique_name(f"{integers.name}_DequantizeLinear")
    twin.attributes.update(dequantize.attributes)
    result = twin.outputs[0]
    result.name, result.type = model.unique_name(f"{integers.name}_dequantized"), dequantize.outputs[0].type
    return twin
