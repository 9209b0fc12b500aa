"""Quantize and Dequantize nodes read as what they are: a step, a zero point, a range of levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import Model

__all__ = ["Step", "levels_of", "read_step", "reader_of"]

_EIGHT_BITS = (np.dtype(np.int8), np.dtype(np.uint8))


@dataclass(frozen=True, eq=False)
class Step:
    """A QuantizeLinear or DequantizeLinear with constant parameters; ``axis`` is None per tensor."""

    node: oir.Node
    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[Any]
    axis: int | None

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for steps that hold the same real values, bit by bit as the runtime compares them."""
        return self.axis, self.zero_point.dtype.str, self.scale.tobytes(), self.zero_point.tobytes()

    def equals(self, other: Step) -> bool:
        """Whether both hold the same real values."""
        return self.key == other.key

    @property
    def movable(self) -> bool:
        """Whether data can be moved as these integers: one 8-bit grid for the whole tensor."""
        return self.axis is None and self.zero_point.dtype in _EIGHT_BITS

    @property
    def zero(self) -> int:
        """The zero point of a :attr:`movable` step."""
        return int(self.zero_point.item())

    @property
    def type_levels(self) -> tuple[int, int]:
        """Lowest and highest level of the integer type of a :attr:`movable` step."""
        limits = np.iinfo(self.zero_point.dtype)
        return int(limits.min), int(limits.max)

    def level_of(self, value: float) -> int:
        """``value`` quantized to the type of a :attr:`movable` step."""
        lowest, highest = self.type_levels
        return int(np.clip(np.rint(np.float32(value) / self.scale) + self.zero, lowest, highest))


def read_step(model: Model, node: oir.Node) -> Step | None:
    """``node`` as a step; None when it is none, or one whose parameters are not constant, given and sane."""
    if node.domain != "" or node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return None
    given, zero_point = (model.constant(value) for value in (*node.inputs, None)[1:3])
    if given is None or given.dtype != np.float32 or given.ndim > 1 or zero_point is None:
        return None
    scale = given.astype(np.float32, copy=False)
    if not np.all(np.isfinite(scale)) or not np.all(scale > 0):
        return None
    if scale.size == 1 and zero_point.size == 1:
        return Step(node, scale.reshape(()), zero_point.reshape(()), None)
    return Step(node, scale, zero_point, node.attributes.get_int("axis", 1))


def reader_of(model: Model, value: oir.Value) -> tuple[oir.Node, int] | None:
    """The one node of the main graph that reads ``value``, once, with the input it reads it through."""
    if value.is_graph_output():
        return None
    uses = list(value.uses())
    if len(uses) != 1 or uses[0].node.graph is not model.graph:
        return None
    return uses[0].node, uses[0].idx


def levels_of(model: Model, step: Step) -> tuple[int, int]:
    """The levels that survive a :attr:`Step.movable` Quantize: an integer Clip right behind it narrows them."""
    lowest, highest = step.type_levels
    reader = reader_of(model, step.node.outputs[0])
    if reader is None or reader[0].op_type != "Clip" or reader[0].domain != "" or reader[1] != 0:
        return lowest, highest
    bounds = (*reader[0].inputs[1:3], None, None)[:2]
    arrays = [None if bound is None else model.constant(bound) for bound in bounds]
    if arrays[0] is not None and arrays[0].size == 1:
        lowest = max(lowest, int(arrays[0].item()))
    if arrays[1] is not None and arrays[1].size == 1:
        highest = min(highest, int(arrays[1].item()))
    return lowest, highest
