"""Statistics inside a table: what parts are merged from, and an interrupted run goes on from."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qat2int8.ir import DataError
from qat2int8.pipelines.calibration.algorithms import Algorithm, parse_algorithm
from qat2int8.pipelines.calibration.histogram import Histogram
from qat2int8.pipelines.calibration.statistics import Statistics, TensorStatistics
from qat2int8.pipelines.tables.table import CalibrationTable, Entry

__all__ = ["combine", "entry_of", "statistics_of"]


def entry_of(algorithm: Algorithm, statistics: Statistics, name: str, *, keep: bool) -> Entry:
    """The entry of one tensor; with ``keep`` it holds what it was computed from.

    Raises:
        DataError: no value of the tensor was seen.
    """
    tensor = statistics.tensors[name]
    span, amax = algorithm.span(tensor)
    return Entry(span.lo, span.hi, amax, _as_dict(statistics.indices, tensor) if keep else None)


def statistics_of(table: CalibrationTable) -> Statistics:
    """What the ranges of a table were computed from.

    Raises:
        DataError: they were not kept, or do not fit together.
    """
    tensors: dict[str, TensorStatistics] = {}
    indices: npt.NDArray[np.int64] | None = None
    for name, entry in table.entries.items():
        seen, tensor = _read(entry.statistics, f"tensor '{name}'")
        if indices is not None and not np.array_equal(indices, seen):
            raise DataError("its statistics are of other samples than those before it", where=f"tensor '{name}'")
        indices, tensors[name] = seen, tensor
    return Statistics(tensors, indices)


def combine(algorithm: str, parts: Sequence[Any]) -> Entry:
    """The entry of one tensor from its statistics in several tables; the order makes no difference.

    For ``merge`` of tables: :data:`qat2int8.pipelines.tables.table.Combine`.

    Raises:
        DataError: they cannot be merged, or are no statistics.
    """
    merged: Statistics | None = None
    for part in parts:
        indices, tensor = _read(part, "")
        statistics = Statistics({"": tensor}, indices)
        if merged is None:
            merged = statistics
        else:
            merged.merge(statistics)
    if merged is None:
        raise DataError("there are no statistics to merge")
    merged.sort()
    return entry_of(parse_algorithm(algorithm), merged, "", keep=True)


def _as_dict(indices: npt.NDArray[np.int64], tensor: TensorStatistics) -> dict[str, Any]:
    return {
        "samples": _runs(indices),
        "minima": _packed(tensor.minima),
        "maxima": _packed(tensor.maxima),
        "histogram": None if tensor.histogram is None else tensor.histogram.as_dict(),
    }


def _read(document: Any, where: str) -> tuple[npt.NDArray[np.int64], TensorStatistics]:
    if document is None:
        raise DataError(
            "the statistics of its range were not kept", where=where, remedy="calibrate with --keep-statistics"
        )
    try:
        runs = [np.arange(first, first + count, dtype=np.int64) for first, count in document["samples"]]
        indices = np.concatenate([np.empty(0, np.int64), *runs])
        minima, maxima = (_unpacked(document[key]) for key in ("minima", "maxima"))
        packed = document["histogram"]
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise DataError(f"its statistics are damaged: {error}", where=where, remedy="calibrate again") from error
    if not indices.size == minima.size == maxima.size == np.unique(indices).size:
        raise DataError("its statistics are damaged: a sample is missing", where=where, remedy="calibrate again")
    return indices, TensorStatistics(minima, maxima, None if packed is None else Histogram.from_dict(packed))


def _runs(indices: npt.NDArray[np.int64]) -> list[list[int]]:
    """``[first, count]`` of each run of numbers that follow one another."""
    if not indices.size:
        return []
    starts = np.flatnonzero(np.diff(indices, prepend=indices[0] - 2) != 1)
    lengths = np.diff(starts, append=indices.size)
    return [[int(indices[start]), int(length)] for start, length in zip(starts, lengths, strict=True)]


def _packed(array: npt.NDArray[np.float32]) -> str:
    return base64.b64encode(zlib.compress(array.astype("<f4").tobytes(), 6)).decode("ascii")


def _unpacked(text: str) -> npt.NDArray[np.float32]:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<f4").astype(np.float32)
