"""A histogram of magnitudes whose bins no order of batches and no split of the data can change."""

from __future__ import annotations

import base64
import threading
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from qat2int8.ir import DataError

__all__ = ["Counts", "Histogram"]

Counts = npt.NDArray[np.int64]

_DETAIL = 11
"""Bits of the mantissa that tell bins apart: 2,048 bins between two powers of two."""
_PER_OCTAVE = 1 << _DETAIL
_SHIFT = 23 - _DETAIL
_OCTAVES = 20
"""How far down from the largest magnitude bins reach: what is less than a millionth of it counts as zero."""
_LENGTH = _OCTAVES * _PER_OCTAVE
_CHUNK = 1 << 17
"""Elements binned at a time: their indices stay in cache."""


class Histogram:
    """Counts of |x| between powers of two, each of which is split into 2,048 equal bins.

    The bin of a float32 is its upper bits: no width has to be chosen, and none changes when a larger value comes.
    The bins cover the 20 powers of two up to the largest magnitude; when that grows, the range doubles and what
    falls out at the lower end joins the zeros. What has joined depends on the largest magnitude alone, so
    that batches in any order, and histograms of parts that are merged, give equal counts.

    Signs are not kept: the ends of the signed range are known exactly (:class:`TensorStatistics`), and every
    algorithm here looks for one threshold of |x|.
    """

    __slots__ = ("_base", "counts")

    def __init__(self) -> None:
        self._base = 0
        self.counts: Counts = np.zeros(_LENGTH, np.int64)

    def add(self, values: npt.NDArray[np.float32], largest: float) -> None:
        """Count finite ``values``, of which ``largest`` is the largest magnitude."""
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        base = _base_of(largest)
        counted = np.zeros(_LENGTH, np.int64)
        scratch = _scratch()
        bits = flat.view(np.uint32)
        for start in range(0, bits.size, _CHUNK):
            chunk = bits[start : start + _CHUNK]
            keys, indices = scratch[0][: chunk.size], scratch[1][: chunk.size]
            np.left_shift(chunk, 1, out=keys)  # the sign falls out
            np.right_shift(keys, _SHIFT + 1, out=keys)
            np.maximum(keys, base, out=keys)
            np.subtract(keys, base, out=keys)
            indices[:] = keys
            found = np.bincount(indices)
            counted[: found.size] += found
        self._join(base, counted)

    def merge(self, other: Histogram) -> None:
        """Add the counts of ``other``."""
        self._join(other._base, other.counts)

    @property
    def total(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())

    def edges(self) -> npt.NDArray[np.float64]:
        """The bounds of the bins of :attr:`counts`, one more than there are bins; the first is 0."""
        keys = np.arange(self._base, self._base + _LENGTH + 1, dtype=np.uint32)
        edges = (keys << np.uint32(_SHIFT)).view(np.float32).astype(np.float64)
        edges[0] = 0.0
        edges[~np.isfinite(edges)] = 2.0**128
        return edges

    def linear(self, top: float, bins: int = 2 * _PER_OCTAVE) -> tuple[Counts, float, int]:
        """Equal bins over ``[0, top)``, exactly: no count is spread over two bins.

        Args:
            top: a power of two.
            bins: a power of two, at most 4,096, so that no bin is narrower than those counted.

        Returns:
            The counts, the width of a bin, and how many values lie at or above ``top``.
        """
        width = top / bins
        # Bins above ``top`` may be as far up as 2**20 times that; their place among the equal bins is the last.
        place = np.minimum(self.edges()[:-1] / width, bins).astype(np.int64)
        counts = np.bincount(place, self.counts, bins + 1).astype(np.int64)
        return counts[:bins], width, int(counts[bins])

    def _join(self, base: int, counts: Counts) -> None:
        if base > self._base:
            _drop_low(self.counts, base - self._base)
            self._base = base
        elif base < self._base:
            counts = counts.copy()
            _drop_low(counts, self._base - base)
        self.counts += counts

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Histogram)
            and self._base == other._base
            and bool(np.array_equal(self.counts, other.counts))
        )

    __hash__ = None  # type: ignore[assignment]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; the inverse of :meth:`from_dict`."""
        used = np.flatnonzero(self.counts)
        pairs = np.stack([np.diff(used, prepend=0), self.counts[used]]).astype("<i8")
        return {"base": self._base, "counts": base64.b64encode(zlib.compress(pairs.tobytes(), 6)).decode("ascii")}

    @classmethod
    def from_dict(cls, document: Any) -> Histogram:
        """Read what :meth:`as_dict` gave.

        Raises:
            DataError: it is something else.
        """
        histogram = cls()
        try:
            histogram._base = int(document["base"])
            pairs = np.frombuffer(zlib.decompress(base64.b64decode(document["counts"])), "<i8").reshape(2, -1)
            histogram.counts[np.cumsum(pairs[0])] = pairs[1]
        except (KeyError, TypeError, ValueError, IndexError, zlib.error) as error:
            raise DataError(f"not a histogram: {error}") from error
        if histogram._base < 0 or np.any(histogram.counts < 0):
            raise DataError("not a histogram: a count is negative")
        return histogram


def _base_of(largest: float) -> int:
    """The key of the first bin, where the octave of ``largest`` is the last."""
    octave = int(np.float32(largest).view(np.uint32)) >> 23
    return max((octave + 1 - _OCTAVES) * _PER_OCTAVE, 0)


def _drop_low(counts: Counts, by: int) -> None:
    """Move ``counts`` down by ``by`` bins, in place; what would fall off joins the first one."""
    by = min(by, _LENGTH - 1)
    low = int(counts[: by + 1].sum())
    counts[1 : _LENGTH - by] = counts[by + 1 :].copy()
    counts[_LENGTH - by :] = 0
    counts[0] = low


_local = threading.local()


def _scratch() -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """Buffers of this thread: fresh ones would cost as much as the counting."""
    if not hasattr(_local, "buffers"):
        _local.buffers = np.empty(_CHUNK, np.uint32), np.empty(_CHUNK, np.int64)
    buffers: tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]] = _local.buffers
    return buffers
