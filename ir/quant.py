"""The grid a tensor is quantized on: integer type, scale, zero point, axis, and where they come from."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir.blocks import row_blocks
from qat2int8.ir.errors import InvalidModel
from qat2int8.ir.interval import Interval

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class QuantDType:
    """An integer grid: ``bits`` wide, signed or not; ``narrow_range`` drops the lowest level of a signed one, and
    ``top``, where given, is the highest level of a grid that ends before its bits do.

    Grids narrower than 8 bits live in 8-bit storage (the Clip between Quantize and Dequantize of
    Brevitas and torch.ao), so that ``QuantDType(7, signed=False)`` is 0..127 in uint8.
    """

    bits: int
    signed: bool
    narrow_range: bool = False
    top: int | None = None

    @property
    def qmin(self) -> int:
        """Lowest level of the grid."""
        return -(1 << (self.bits - 1)) + self.narrow_range if self.signed else 0

    @property
    def qmax(self) -> int:
        """Highest level of the grid."""
        return self.top if self.top is not None else (1 << (self.bits - self.signed)) - 1

    @property
    def storage(self) -> oir.DataType:
        """The ONNX element type that holds the integers."""
        for width, signed, unsigned in (
            (8, oir.DataType.INT8, oir.DataType.UINT8),
            (16, oir.DataType.INT16, oir.DataType.UINT16),
        ):
            if self.bits <= width:
                return signed if self.signed else unsigned
        return oir.DataType.INT32 if self.signed else oir.DataType.UINT32

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy type of :attr:`storage`."""
        return self.storage.numpy()

    @classmethod
    def of_storage(cls, dtype: oir.DataType) -> QuantDType | None:
        """The full-range grid of an ONNX integer type, or None for a type that holds no grid we know."""
        return _GRIDS.get(dtype)

    @classmethod
    def up_to(cls, top: int) -> QuantDType:
        """The uint8 grid of levels 0..``top``; as a narrower type where that says the same."""
        bits = top.bit_length()
        return cls(bits, signed=False) if top + 1 == 1 << bits else cls(8, signed=False, top=top)

    def __str__(self) -> str:
        ends = f"{' narrow' if self.narrow_range else ''}{f' up to {self.top}' if self.top is not None else ''}"
        return f"{'' if self.signed else 'u'}int{self.bits}{ends}"


INT8 = QuantDType(8, signed=True)
UINT8 = QuantDType(8, signed=False)
INT16 = QuantDType(16, signed=True)
UINT16 = QuantDType(16, signed=False)
INT32 = QuantDType(32, signed=True)

_GRIDS = {
    oir.DataType.INT2: QuantDType(2, signed=True),
    oir.DataType.UINT2: QuantDType(2, signed=False),
    oir.DataType.INT4: QuantDType(4, signed=True),
    oir.DataType.UINT4: QuantDType(4, signed=False),
    oir.DataType.INT8: INT8,
    oir.DataType.UINT8: UINT8,
    oir.DataType.INT16: INT16,
    oir.DataType.UINT16: UINT16,
    oir.DataType.INT32: INT32,
}


class Provenance(enum.IntEnum):
    """Where a grid comes from; the larger the number, the more it is believed."""

    COMPUTED = 1
    """From the weights themselves, where nothing trained them."""
    DERIVED = 2
    """From what the neighbouring grids demand or allow."""
    CALIBRATED = 3
    """Observed on data."""
    TRAINED = 4
    """A fake quant the model was trained with."""
    USER = 5
    """Given by the person who runs the tool."""

    @property
    def label(self) -> str:
        """The lower-case name, as tables and JSON spell it."""
        return self.name.lower()


@dataclass(frozen=True, eq=False)
class QuantParams:
    """The grid of one tensor.

    Attributes:
        scale: step between two levels, float32, finite and > 0; shape () or, per channel, (C,).
        zero_point: the level that stands for 0.0, int32, same shape as ``scale``, within ``dtype``.
        dtype: the integer grid.
        axis: the channel axis when ``scale`` has shape (C,), else None.
        source: how far the grid is to be believed.
        origin: where it comes from, for people ("DequantizeLinear 'd12'", "demanded by Relu 'r7'").
        trained: where training saturated the values, when the grid was widened since; None: the whole grid.
    """

    scale: FloatArray
    zero_point: IntArray
    dtype: QuantDType
    axis: int | None
    source: Provenance
    origin: str
    trained: Interval | None = None

    @classmethod
    def make(
        cls,
        scale: npt.ArrayLike,
        zero_point: npt.ArrayLike = 0,
        dtype: QuantDType = INT8,
        *,
        axis: int | None = None,
        source: Provenance = Provenance.TRAINED,
        origin: str = "",
    ) -> Self:
        """Build a grid, checking it.

        A one-element scale becomes per tensor whatever its shape (exporters write both).

        Raises:
            InvalidModel: scale not finite or not positive, zero point outside the grid, shapes that do not
                fit, or a channel count without an axis.
        """
        steps = np.asarray(scale, dtype=np.float32)
        zeros = np.asarray(zero_point).astype(np.int32)
        if steps.size == 1:
            steps, axis = steps.reshape(()), None
            zeros = zeros.reshape(()) if zeros.size == 1 else zeros
        if zeros.size == 1 and steps.size > 1:
            zeros = np.broadcast_to(zeros.reshape(()), steps.shape).copy()
        if steps.ndim > 1 or zeros.shape != steps.shape:
            raise InvalidModel(f"scale of shape {steps.shape} does not fit zero point of shape {zeros.shape}")
        if steps.ndim == 1 and axis is None:
            raise InvalidModel(f"a scale of shape {steps.shape} needs an axis")
        if not np.all(np.isfinite(steps)) or not np.all(steps > 0):
            bad = steps[~(np.isfinite(steps) & (steps > 0))].reshape(-1)[0]
            raise InvalidModel(f"scale {bad} is not a positive finite number")
        if np.any(zeros < dtype.qmin) or np.any(zeros > dtype.qmax):
            raise InvalidModel(f"zero point {zeros.reshape(-1)[0]} lies outside {dtype}")
        return cls(steps, zeros, dtype, axis, source, origin)

    @property
    def per_channel(self) -> bool:
        """Whether each channel has its own step."""
        return self.scale.ndim == 1

    @property
    def symmetric(self) -> bool:
        """Whether 0.0 sits at level 0."""
        return not np.any(self.zero_point)

    @property
    def interval(self) -> Interval:
        """All real values the grid can hold, over all channels."""
        lo = (self.dtype.qmin - self.zero_point) * self.scale.astype(np.float64)
        hi = (self.dtype.qmax - self.zero_point) * self.scale.astype(np.float64)
        return Interval(float(np.min(lo)), float(np.max(hi)))

    @property
    def span(self) -> Interval:
        """The part of :attr:`interval` that values were trained to lie in."""
        return self.trained or self.interval

    def same_grid(self, other: QuantParams) -> bool:
        """Whether both hold exactly the same real values (bit-equal scales, as the runtime compares them)."""
        return (
            self.dtype == other.dtype
            and self.axis == other.axis
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
        )

    def quantize(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """``saturate(round_half_even(values / scale) + zero_point)``, ONNX QuantizeLinear in float32."""
        integers = np.empty(values.shape, self.dtype.numpy)
        for rows, scale, zero_point in self._blocks(values.shape):
            levels = np.asarray(values[rows].astype(np.float32, copy=False) / scale)
            np.rint(levels, out=levels)
            if not self.symmetric:
                levels += zero_point
            np.clip(levels, self.dtype.qmin, self.dtype.qmax, out=levels)
            integers[rows] = levels
        return integers

    def dequantize(self, levels: npt.NDArray[Any]) -> FloatArray:
        """``(levels - zero_point) * scale``, ONNX DequantizeLinear in float32."""
        values = np.empty(levels.shape, np.float32)
        for rows, scale, zero_point in self._blocks(levels.shape):
            block = levels[rows].astype(np.float32)
            if not self.symmetric:
                block -= zero_point.astype(np.float32)
            values[rows] = block * scale
        return values

    def with_(self, **changes: Any) -> QuantParams:
        """A copy with some fields replaced."""
        return replace(self, **changes)

    def _blocks(self, shape: tuple[int, ...]) -> Iterator[tuple[Any, FloatArray, IntArray]]:
        """Rows of a tensor of ``shape``, with the scale and zero point that broadcast against them."""
        scale, zero_point = self.scale, self.zero_point
        if self.axis is not None:
            spread = [1] * len(shape)
            spread[self.axis] = -1
            scale, zero_point = scale.reshape(spread), zero_point.reshape(spread)
        if not shape:
            yield (), scale, zero_point
            return
        for block in row_blocks(shape):
            along = block if self.axis == 0 else slice(None)
            yield block, scale[along] if scale.ndim else scale, zero_point[along] if scale.ndim else zero_point

    def __str__(self) -> str:
        steps = f"[{self.scale.size}]" if self.per_channel else f"{float(self.scale):.6g}"
        axis = f" axis={self.axis}" if self.per_channel else ""
        zeros = "" if self.symmetric else f" zp={self.zero_point.reshape(-1)[0]}"
        return f"{self.dtype} scale={steps}{zeros}{axis} ({self.source.label})"
