"""``.npy``: one array, its first axis the samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qat2int8.ir import DataError
from qat2int8.pipelines.data.array_file import ArrayHeader, read_header, read_rows, readable
from qat2int8.pipelines.data.dataset import Array, Piece
from qat2int8.pipelines.data.inputs import LABELS, Names
from qat2int8.pipelines.data.python_source import UNNAMED

__all__ = ["Npy", "read_labels"]


class Npy:
    """The array of one file, for a model with one input, and the labels of another file.

    ``each`` says whether the file is a batch or one sample without an axis of samples; None tells it by the rank.
    """

    whole_batches = False

    def __init__(self, path: Path, names: Names, labels: Path | None = None, each: str | None = "batch") -> None:
        self.name = str(path)
        self._path = path
        header = _header(path)
        chosen = names.choose([UNNAMED], self.name)
        if each == "sample" or (each is None and names.one_sample({UNNAMED: header.shape}, chosen, self.name)):
            header = header.as_sample()
        if not header.shape:
            raise DataError("holds a single number", where=self.name, remedy="the first axis is the samples")
        self._header = header
        self.count: int | None = header.shape[0]
        self._labels = None if labels is None else read_labels(labels, header.shape[0], self.name)

    def pieces(self, start: int, size: int) -> Iterator[Piece]:
        assert self.count is not None
        with readable(self.name), self._path.open("rb") as file:
            file.seek(self._header.offset + start * self._header.row_bytes)
            for at in range(start, self.count, size):
                count = min(size, self.count - at)
                arrays = {UNNAMED: read_rows(file, self._header, at, count, self.name)}
                if self._labels is not None:
                    arrays[LABELS] = self._labels[at : at + count]
                yield Piece(arrays, self.name)


def read_labels(path: Path, count: int, data: str) -> Array:
    """The labels in a ``.npy`` file, one entry of the first axis for each of the ``count`` samples of ``data``.

    The last samples may have none.

    Raises:
        DataError: the file cannot be read, or has more of them.
    """
    header = _header(path)
    have = header.shape[0] if header.shape else 1
    if not header.shape or have > count:
        raise DataError(f"has {have} labels for the {count} samples of {data}", where=str(path))
    with readable(str(path)), path.open("rb") as file:
        file.seek(header.offset)
        return read_rows(file, header, 0, have, str(path))


def _header(path: Path) -> ArrayHeader:
    where = str(path)
    with readable(where), path.open("rb") as file:
        header = read_header(file, where)
        there = path.stat().st_size - header.offset
    if there < header.nbytes:
        whole = there // header.row_bytes
        of = f"of {header.shape[0]} samples {whole} are there" if header.shape else "the number is not there"
        raise DataError(f"is cut short: {of}", where=where, remedy="write or copy it again")
    if there > header.nbytes:
        raise DataError(
            f"goes on for {there - header.nbytes} bytes behind its array",
            where=where,
            remedy="save one array a file, or several in a .npz",
        )
    return header
