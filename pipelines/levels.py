"""Integer tensors of a converted model beside what training put on the same grids, level by level."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import Model, QuantParams, TrainedTensor
from qat2int8.passes.qdq_step import read_step
from qat2int8.passes.qoperators import qoperator_of

__all__ = ["CARRIES", "LevelCount", "Levels", "Meaning", "Pair", "TensorLevels", "meanings", "pairs_of"]

Array = npt.NDArray[Any]

TIE = 2.0**-10
"""How near to the middle between two levels a value may round either way, in steps.

A float32 that holds 8 bits of level in front of the point has 16 behind it; sums of thousands of products lose a
few of those."""

_SAME_STEP = 1e-6
"""Of a step: what folding a factor into it and out of it again may cost."""


@dataclass(frozen=True)
class TensorLevels:
    """One integer tensor, compared over all samples with the one it was trained as.

    Attributes:
        tensor: name of the float tensor in the source that was quantized.
        integers: name of the integer tensor in the result.
        same_grid: whether it lies on the trained steps; where not, errors are rounded to whole trained steps.
        positions: elements compared.
        equal, one, more: elements that are 0, 1, and 2 or more LSB off; ``positions`` in all.
        largest: the largest error, in steps of the trained grid.
    """

    tensor: str
    integers: str
    same_grid: bool
    positions: int
    equal: int
    one: int
    more: int
    largest: float

    @property
    def within_one_percent(self) -> float:
        """Share of the positions that are at most 1 LSB off; 100 where there are none."""
        return 100.0 * (self.equal + self.one) / self.positions if self.positions else 100.0


@dataclass(frozen=True)
class Levels:
    """Every integer tensor whose trained counterpart is known, in the order of the graph."""

    tensors: tuple[TensorLevels, ...]

    @property
    def positions(self) -> int:
        """Elements compared in all."""
        return sum(tensor.positions for tensor in self.tensors)

    @property
    def equal_percent(self) -> float:
        """Share of all positions that are the same level."""
        return 100.0 * sum(tensor.equal for tensor in self.tensors) / self.positions if self.positions else 100.0

    @property
    def within_one_percent(self) -> float:
        """Share of all positions that are at most 1 LSB off."""
        more = sum(tensor.more for tensor in self.tensors)
        return 100.0 * (1.0 - more / self.positions) if self.positions else 100.0

    @property
    def worst(self) -> TensorLevels | None:
        """The tensor with the smallest share within 1 LSB, of equally good ones that with the largest error."""
        return min(self.tensors, key=lambda one: (one.within_one_percent, -one.largest), default=None)

    @property
    def largest(self) -> float:
        """The largest error of any tensor, in LSB."""
        return max((tensor.largest for tensor in self.tensors), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        """Summary and tensors, ready for JSON."""
        return {
            "positions": self.positions,
            "equal_percent": self.equal_percent,
            "within_one_percent": self.within_one_percent,
            "largest": self.largest,
            "tensors": [vars(tensor) for tensor in self.tensors],
        }


@dataclass(frozen=True, eq=False)
class Pair:
    """A trained tensor of the source and the integers of the result that hold it.

    Attributes:
        trained: which tensor, and the grid it was trained on.
        integers: name of the integer tensor.
        dtype: its type.
        scale, zero_point: what its levels stand for in the result.
    """

    trained: TrainedTensor
    integers: str
    dtype: np.dtype[Any]
    scale: float
    zero_point: int

    @property
    def same_grid(self) -> bool:
        """Whether the result kept the trained steps; steps per channel only go where their levels are kept."""
        step = self.trained.grid.scale
        return bool(step.ndim == 1 or abs(self.scale / float(step) - 1.0) <= _SAME_STEP)

    def bounds(self, values: Mapping[str, Array]) -> tuple[Array, Array]:
        """The lowest and the highest level, counted from 0.0, that rounding may give each element.

        Args:
            values: tensors of the source by name: floats under ``trained.tensor``, or where the source itself
                computes in integers under ``trained.integers``.
        """
        grid = self.trained.grid
        x = values.get(self.trained.tensor)
        scale, zero = _spread(grid.scale, grid, x), _spread(grid.zero_point, grid, x)
        if x is None or x.dtype.kind != "f":
            levels = values[self.trained.integers].astype(np.float32) - zero
            return levels, levels
        low, high = _rounded(x / scale)
        bottom, top = grid.dtype.qmin - zero, grid.dtype.qmax - zero
        return np.clip(low, bottom, top), np.clip(high, bottom, top)

    def fed(self, values: Mapping[str, Array], channels: int | None = None) -> Array:
        """The source's own values as integers of the result.

        Args:
            values: as for :meth:`bounds`.
            channels: how many the result has (axis 1), where more than the source: zeros behind the others.
        """
        grid = self.trained.grid
        x = values.get(self.trained.tensor)
        trained = values[self.trained.integers] if x is None or x.dtype.kind != "f" else grid.quantize(x)
        levels: Array = trained.astype(np.float32) - _spread(grid.zero_point, grid, x)
        if not self.same_grid:
            levels = levels * (_spread(grid.scale, grid, x) / self.scale)
        limits = np.iinfo(self.dtype)
        fed: Array = np.clip(np.rint(levels) + self.zero_point, limits.min, limits.max).astype(self.dtype)
        if channels is None or fed.ndim < 2 or channels <= fed.shape[1]:
            return fed
        widths = [(0, channels - fed.shape[1]) if axis == 1 else (0, 0) for axis in range(fed.ndim)]
        return np.pad(fed, widths, constant_values=self.zero_point)

    def errors(self, bounds: tuple[Array, Array], integers: Array) -> Array:
        """How far ``integers`` are from what the source may round to (:meth:`bounds`), in trained steps.

        Channels (axis 1) that the source does not have are left out: they were added for the kernels.
        """
        low, high = bounds
        if integers.ndim > 1 and integers.ndim == low.ndim:
            integers = integers[:, : low.shape[1]]
        levels: Array = integers.astype(np.float32) - self.zero_point
        if not self.same_grid:
            grid = self.trained.grid
            levels = levels * (self.scale / _spread(grid.scale, grid, integers))
        found: Array = np.maximum(np.maximum(low - levels, levels - high), 0.0)
        return found


class LevelCount:
    """The histogram of one pair over batches."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self._counts = np.zeros(3, np.int64)
        self._largest = 0.0

    def add(self, bounds: tuple[Array, Array], integers: Array) -> None:
        """Count one batch; ``bounds`` are those of the pair."""
        errors = self.pair.errors(bounds, integers)
        if errors.size:
            self._counts += np.bincount(np.minimum(np.rint(errors), 2.0).astype(np.int64).ravel(), minlength=3)
            self._largest = max(self._largest, float(errors.max()))

    def result(self) -> TensorLevels:
        """What was counted so far."""
        equal, one, more = (int(count) for count in self._counts)
        pair = self.pair
        return TensorLevels(
            pair.trained.tensor,
            pair.integers,
            pair.same_grid,
            equal + one + more,
            equal,
            one,
            more,
            self._largest,
        )


def pairs_of(model: Model) -> list[Pair]:
    """The integer tensors of a converted model that hold a trained tensor of its source, in graph order."""
    traced = dict(model.scales.traces())
    pairs: list[Pair] = []
    for value in (output for node in model.graph for output in node.outputs):
        tensor = traced.get(value)
        if tensor is None or value.dtype is None or not value.dtype.is_integer() or not value.name:
            continue
        found = list(meanings(model, value))
        if found:
            step = tensor.grid.scale
            same = [one for one in found if step.ndim == 0 and abs(one.scale / float(step) - 1.0) <= _SAME_STEP]
            meant = (same or found)[0]
            pairs.append(Pair(tensor, value.name, value.dtype.numpy(), meant.scale, meant.zero_point))
    return pairs


CARRIES = frozenset(
    {"Clip", "Concat", "DepthToSpace", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Reshape", "Slice"}
    | {"SpaceToDepth", "Split", "Squeeze", "Transpose", "Unsqueeze", "Max", "Min"}
)
"""Ops whose integer output means what their integer input means."""


class Meaning(NamedTuple):
    """What the levels of an integer tensor stand for, as one node says that reads or writes it."""

    scale: float
    zero_point: int
    dtype: np.dtype[Any]


def meanings(model: Model, value: oir.Value) -> Iterator[Meaning]:
    """What ``value``, of integers, stands for: as says what wrote it, then as say those that read it.

    They differ where a factor went into one of the two.
    """
    seen, above = [value], value
    while (writer := above.producer()) is not None:
        yield from _per_tensor(model, writer, above)
        source = writer.inputs[0] if writer.op_type in CARRIES else None
        if source is None:
            break
        above = source
        seen.append(source)
    waiting = list(seen)
    while waiting:
        here = waiting.pop(0)
        for node, index in here.uses():
            yield from _per_tensor(model, node, here)
            if node.op_type in CARRIES and index == 0:
                fresh = [output for output in node.outputs if output not in seen]
                seen.extend(fresh)
                waiting.extend(fresh)


def _per_tensor(model: Model, node: oir.Node, value: oir.Value) -> Iterator[Meaning]:
    """What ``node`` says of ``value``, which it reads or writes."""
    operator = qoperator_of(node)
    if operator is None:
        step = read_step(model, node) if value in (*node.inputs[:1], node.outputs[0]) else None
        if step is not None and step.axis is None:
            yield Meaning(float(step.scale), int(step.zero_point), step.zero_point.dtype)
        return
    operands = operator.operands_of(node)
    places = [(one.scale, one.zero_point) for one in operands if node.inputs[one.data] is value]
    if operator.result is not None and node.outputs[0] is value:
        places.append(operator.result)
    for scale, zero_point in ([model.constant(node.inputs[at]) for at in pair] for pair in places):
        if scale is not None and zero_point is not None and scale.size == zero_point.size == 1:
            yield Meaning(float(scale.item()), int(zero_point.item()), zero_point.dtype)


def _rounded(steps: Array) -> tuple[Array, Array]:
    """Both levels next to a tie, the nearest one elsewhere."""
    reach = np.float32(0.5 + TIE)
    return np.ceil(steps - reach), np.floor(steps + reach)


def _spread(parameter: Array, grid: QuantParams, against: Array | None) -> Array:
    """``parameter`` in float32, so that it broadcasts against a tensor of the grid."""
    wide = parameter.astype(np.float32)
    if wide.ndim == 0 or against is None or grid.axis is None:
        return wide
    shape = [1] * against.ndim
    shape[grid.axis] = -1
    return wide.reshape(shape)
