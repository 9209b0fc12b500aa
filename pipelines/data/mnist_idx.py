"""The idx files that MNIST comes in: images in an idx3 file, labels in an idx1 file, each with or without gzip.

After http://yann.lecun.com/exdb/mnist/ and the ``MNISTBatchStream`` of TensorRT's samples: big-endian int32 magic
(2051 for images, 2049 for labels) and sizes, then unsigned bytes. A sample has the shape [1, rows, columns].
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np

from qat2int8.ir import DataError
from qat2int8.pipelines.data.array_file import read_exactly, readable
from qat2int8.pipelines.data.dataset import Array, Piece
from qat2int8.pipelines.data.inputs import LABELS
from qat2int8.pipelines.data.python_source import UNNAMED

__all__ = ["MAGICS", "MnistIdx", "images_in"]

_IMAGES, _LABELS = 2051, 2049
MAGICS = {_IMAGES: "images (idx3)", _LABELS: "labels (idx1)"}


@dataclass(frozen=True)
class _Header:
    count: int
    sample: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        return int(np.prod(self.sample, dtype=np.int64))


class MnistIdx:
    """A pair of files. Without ``labels`` the file beside the images is taken, whose name differs as MNIST's do.

    ``images`` may be a folder with one such pair.
    """

    whole_batches = False

    def __init__(self, images: Path, labels: Path | None) -> None:
        if images.is_dir():
            found = images_in(images)
            if len(found) != 1:
                told = ", ".join(path.name for path in found) or "none"
                raise DataError(f"the files of images in it are {told}", where=str(images), remedy="name one")
            images = found[0]
        self.name = str(images)
        self._path = images
        self._header = _read_header(images, _IMAGES)
        self.count: int | None = self._header.count
        labels = labels or _beside(images)
        self._labels = None if labels is None else self._read_labels(labels)

    def pieces(self, start: int, size: int) -> Iterator[Piece]:
        header = self._header
        with readable(self.name), _open(self._path) as file:
            file.seek(header.offset + start * header.bytes)
            for at in range(start, header.count, size):
                count = min(size, header.count - at)
                pixels = _read(file, header, at, count, self.name)
                arrays = {UNNAMED: pixels.reshape(count, 1, *header.sample)}
                if self._labels is not None:
                    arrays[LABELS] = self._labels[at : at + count]
                yield Piece(arrays, self.name)
            _check_end(file, self.name)

    def _read_labels(self, path: Path) -> Array:
        header = _read_header(path, _LABELS)
        if header.count > self._header.count:
            what = f"has {header.count} labels for the {self.count} images of {self.name}"
            raise DataError(what, where=str(path))
        with readable(str(path)), _open(path) as file:
            file.seek(header.offset)
            labels = _read(file, header, 0, header.count, str(path))
            _check_end(file, str(path))
        return labels


def images_in(folder: Path) -> list[Path]:
    """The files of images in a folder, called as those of MNIST are."""
    return sorted(path for path in folder.iterdir() if "images-idx3" in path.name or "images.idx3" in path.name)


def _beside(images: Path) -> Path | None:
    name = images.name.replace("images-idx3", "labels-idx1").replace("images.idx3", "labels.idx1")
    stem = name.removesuffix(".gz")
    candidates = (images.with_name(stem), images.with_name(f"{stem}.gz"))
    return next((path for path in candidates if path != images and path.is_file()), None)


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if _zipped(path) else path.open("rb")


def _zipped(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _read_header(path: Path, magic: int) -> _Header:
    where = str(path)
    with readable(where), _open(path) as file:
        start = file.read(4)
        found = struct.unpack(">i", start)[0] if len(start) == 4 else None
        if found != magic:
            what = f"holds {MAGICS[found]}" if found in MAGICS else f"starts with {start.hex() or 'nothing'}"
            raise DataError(
                f"{what} where {MAGICS[magic]} are expected, which start with {magic:08x}",
                where=where,
                remedy="give the file of images, and that of labels with ?labels=FILE",
            )
        axes = 3 if magic == _IMAGES else 1
        sizes = file.read(4 * axes)
        if len(sizes) < 4 * axes:
            raise DataError("is cut short within its header", where=where, remedy="copy it again")
        count, *sample = struct.unpack(f">{axes}i", sizes)
        header = _Header(count, tuple(sample), 4 + 4 * axes)
        if count < 0 or any(size < 1 for size in sample):
            raise DataError(f"says it has the shape {[count, *sample]}", where=where, remedy="copy it again")
        if not _zipped(path):
            there = path.stat().st_size - header.offset
            if there < count * header.bytes:
                whole = there // header.bytes
                raise DataError(
                    f"is cut short: of {count} samples {whole} are there", where=where, remedy="copy it again"
                )
            if there > count * header.bytes:
                raise DataError(
                    f"goes on for {there - count * header.bytes} bytes behind its {count} samples", where=where
                )
    return header


def _read(file: IO[bytes], header: _Header, first: int, count: int, where: str) -> Array:
    content = read_exactly(file, count * header.bytes)
    if len(content) < count * header.bytes:
        whole = first + len(content) // header.bytes
        raise DataError(
            f"is cut short: of {header.count} samples {whole} are there", where=where, remedy="copy it again"
        )
    return np.frombuffer(content, np.uint8).reshape(count, *header.sample)


def _check_end(file: IO[bytes], where: str) -> None:
    """Of a compressed file the end alone tells how long it is."""
    if file.read(1):
        raise DataError("goes on behind its samples", where=where, remedy="copy it again")
