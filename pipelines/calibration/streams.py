"""Batches as TensorRT's calibrators ask for them, with the cache that saves asking again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from qat2int8.ir import DataError
from qat2int8.pipelines.data import Batch, Dataset

__all__ = ["BatchStream", "CachedStream", "DatasetStream", "batches_of"]

Array = npt.NDArray[Any]


class BatchStream(Protocol):
    """What TensorRT's ``IInt8Calibrator`` asks of an application, with arrays in place of device pointers."""

    def get_batch_size(self) -> int:
        """Samples in every batch; asked once, at the start."""

    def get_batch(self, names: Sequence[str]) -> Mapping[str, Array] | None:
        """The next batch, an array for each input in ``names`` with exactly that many samples; None at the end."""


class CachedStream(BatchStream, Protocol):
    """A stream that also keeps the result."""

    def read_calibration_cache(self) -> bytes | None:
        """What :meth:`write_calibration_cache` was given before; None to calibrate anew."""

    def write_calibration_cache(self, cache: bytes) -> None:
        """Keep the result."""


class DatasetStream:
    """Any data as a stream with exact batches, and a file as its cache.

    Args:
        cache: where the result is kept; None keeps it nowhere.
    """

    def __init__(self, data: Dataset, cache: Path | None = None) -> None:
        self._data, self._cache = data, cache
        self._batches: Iterator[Batch] = iter(data)

    def get_batch_size(self) -> int:
        return self._data.batch_size

    def get_batch(self, names: Sequence[str]) -> Mapping[str, Array] | None:
        batch = next(self._batches, None)
        # A last batch that is not full is left out, as TensorRT's samples do.
        if batch is None or len(batch) != self._data.batch_size:
            return None
        return {name: batch.inputs[name] for name in names}

    def skip(self, count: int) -> None:
        """Leave out the next ``count`` batches."""
        for _ in range(count):
            next(self._batches, None)

    def reset(self, first: int = 0) -> None:
        """Begin again with the batch number ``first``."""
        self._batches = iter(self._data)
        self.skip(first)

    def read_calibration_cache(self) -> bytes | None:
        return self._cache.read_bytes() if self._cache is not None and self._cache.exists() else None

    def write_calibration_cache(self, cache: bytes) -> None:
        if self._cache is not None:
            self._cache.write_bytes(cache)


def batches_of(stream: BatchStream, names: Sequence[str]) -> Iterator[Mapping[str, Array]]:
    """All batches of ``stream``, checked.

    Raises:
        DataError: a batch lacks an input, or has another number of samples than the stream said.
    """
    size = stream.get_batch_size()
    number = 0
    while (batch := stream.get_batch(names)) is not None:
        for name in names:
            if name not in batch:
                raise DataError(
                    f"has no array for input '{name}'", where=f"batch {number}", remedy="give every input"
                )
            have = batch[name].shape[0] if batch[name].ndim else 0
            if have != size:
                raise DataError(
                    f"input '{name}' has {have} samples, the stream said {size}",
                    where=f"batch {number}",
                    remedy="every batch is full; leave out what is left at the end",
                )
        yield batch
        number += 1
