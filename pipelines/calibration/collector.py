"""Running a model on data and keeping statistics of the tensors inside it."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import DataError, Model
from qat2int8.ir.io import save_model
from qat2int8.pipelines.calibration.statistics import Statistics
from qat2int8.pipelines.sessions import Feeds, run_session, session

__all__ = ["Collector", "processors", "sampling_model"]

Array = npt.NDArray[Any]

MOST_BYTES = 256 << 20
"""Of tensors that one run may return; a batch is cut, or run several times, so that memory has a bound."""
_WORTH_THREADS = 1 << 19
"""Elements of a batch from which on several threads count faster than one."""
_PIECE = 4
"""Tensors of unknown size that are asked for at a time until their size is known."""


def processors() -> int:
    """How many processors this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed is not None else os.cpu_count() or 1


def sampling_model(model: Model, names: Sequence[str]) -> Model:
    """A copy of ``model`` with the tensors ``names`` among its outputs; weights are shared.

    Raises:
        DataError: there is no such tensor.
    """
    sampling = model.clone()
    values = sampling.values()
    present = {value.name for value in (*sampling.graph.outputs, *sampling.graph.inputs)}
    for name in names:
        if name not in values:
            raise DataError("is not in the model", where=f"tensor '{name}'")
        if name not in present:
            sampling.graph.outputs.append(values[name])
    return sampling


class Collector:
    """Statistics of some tensors of one model, batch after batch, in memory that has a bound.

    One session returns the tensors; each batch is counted and let go at once. Where one run would return more
    than a bound, the batch is cut into smaller ones if the model takes them, and run again for a few tensors at
    a time if not.
    """

    def __init__(
        self,
        model: Model,
        wanted: Sequence[oir.Value],
        *,
        histograms: bool,
        start: Statistics | None = None,
        threads: int = 0,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        """
        Args:
            wanted: the tensors, values of ``model``.
            start: what was seen before, to go on from.
            threads: of the session and of counting; 0 for all processors.

        Raises:
            UnsupportedModel: onnxruntime refuses the model.
            DataError: ``start`` is about other tensors.
        """
        names = [value.name or "" for value in wanted]
        self.statistics = Statistics.of(names, histograms=histograms)
        if start is not None:
            self.statistics.merge(start)  # copies: what was handed in stays as it is
        self._inputs = {value.name for value in model.graph.inputs} & {*names}
        self._shapes = {value.name or "": value.shape for value in wanted}
        self._sizes: dict[str, float] = {}
        """Bytes of one sample, where a batch has told."""
        self._most_bytes = most_bytes
        with tempfile.TemporaryDirectory(prefix="qat2int8-") as folder:
            path = Path(folder) / "sampling.onnx"
            save_model(sampling_model(model, names), path)
            self._session = session(path, threads=threads, yielding=True)
        self._cuttable = all(not isinstance((put.shape or [None])[0], int) for put in self._session.get_inputs())
        self._workers = threads or processors()
        self._pool = ThreadPoolExecutor(self._workers)

    def run(self, feeds: Feeds, first: int) -> None:
        """Run the model on a batch, the first sample of which has the number ``first``.

        Raises:
            DataError: the input does not fit, a sample was seen before, or a tensor is not finite. What was seen
                before that sample is kept, of a batch that was not cut nothing.
        """
        count = _samples(feeds)
        size = count if not self._cuttable else max(min(self._most_at_once(count), count), 1)
        for at in range(0, count, size):
            part = {name: array[at : at + size] if count > size else array for name, array in feeds.items()}
            self._run(part, first + at, min(size, count - at))

    def _run(self, feeds: Feeds, first: int, count: int) -> None:
        groups = self._groups(count)
        if len(groups) == 1:
            self._add(self.statistics, feeds, first, count, groups[0])
            return
        parts = []
        for names in groups:
            part = Statistics.of(names, histograms=self.statistics.has_histograms)
            self._add(part, feeds, first, count, names)
            parts.append(part)
        self.statistics.merge(Statistics.side_by_side(parts))

    def _add(self, statistics: Statistics, feeds: Feeds, first: int, count: int, names: Sequence[str]) -> None:
        computed = [name for name in names if name not in self._inputs]
        arrays: dict[str, Array] = {name: feeds[name] for name in names if name in self._inputs}
        if computed:
            arrays |= zip(computed, run_session(self._session, feeds, computed), strict=True)
        self._sizes |= {name: array.nbytes / count for name, array in arrays.items()}
        many = self._workers > 1 and sum(array.size for array in arrays.values()) > _WORTH_THREADS
        statistics.add(first, count, arrays, self._pool.map if many else map)

    def _groups(self, count: int) -> list[list[str]]:
        """The tensors in as few groups as the bound on what one run returns allows."""
        groups: list[list[str]] = [[]]
        room = float(self._most_bytes)
        unknown = []
        for name in self.statistics.tensors:
            size = self._size(name)
            if size is None:
                unknown.append(name)
                continue
            if size * count > room:
                groups.append([])
                room = float(self._most_bytes)
            groups[-1].append(name)
            room -= size * count
        groups += [unknown[at : at + _PIECE] for at in range(0, len(unknown), _PIECE)]
        return [group for group in groups if group]

    def _most_at_once(self, count: int) -> int:
        total = sum(self._size(name) or 0.0 for name in self.statistics.tensors)
        return count if not total else int(self._most_bytes // total)

    def _size(self, name: str) -> float | None:
        """Bytes of one sample of a tensor; None where neither its shape nor a batch has told."""
        if name in self._sizes:
            return self._sizes[name]
        shape = self._shapes[name]
        if shape is None or not all(isinstance(dim, int) for dim in list(shape)[1:]):
            return None
        return 4.0 * math.prod(dim for dim in list(shape)[1:] if isinstance(dim, int))


def _samples(feeds: Mapping[str, Array]) -> int:
    return max((array.shape[0] for array in feeds.values() if array.ndim), default=1)
