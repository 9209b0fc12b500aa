"""Samples in batches, read piece by piece and checked against the model before anything runs on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qat2int8.ir import DataError
from qat2int8.pipelines.data.inputs import InputSpec, Names, fit
from qat2int8.pipelines.data.normalise import Normalise

__all__ = ["Batch", "Dataset", "Piece", "Reader", "check_lengths"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples that are run together.

    Attributes:
        inputs: arrays by input name; the first axis of each is the samples.
        labels: the expected answers, one entry of the first axis a sample; None when the data have none. There are
            fewer where the last samples of the data have none.
        first: the number of the first sample, counted from 0 over all the data, left out ones included.
    """

    inputs: dict[str, Array]
    labels: Array | None
    first: int

    def __len__(self) -> int:
        return _samples(self.inputs)


@dataclass(frozen=True, eq=False)
class Piece:
    """What a reader reads at a time: arrays by name, the samples along the first axis of each.

    ``where`` is the file they are from. An array without axes is the same for all samples.
    """

    arrays: Mapping[str, Array]
    where: str


class Reader(Protocol):
    """One format. Reads forward, again and again from the start, and never holds all the data."""

    @property
    def name(self) -> str:
        """What people call the data."""

    @property
    def count(self) -> int | None:
        """How many samples there are; None when only reading tells."""

    @property
    def whole_batches(self) -> bool:
        """Whether the samples at the end that fill no batch are left out."""

    def pieces(self, start: int, size: int) -> Iterator[Piece]:
        """The samples from number ``start`` on, at most about ``size`` at a time.

        Raises:
            DataError: the data cannot be read.
        """


class Dataset:
    """Batches over a :class:`Reader`; can be gone through any number of times.

    Attributes:
        name: what people call the data.
        batch_size: samples a batch. A model that fixes its first dimension decides it.
        count: samples in all batches together; None when only reading tells.
        notes: what a person should know, such as samples that were left out.
    """

    def __init__(
        self,
        reader: Reader,
        names: Names,
        *,
        batch_size: int,
        samples: int | None = None,
        skip: int = 0,
        normalise: Normalise | None = None,
    ) -> None:
        if batch_size < 1:
            raise DataError(f"a batch of {batch_size} samples is none", remedy="take at least 1")
        if samples is not None and samples < 1:
            raise DataError(f"{samples} samples are none", remedy="take at least 1, or leave it out for all")
        self.name = reader.name
        self.notes: tuple[str, ...] = ()
        self._reader, self._names, self._normalise = reader, names, normalise
        fixed = _fixed_batch(names.inputs)
        self.batch_size = batch_size if fixed is None else fixed
        self._whole = fixed is not None or reader.whole_batches
        if fixed is None and reader.whole_batches and reader.count is not None:
            # What the caller takes at most must not make the only batch an incomplete one.
            self.batch_size = max(1, min(batch_size, reader.count - skip, samples or batch_size))
        self._start = skip
        self._limit = samples
        self._ended = False
        """Whether the labels have, while reading."""
        self.count = self._counted(reader.count, skip, samples)

    def _counted(self, there: int | None, skip: int, wanted: int | None) -> int | None:
        if there is None:
            return None
        if there == 0:
            raise DataError("has no samples", where=self.name)
        if skip >= there:
            raise DataError(
                f"has {there} samples, all of which are skipped", where=self.name, remedy=f"skip less than {there}"
            )
        count = there - skip if wanted is None else min(there - skip, wanted)
        if wanted is not None and count < wanted:
            self.notes += (f"{self.name} has {count} samples where {wanted} were asked for",)
        rest = count % self.batch_size if self._whole else 0
        if rest == count:
            raise DataError(
                f"{count} samples do not fill a batch of {self.batch_size}",
                where=self.name,
                remedy="give more samples, or a smaller batch where the model takes one",
            )
        if rest:
            self.notes += (f"{rest} samples at the end of {self.name} fill no batch of {self.batch_size}",)
        return count - rest

    def shard(self, index: int, of: int) -> Dataset:
        """The ``index``-th (from 1) of ``of`` parts with whole batches; the parts together are this dataset.

        Raises:
            DataError: there is no such part, it is empty, or nobody knows how many samples there are.
        """
        if not 1 <= index <= of:
            raise DataError(f"there is no shard {index} of {of}", remedy="count from 1")
        if self.count is None:
            raise DataError(
                "cannot be cut into shards: the number of its samples is not known",
                where=self.name,
                remedy="give each shard data of its own",
            )
        batches = -(-self.count // self.batch_size)
        first, last = (batches * part // of * self.batch_size for part in (index - 1, index))
        if first == last:
            raise DataError(f"{batches} batches cannot be cut into {of} shards", where=self.name)
        part = object.__new__(Dataset)
        part.__dict__.update(self.__dict__)
        part.count = min(last, self.count) - first
        part._start, part._limit = self._start + first, part.count
        part.name = f"{self.name}, shard {index}/{of}"
        return part

    def __iter__(self) -> Iterator[Batch]:
        """
        Raises:
            DataError: the data cannot be read, do not fit the model, or hold NaN or infinity.
        """
        held: list[Batch] = []
        waiting = 0
        self._ended = False
        at = self._start
        end = None if self._limit is None else at + self._limit
        size = self.batch_size if end is None else min(self.batch_size, end - at)
        given = False
        for piece in self._reader.pieces(at, size):
            batch = self._checked(piece, at)
            at += len(batch)
            if end is not None and at > end:
                batch = _cut(batch, 0, len(batch) - (at - end))
            held.append(batch)
            waiting += len(batch)
            if waiting >= self.batch_size:
                joined = _joined(held)
                ready = waiting - waiting % self.batch_size
                for start in range(0, ready, self.batch_size):
                    yield _cut(joined, start, start + self.batch_size)
                given = True
                waiting -= ready
                held = [_cut(joined, ready, ready + waiting)] if waiting else []
            if end is not None and at >= end:
                break
        if waiting and not self._whole:
            yield _joined(held)
        elif not given:
            what = f"{waiting} samples do not fill a batch of {self.batch_size}" if waiting else "has no samples"
            raise DataError(what, where=self.name, remedy="give more samples")

    def _checked(self, piece: Piece, first: int) -> Batch:
        """The piece as a batch of any size, as the model takes it."""
        chosen = self._names.choose(list(piece.arrays), piece.where)
        specs = {spec.name: spec for spec in self._names.inputs or ()}
        lengths = {name: len(piece.arrays[name]) for name in sorted(chosen.arrays) if piece.arrays[name].ndim}
        samples = check_lengths(lengths, chosen.labels, piece.where)
        if self._ended and chosen.labels is not None and lengths.get(chosen.labels):
            raise DataError(
                "has labels again, behind samples without", where=piece.where, remedy="label all of them"
            )
        self._ended = chosen.labels is not None and lengths.get(chosen.labels, samples) < samples
        inputs = {}
        for name, source in chosen.inputs.items():
            array = piece.arrays[source]
            where = f"{piece.where}: array '{source}'"
            spec = specs.get(name)
            if self._normalise is not None and (spec is None or spec.dtype.kind == "f"):
                array = self._normalise(array, where)
            if spec is not None:
                array = fit(array, spec, where)
            _check_finite(array, first, where)
            inputs[name] = array
        labels = None if chosen.labels is None else piece.arrays[chosen.labels]
        if labels is not None:
            where = f"{piece.where}: array '{chosen.labels}'"
            if not labels.ndim:
                raise DataError("is one number", where=where, remedy="store one label a sample")
            _check_finite(labels, first, where)
        return Batch(inputs, labels, first)


def _fixed_batch(inputs: tuple[InputSpec, ...] | None) -> int | None:
    """How many samples the model insists on, None when it takes any number."""
    fixed = {spec.name: spec.batch for spec in inputs or () if spec.batch is not None}
    if len(set(fixed.values())) > 1:
        told = ", ".join(f"'{name}' {size}" for name, size in fixed.items())
        raise DataError(
            f"the first dimensions of the model's inputs differ: {told}",
            remedy="export the model with one batch dimension, first in every input",
        )
    size = next(iter(fixed.values()), None)
    if size == 0:
        raise DataError(f"input '{next(iter(fixed))}' of the model takes no samples: its first dimension is 0")
    return size


def check_lengths(lengths: Mapping[str, int], labels: str | None, where: str) -> int:
    """How many samples arrays of these lengths hold; ``labels`` may end early.

    Raises:
        DataError: they do not agree, or there are none.
    """
    counts = {name: length for name, length in lengths.items() if name != labels}
    if not counts:
        raise DataError("no array has an axis of samples", where=where, remedy="the first axis is the samples")
    samples = min(counts.values())
    if len(set(counts.values())) > 1 or (labels is not None and lengths.get(labels, 0) > samples):
        told = ", ".join(f"'{name}' {count}" for name, count in lengths.items())
        raise DataError(
            f"its arrays have different numbers of samples: {told}",
            where=where,
            remedy="the first axis of each counts the samples",
        )
    return samples


def _check_finite(array: Array, first: int, where: str) -> None:
    if array.dtype.kind not in "fc" and array.dtype.name != "bfloat16":
        return
    finite = np.isfinite(array)
    if finite.all():
        return
    place = np.argwhere(~finite)[0]
    value = array[tuple(place)]
    sample = f", sample {first + int(place[0])}" if len(place) else ""
    count = int(finite.size - np.count_nonzero(finite))
    inside = f" at {[int(index) for index in place[1:]]}" if len(place) > 1 else ""
    raise DataError(
        f"holds {value}{inside}{f' and {count - 1} more like it' if count > 1 else ''}",
        where=f"{where}{sample}",
        remedy="leave the sample out, or mend what wrote it",
    )


def _samples(arrays: Mapping[str, Array]) -> int:
    return next((len(array) for array in arrays.values() if array.ndim), 0)


def _cut(batch: Batch, start: int, stop: int) -> Batch:
    if start == 0 and stop >= len(batch):
        return batch
    inputs = {name: array[start:stop] if array.ndim else array for name, array in batch.inputs.items()}
    labels = None if batch.labels is None else batch.labels[start:stop]
    return Batch(inputs, labels, batch.first + start)


def _joined(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    first = batches[0]
    inputs = {
        name: _stacked([batch.inputs[name] for batch in batches], name, first) if array.ndim else array
        for name, array in first.inputs.items()
    }
    labels = [batch.labels for batch in batches if batch.labels is not None]
    if len(labels) not in (0, len(batches)):
        without = next(batch for batch in batches if batch.labels is None)
        raise DataError(f"sample {without.first} has no label, others have", remedy="label all of them or none")
    return Batch(inputs, _stacked(labels, "labels", first) if labels else None, first.first)


def _stacked(arrays: list[Array], name: str, first: Batch) -> Array:
    shapes = sorted({array.shape[1:] for array in arrays})
    if len(shapes) > 1:
        raise DataError(
            f"samples of the shapes {', '.join(str(list(shape)) for shape in shapes[:4])} cannot share a batch",
            where=f"array '{name}', samples from {first.first} on",
            remedy="make them the same size, or take one sample a batch",
        )
    return np.concatenate(arrays)
