"""Where the pass that gathers calibrated scales takes ranges from: data the model is run on, or a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import onnx_ir as oir

from qat2int8.ir import DataError, Interval, Model
from qat2int8.passes import RangeSource
from qat2int8.pipelines.calibration.algorithms import Algorithm
from qat2int8.pipelines.calibration.collector import Collector, processors
from qat2int8.pipelines.calibration.kept import entry_of
from qat2int8.pipelines.calibration.statistics import Statistics
from qat2int8.pipelines.data import Dataset, input_specs, open_data
from qat2int8.pipelines.tables.table import CalibrationTable, Entry

__all__ = ["CalibratedRanges", "DataRanges", "OnBatch", "TableRanges", "collect", "table_of"]

OnBatch = Callable[[int, int | None], None]
"""Told after each batch how many samples are done, and of how many if that is known. What it raises ends the run
between two batches, so that nothing is lost."""


class CalibratedRanges(RangeSource, Protocol):
    """A source of ranges that can tell afterwards what it gave."""

    @property
    def data(self) -> Dataset | None:
        """The data the ranges were seen on, if they are at hand."""

    def table(self) -> CalibrationTable:
        """The ranges."""


class DataRanges:
    """Runs the model that a pass hands over on all of ``data``.

    Args:
        data: opened for this model.
        digest: of the model as it was read, to bind the table to it.
    """

    def __init__(
        self,
        data: Dataset,
        algorithm: Algorithm,
        *,
        digest: str = "",
        threads: int = 0,
        on_batch: OnBatch | None = None,
    ) -> None:
        self.data: Dataset | None = data
        self._data, self._algorithm, self._threads, self._on_batch = data, algorithm, threads, on_batch
        self._table = CalibrationTable(str(algorithm), 0, digest)

    @classmethod
    def open(
        cls,
        data: Any,
        algorithm: Algorithm,
        model: Model,
        *,
        samples: int | None,
        batch_size: int,
        threads: int,
        on_batch: OnBatch | None,
    ) -> DataRanges:
        """Open whatever :func:`open_data` opens, for ``model``.

        Raises:
            DataError: there are no such data, or they do not fit.
        """
        opened = open_data(data, input_specs(model), batch_size=batch_size, samples=samples)
        return cls(opened, algorithm, digest=model.digest(), threads=threads, on_batch=on_batch)

    @property
    def origin(self) -> str:
        """The algorithm, and over how many samples."""
        return f"{self._algorithm} over {self._table.samples} samples of {self._data.name}"

    def table(self) -> CalibrationTable:
        """Of all tensors that were asked for."""
        return self._table

    def ranges(self, model: Model, wanted: Sequence[oir.Value]) -> Mapping[oir.Value, Interval]:
        """See :class:`qat2int8.passes.RangeSource`.

        Raises:
            DataError: the data do not fit the model, or a tensor is not finite.
            UnsupportedModel: onnxruntime refuses the model.
        """
        collector = Collector(model, wanted, histograms=self._algorithm.needs_values, threads=self._threads)
        collect(collector, self._data, self._on_batch)
        found = table_of(collector.statistics, self._algorithm, self._table.model_digest)
        self._table = dataclasses.replace(found, entries={**self._table.entries, **found.entries})
        return _spans(found, wanted)


class TableRanges:
    """Looks ranges up by the names of tensors."""

    data: Dataset | None = None

    def __init__(self, table: CalibrationTable, name: str = "the calibration table") -> None:
        self._table, self._name = table, name

    @property
    def origin(self) -> str:
        """The table, with the algorithm where it is known."""
        what = self._table.algorithm or self._table.origin
        return f"{self._name} ({what})" if what else self._name

    def table(self) -> CalibrationTable:
        """The table itself."""
        return self._table

    def ranges(self, model: Model, wanted: Sequence[oir.Value]) -> Mapping[oir.Value, Interval]:
        """See :class:`qat2int8.passes.RangeSource`.

        Raises:
            DataError: the table knows none of the tensors.
        """
        found = _spans(self._table, wanted)
        if not found:
            raise DataError(
                f"it has none of the {len(wanted)} tensors that need a range, such as '{wanted[0].name}'",
                where=self._name,
                remedy="calibrate this model",
            )
        return found


def _spans(table: CalibrationTable, wanted: Sequence[oir.Value]) -> dict[oir.Value, Interval]:
    named = ((value, table.entries.get(value.name or "")) for value in wanted)
    return {value: Interval(entry.lo, entry.hi) for value, entry in named if entry is not None}


def collect(collector: Collector, data: Dataset, on_batch: OnBatch | None = None) -> None:
    """Run every batch of ``data`` whose samples were not seen yet.

    Raises:
        DataError: the data cannot be read or do not fit the model, or a tensor is not finite.
    """
    for batch in data:
        if batch.first not in collector.statistics:
            collector.run(batch.inputs, batch.first)
        if on_batch is not None:
            on_batch(len(collector.statistics), data.count)
    if not len(collector.statistics):
        raise DataError("there are no samples", where=data.name, remedy="give some hundred that are typical")


def table_of(statistics: Statistics, algorithm: Algorithm, digest: str, *, keep: bool = False) -> CalibrationTable:
    """The table that ``algorithm`` makes of what was seen; tensors of which nothing was seen are left out.

    Args:
        digest: of the model, to bind the table to it.
        keep: whether the entries hold what they were computed from.
    """
    statistics.sort()
    names = [name for name, tensor in statistics.tensors.items() if tensor.lo <= tensor.hi]

    def entry(name: str) -> Entry:
        return entry_of(algorithm, statistics, name, keep=keep)

    with ThreadPoolExecutor(processors()) as pool:
        entries = dict(zip(names, pool.map(entry, names), strict=True))
    return CalibrationTable(str(algorithm), len(statistics), digest, entries)
