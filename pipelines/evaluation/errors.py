"""How far one tensor is from another, summed up batch by batch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ErrorSums", "Errors"]

Array = npt.NDArray[Any]

_HISTOGRAM = 4


@dataclass(frozen=True)
class Errors:
    """One tensor against its reference, over all samples, in real numbers.

    Attributes:
        sqnr_db: ``10 log10(|reference|^2 / |difference|^2)``; infinite when equal, minus infinity where the
            reference is zero and the other is not, or where :attr:`not_finite` counts any.
        cosine: of the angle between the two, as one long vector each; 1 when both are zero.
        max_error, mean_error: absolute differences.
        off_by: of an integer tensor, elements that are 0, 1, 2 and 3 or more levels off; empty for floats.
        not_finite: elements that are NaN, or infinite in one of the two only; they are left out of the rest.
    """

    sqnr_db: float
    cosine: float
    max_error: float
    mean_error: float
    off_by: tuple[int, ...]
    not_finite: int

    @property
    def off_by_shares(self) -> tuple[float, ...]:
        """:attr:`off_by` in parts of 1."""
        total = sum(self.off_by)
        return tuple(count / total for count in self.off_by) if total else ()

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)


class ErrorSums:
    """What :class:`Errors` are made of; keeps sums only, however many batches there are."""

    def __init__(self) -> None:
        self._signal = self._other = self._product = self._noise = 0.0
        self._largest = self._total = 0.0
        self._count = self._not_finite = 0
        self._off_by: npt.NDArray[np.int64] | None = None

    def add(self, expected: Array, actual: Array, off: Array | None) -> None:
        """Take in one batch.

        Args:
            expected, actual: real numbers, of the same shape.
            off: by how many levels each is off, for integer tensors.
        """
        left, right = expected.astype(np.float64).ravel(), actual.astype(np.float64).ravel()
        finite = np.isfinite(left) & np.isfinite(right)
        if not finite.all():
            self._not_finite += int(np.count_nonzero(~finite & (left != right)))
            left, right = left[finite], right[finite]
            off = None if off is None else off.ravel()[finite]
        difference = np.abs(left - right)
        self._signal += float(left @ left)
        self._other += float(right @ right)
        self._product += float(left @ right)
        self._noise += float(difference @ difference)
        self._largest = max(self._largest, float(difference.max(initial=0.0)))
        self._total += float(difference.sum())
        self._count += left.size
        if off is not None:
            levels = np.minimum(np.rint(off.ravel()), _HISTOGRAM - 1).astype(np.int64)
            counts = np.bincount(levels, minlength=_HISTOGRAM)
            self._off_by = counts if self._off_by is None else self._off_by + counts

    def result(self) -> Errors:
        """What was summed up so far."""
        return Errors(
            self._sqnr(),
            self._cosine(),
            self._largest,
            self._total / self._count if self._count else 0.0,
            () if self._off_by is None else tuple(int(count) for count in self._off_by),
            self._not_finite,
        )

    def _sqnr(self) -> float:
        if self._not_finite:
            return -math.inf
        if self._noise == 0.0:
            return math.inf
        return 10.0 * math.log10(self._signal / self._noise) if self._signal else -math.inf

    def _cosine(self) -> float:
        lengths = math.sqrt(self._signal) * math.sqrt(self._other)
        if lengths == 0.0:
            return 1.0 if self._signal == self._other else 0.0
        return min(self._product / lengths, 1.0)
