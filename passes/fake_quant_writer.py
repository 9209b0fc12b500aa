"""Write plain ONNX in the place of one fake quant node of another dialect.

Not a pass. Two forms are written: QuantizeLinear, Clip, DequantizeLinear for what is a grid of at most eight bits
(see :mod:`qat2int8.passes.fake_quant`), and float arithmetic for everything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import InvalidModel, Model, UnsupportedModel
from qat2int8.ir.quant import FloatArray, IntArray

__all__ = ["Grid", "NoGrid", "NodeWriter", "per_axis", "require_opset"]

_OPSET = 13


class NoGrid(Exception):
    """Why a fake quant is not written as Quantize and Dequantize; never leaves the pass that asks."""

    def __init__(self, reason: str, remedy: str) -> None:
        self.reason, self.remedy = reason, remedy
        super().__init__(reason)


@dataclass(frozen=True, eq=False)
class Grid:
    """Levels from ``low`` to ``high`` that stand for ``(level - zero_point) * scale``.

    Attributes:
        scale: shape () or (C,), float32.
        zero_point: of the same shape.
        axis: the channel axis when there is one; counted from the back where the rank is not known.
    """

    scale: FloatArray
    zero_point: IntArray
    low: int
    high: int
    axis: int | None = None

    @property
    def storage(self) -> np.dtype[Any]:
        """The integer type of eight bits that holds the levels."""
        return np.dtype(np.int8 if self.low < 0 else np.uint8)


def per_axis(
    scale: npt.NDArray[Any], zero_point: npt.NDArray[Any], source: oir.Value
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], int | None]:
    """Parameters that broadcast against ``source`` as scalars or vectors along one axis, and that axis.

    Raises:
        NoGrid: they vary along several axes, or have more dimensions than the tensor, which would grow.
    """
    scale, zero_point = np.broadcast_arrays(scale, zero_point)
    rank = None if source.shape is None else len(source.shape)
    if rank is not None and scale.ndim > max(rank, 1):
        raise NoGrid(f"its scale has {scale.ndim} dimensions and its input {rank}", "give both the same rank")
    wide = [axis for axis, size in enumerate(scale.shape) if size != 1]
    if not wide:
        return scale.reshape(()), zero_point.reshape(()), None
    if len(wide) > 1:
        raise NoGrid(f"its scale of shape {scale.shape} varies along several axes", "train with one per channel")
    # Broadcasting aligns shapes at the back, so this is right for a source of any rank.
    axis = wide[0] - scale.ndim
    return scale.reshape(-1), zero_point.reshape(-1), axis if rank is None else axis + rank


def require_opset(model: Model, node: oir.Node) -> None:
    """Raise where Quantize per channel, Clip on int8 and Round do not all exist yet.

    Raises:
        UnsupportedModel: the model is older than that.
    """
    if model.opset < _OPSET:
        raise UnsupportedModel(
            f"fake quant of the domain '{node.domain}' in opset {model.opset}, older than {_OPSET}",
            where=f"node '{node.name}'",
            remedy="run raise-opset first",
        )


_FLOAT = (oir.DataType.FLOAT,)


class NodeWriter:
    """Puts nodes in the place of ``node``: what it computes of its first input is ``finish``'s argument.

    That input is of one of ``types``, as far as its type is known.
    """

    def __init__(self, model: Model, node: oir.Node, types: tuple[oir.DataType, ...] = _FLOAT) -> None:
        self.model, self.node = model, node
        source = node.inputs[0] if node.inputs else None
        if source is None:
            raise InvalidModel("input 0 is missing", where=f"{node.op_type} '{node.name}'")
        if source.dtype not in (None, *types):
            raise UnsupportedModel(
                f"it quantizes a {source.dtype} tensor",
                where=f"{node.op_type} '{node.name}'",
                remedy="convert the model to float32",
            )
        self.source: oir.Value = source
        self._output = node.outputs[0].name or node.name or "fake_quant"

    def fake_quant(self, grid: Grid) -> None:
        """Quantize, Clip where the grid is narrower than its storage, Dequantize."""
        scale, zero_point = self._parameters(grid)
        integers = self.add("QuantizeLinear", "quantized", self.source, scale, zero_point, **_on(grid))
        self._dequantize(integers, grid, scale, zero_point)

    def levels(self, levels: npt.NDArray[Any], grid: Grid) -> None:
        """The levels of a constant as an initializer behind Clip and Dequantize."""
        integers = self.constant("quantized", levels.astype(grid.storage))
        self._dequantize(integers, grid, *self._parameters(grid))

    def float_constant(self, array: npt.NDArray[Any]) -> None:
        """A float initializer."""
        self.node.replace_input_with(0, self.constant("constant", array.astype(np.float32)))
        self.model.bypass(self.node)

    def finish(self, value: oir.Value) -> None:
        """Let ``value`` be what the node computed, under its name, and remove the node."""
        producer = value.producer()
        assert producer is not None
        producer.name = self.node.name
        self.model.replace_value(self.node.outputs[0], value)
        self.model.remove(self.node)

    def add(self, op_type: str, suffix: str, *inputs: oir.Value, **attributes: int) -> oir.Value:
        """The float output of a new node, of unknown shape: parameters may be of a higher rank than the tensor."""
        name = self.model.unique_name(f"{self._output}_{suffix}")
        made = oir.node(op_type, inputs, attributes, name=name)
        self.model.insert_before(self.node, made)
        result = made.outputs[0]
        result.name, result.type = name, oir.TensorType(oir.DataType.FLOAT)
        return result

    def constant(self, suffix: str, array: npt.ArrayLike) -> oir.Value:
        """A new initializer."""
        return self.model.add_initializer(f"{self._output}_{suffix}", np.asarray(array))

    def scalar(self, suffix: str, number: float) -> oir.Value:
        """A new float32 scalar."""
        return self.constant(suffix, np.float32(number))

    def _parameters(self, grid: Grid) -> tuple[oir.Value, oir.Value]:
        scale = self.constant("scale", grid.scale.astype(np.float32))
        return scale, self.constant("zero_point", grid.zero_point.astype(grid.storage))

    def _dequantize(self, integers: oir.Value, grid: Grid, scale: oir.Value, zero_point: oir.Value) -> None:
        limits = np.iinfo(grid.storage)
        integers.dtype = oir.DataType.from_numpy(grid.storage)
        if grid.low > limits.min or grid.high < limits.max:
            low, high = (
                self.constant(suffix, np.asarray(level, grid.storage))
                for suffix, level in (("low", grid.low), ("high", grid.high))
            )
            integers = self.add("Clip", "clipped", integers, low, high)
            integers.dtype = oir.DataType.from_numpy(grid.storage)
        self.finish(self.add("DequantizeLinear", "dequantized", integers, scale, zero_point, **_on(grid)))


def _on(grid: Grid) -> dict[str, int]:
    return {} if grid.axis is None else {"axis": grid.axis}
