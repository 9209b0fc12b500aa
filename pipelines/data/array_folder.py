"""A folder of ``.npz`` or ``.npy`` files, each of them a sample or a batch."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from pathlib import Path

from qat2int8.ir import DataError
from qat2int8.pipelines.data.array_file import readable
from qat2int8.pipelines.data.dataset import Array, Piece, Reader
from qat2int8.pipelines.data.inputs import LABELS, Names
from qat2int8.pipelines.data.npy import Npy, read_labels
from qat2int8.pipelines.data.npz import Npz
from qat2int8.pipelines.data.python_source import UNNAMED

__all__ = ["ArrayFolder"]

SUFFIXES = (".npz", ".npy")

_LABEL_FILE = "labels.npy"


class ArrayFolder:
    """The files of a folder in order of their names, those that start with a dot left out.

    A file is a batch when its arrays have at least as many axes as the model's inputs, and one sample, without an
    axis of samples, when they have fewer. ``each`` says it where the model does not. ``.npy`` files can have their
    labels in ``labels.npy`` beside them.

    Attributes:
        names: how the arrays of the pieces are called.
    """

    whole_batches = False

    def __init__(self, folder: Path, names: Names, each: str | None) -> None:
        self.name = str(folder)
        self._each = each
        with readable(self.name):
            files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
        files = [path for path in files if not path.name.startswith(".")]
        label_file = folder / (names.labels or _LABEL_FILE)
        self._files = [path for path in files if path.suffix == ".npz" or path != label_file]
        kinds = {path.suffix for path in self._files}
        if len(kinds) != 1:
            what = "holds both .npz and .npy files" if kinds else "holds no .npz or .npy files"
            raise DataError(what, where=self.name, remedy="give a folder with one kind of them")
        apart = kinds == {".npy"}
        self.names = Names(names.inputs, names.renamed) if apart else names
        self._starts = [0, *itertools.accumulate(self._reader(path).count or 0 for path in self._files)]
        self.count: int | None = self._starts[-1]
        self._labels: Array | None = None
        if apart and (names.labels is not None or label_file.exists()):
            self._labels = read_labels(label_file, self._starts[-1], self.name)

    def pieces(self, start: int, size: int) -> Iterator[Piece]:
        for index in range(bisect.bisect_right(self._starts, start) - 1, len(self._files)):
            at = max(start, self._starts[index])
            for piece in self._reader(self._files[index]).pieces(at - self._starts[index], size):
                if self._labels is None:
                    yield piece
                    continue
                count = len(piece.arrays[UNNAMED])
                yield Piece({**piece.arrays, LABELS: self._labels[at : at + count]}, piece.where)
                at += count

    def _reader(self, path: Path) -> Reader:
        if path.suffix == ".npz":
            return Npz(path, self.names, self._each)
        return Npy(path, self.names, each=self._each)
