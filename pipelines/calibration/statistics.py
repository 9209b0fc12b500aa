"""What calibration remembers of each tensor: the ends of every sample, and a histogram of magnitudes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from qat2int8.ir import DataError
from qat2int8.pipelines.calibration.histogram import Histogram

__all__ = ["Statistics", "TensorStatistics", "Workers"]

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
Ends = tuple[Floats, Floats]

T = TypeVar("T")
Workers = Callable[[Callable[[str], T], Iterable[str]], Iterable[T]]
"""``map``, or the one of a pool of threads."""


class TensorStatistics:
    """One tensor over the samples seen so far.

    Attributes:
        histogram: magnitudes of all samples, or None where only ends are collected.
    """

    def __init__(
        self, minima: Floats | None = None, maxima: Floats | None = None, histogram: Histogram | None = None
    ) -> None:
        self._ends = _Rows(np.float32, 2)
        if minima is not None and maxima is not None:
            self._ends.append(np.stack([minima, maxima]))
        self.histogram = histogram

    @property
    def minima(self) -> Floats:
        """The smallest value of each sample, in the order of :attr:`Statistics.indices`.

        Of a tensor without a batch axis the ends of its batch stand for each sample; an empty one has +inf and
        -inf.
        """
        return np.asarray(self._ends.joined[0])

    @property
    def maxima(self) -> Floats:
        """The largest value of each sample."""
        return np.asarray(self._ends.joined[1])

    def append(self, minima: Floats, maxima: Floats) -> None:
        """The ends of further samples."""
        self._ends.append(np.stack([minima, maxima]))

    def reorder(self, order: Indices) -> None:
        """Put the samples into another order."""
        self._ends = _Rows(np.float32, 2, self._ends.joined[:, order])

    @property
    def lo(self) -> float:
        """The smallest value of all; +inf where there was none."""
        return float(self.minima.min(initial=np.inf))

    @property
    def hi(self) -> float:
        """The largest value of all; -inf where there was none."""
        return float(self.maxima.max(initial=-np.inf))

    @property
    def amax(self) -> float:
        """The largest magnitude; 0 where there was no value."""
        return max(-self.lo, self.hi, 0.0)


class Statistics:
    """All tensors over the samples whose numbers are :attr:`indices`.

    Parts that saw different samples can be merged, in any order, and give what one run over all of them gives:
    ends are kept by the number of the sample, and histograms add up.

    Attributes:
        tensors: by name, in the order of the graph.
    """

    def __init__(self, tensors: Mapping[str, TensorStatistics], indices: Indices | None = None) -> None:
        self.tensors = dict(tensors)
        self._indices = _Rows(np.int64, 1)
        self._seen: set[int] = set()
        if indices is not None:
            self._extend(indices)

    @classmethod
    def of(cls, names: Iterable[str], *, histograms: bool) -> Statistics:
        """Nothing seen yet; ``histograms`` says whether magnitudes are counted."""
        return cls({name: TensorStatistics(histogram=Histogram() if histograms else None) for name in names})

    @classmethod
    def side_by_side(cls, parts: Sequence[Statistics]) -> Statistics:
        """Different tensors over the same samples as one."""
        tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
        return cls(tensors, parts[0].indices)

    @property
    def has_histograms(self) -> bool:
        """Whether magnitudes are counted."""
        return any(tensor.histogram is not None for tensor in self.tensors.values())

    def __len__(self) -> int:
        return len(self._seen)

    def __contains__(self, index: object) -> bool:
        return index in self._seen

    @property
    def indices(self) -> Indices:
        """The numbers of the samples, in the order of their arrival."""
        return np.asarray(self._indices.joined[0])

    def add(
        self, first: int, count: int, arrays: Mapping[str, npt.NDArray[Any]], workers: Workers[Any] = map
    ) -> None:
        """Take in the samples ``first`` to ``first + count - 1``; ``arrays`` has each of :attr:`tensors`.

        Raises:
            DataError: a sample was seen before, a tensor is missing, or holds a NaN or an infinity. Then nothing
                of the batch was taken in.
        """
        indices = np.arange(first, first + count, dtype=np.int64)
        self._refuse_twice(indices)
        missing = [name for name in self.tensors if name not in arrays]
        if missing:
            raise DataError("is missing among what the model computed", where=f"tensor '{missing[0]}'")
        # The largest first, so that several workers end together.
        names = sorted(self.tensors, key=lambda name: -arrays[name].size)
        ends = dict(zip(names, workers(lambda name: _ends(arrays[name], count), names), strict=True))
        self._refuse_infinite(first, ends)
        for _ in workers(lambda name: self._count(name, arrays[name], ends[name]), names):
            pass
        for name, tensor in self.tensors.items():
            tensor.append(*ends[name])
        self._extend(indices)

    def _extend(self, indices: Indices) -> None:
        self._indices.append(indices[None])
        self._seen.update(indices.tolist())

    def _refuse_infinite(self, first: int, ends: Mapping[str, Ends]) -> None:
        """Raise for the first sample that is not finite, and in it for the first tensor of the graph."""
        # Of an empty tensor the smallest value is +inf and the largest -inf, which is no fault.
        bad = {
            name: np.isnan(low) | np.isnan(high) | (low == -np.inf) | (high == np.inf)
            for name, (low, high) in ends.items()
        }
        where = min(
            ((int(np.argmax(bad[name])), order) for order, name in enumerate(self.tensors) if bad[name].any()),
            default=None,
        )
        if where is not None:
            raise DataError(
                "the tensor holds a NaN or an infinity",
                where=f"sample {first + where[0]}, tensor '{list(self.tensors)[where[1]]}'",
                remedy="look at this sample and at the model: a range must be finite",
            )

    def _count(self, name: str, array: npt.NDArray[Any], ends: Ends) -> None:
        histogram = self.tensors[name].histogram
        if histogram is not None and array.size:
            largest = max(abs(float(ends[0].min())), abs(float(ends[1].max())))
            histogram.add(array, largest)

    def merge(self, other: Statistics) -> None:
        """Take in what another part saw.

        Raises:
            DataError: both saw one sample, watched different tensors, or only one of them has histograms.
        """
        self._refuse_twice(other.indices)
        different = self.tensors.keys() ^ other.tensors.keys()
        if different:
            raise DataError(
                f"only one part watched tensor '{min(different)}'",
                remedy="calibrate all parts with the same options",
            )
        for name, tensor in self.tensors.items():
            if (tensor.histogram is None) is not (other.tensors[name].histogram is None):
                raise DataError(
                    f"only one part counted the values of tensor '{name}'",
                    remedy="calibrate all parts with the same algorithm",
                )
        for name, tensor in self.tensors.items():
            added = other.tensors[name]
            tensor.append(added.minima, added.maxima)
            if tensor.histogram is not None and added.histogram is not None:
                tensor.histogram.merge(added.histogram)
        self._extend(other.indices)

    def sort(self) -> None:
        """Put the samples in order: what depends on the order is computed in that of the data."""
        order = np.argsort(self.indices)
        self._indices = _Rows(np.int64, 1, self.indices[None, order])
        for tensor in self.tensors.values():
            tensor.reorder(order)

    def _refuse_twice(self, indices: Indices) -> None:
        twice = next((index for index in indices.tolist() if index in self._seen), None)
        if twice is not None:
            raise DataError(
                f"sample {twice} was seen already",
                remedy="every sample counts once: give the parts different samples",
            )


class _Rows:
    """Arrays of shape (rows, n) that are put end to end when somebody looks: samples come one by one."""

    def __init__(self, dtype: npt.DTypeLike, rows: int, start: npt.NDArray[Any] | None = None) -> None:
        self._parts = [np.empty((rows, 0), dtype) if start is None else start]

    def append(self, part: npt.NDArray[Any]) -> None:
        self._parts.append(part)

    @property
    def joined(self) -> npt.NDArray[Any]:
        if len(self._parts) > 1:
            self._parts = [np.concatenate(self._parts, axis=1)]
        return self._parts[0]


def _ends(values: npt.NDArray[Any], count: int) -> Ends:
    """The smallest and the largest value of each of ``count`` samples."""
    if not values.size:
        return np.full(count, np.inf, np.float32), np.full(count, -np.inf, np.float32)
    batched = count > 1 and values.ndim > 0 and values.shape[0] == count
    rows = np.asarray(values, np.float32).reshape(count if batched else 1, -1)
    low, high = rows.min(axis=1), rows.max(axis=1)
    return np.broadcast_to(low, count), np.broadcast_to(high, count)
