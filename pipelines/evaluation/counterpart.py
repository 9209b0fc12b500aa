"""One layer's tensor in a candidate beside the tensor of the reference that it stands for, in real numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import QuantParams
from qat2int8.pipelines.levels import Pair

__all__ = ["Counterpart"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Counterpart:
    """How two tensors are compared.

    Attributes:
        name, op_type: the layer of the candidate that computes it; of an integer operator the float op that is.
        tensor: what others read of the layer.
        reference: the tensor of the reference.
        source: the node of the reference that a conversion leaves in float to have the layer there.
        dtype: of ``tensor``.
        pair: the grids of the two, where ``tensor`` holds levels.
        grid: what the reference's readers round ``reference`` to, or what its levels mean; None for floats.
    """

    name: str
    op_type: str
    tensor: str
    reference: str
    source: str
    dtype: oir.DataType
    pair: Pair | None
    grid: QuantParams | None

    def expected(self, reference: Array) -> Array:
        """The reference's tensor as its readers see it, in real numbers."""
        if self.grid is None:
            return reference
        if reference.dtype.kind != "f":
            return self.grid.dequantize(reference)
        on_grid = self.grid.dequantize(self.grid.quantize(np.nan_to_num(reference)))
        # A quantizer makes a level of anything; what was no number is to be seen.
        return np.where(np.isfinite(reference), on_grid, reference)

    def actual(self, tensor: Array) -> Array:
        """The candidate's tensor in real numbers."""
        if self.pair is None:
            return tensor
        levels = tensor.astype(np.float32) - np.float32(self.pair.zero_point)
        step = self.pair.trained.grid
        if not step.per_channel:
            return levels * np.float32(self.pair.scale)
        spread = [1] * tensor.ndim
        spread[step.axis or 0] = -1
        return levels * step.scale.reshape(spread)

    def levels_off(self, reference: Array, tensor: Array) -> Array | None:
        """How many levels each element of ``tensor`` is off; None for floats.

        A reference within float rounding of the middle between two levels may be either.
        """
        if self.pair is None:
            return None
        values = self._on(self.pair, reference)
        with np.errstate(invalid="ignore"):
            return self.pair.errors(self.pair.bounds(values), tensor)

    def forced(self, reference: Array) -> Array:
        """The reference's tensor as the candidate would hold it."""
        if self.pair is not None:
            values = self._on(self.pair, reference)
            return self.pair.fed({name: np.nan_to_num(array) for name, array in values.items()})
        return self.expected(reference).astype(self.dtype.numpy())

    def _on(self, pair: Pair, reference: Array) -> dict[str, Array]:
        """The reference's tensor as ``pair`` reads it: before rounding where that is to the same levels."""
        if pair.trained.grid is self.grid:
            wide = reference.astype(np.float32) if reference.dtype.kind == "f" else reference
            return {pair.trained.tensor: wide}
        return {pair.trained.tensor: self.expected(reference).astype(np.float32)}
