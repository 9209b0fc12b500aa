"""The binary of PaddlePaddle's ``full_ILSVRC2012_val_preprocess.py``.

Little endian, without padding: an int64 N, then N images of float32 in CHW order, then N int64 labels. The file
does not say how large an image is.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from qat2int8.ir import DataError
from qat2int8.pipelines.data.array_file import read_exactly, readable
from qat2int8.pipelines.data.dataset import Array, Piece
from qat2int8.pipelines.data.inputs import LABELS, InputSpec
from qat2int8.pipelines.data.python_source import UNNAMED

__all__ = ["PaddleBinary"]

_HEADER = 8
_CHANNELS = 3


class PaddleBinary:
    """One file.

    The size of the images is ``dim`` if given; else the model's if a file of N such images has this size; else
    that of square images of 3 channels of which N fill the file.
    """

    whole_batches = False

    def __init__(self, path: Path, dim: int | None, inputs: tuple[InputSpec, ...] | None) -> None:
        self.name = str(path)
        self._path = path
        with readable(self.name), path.open("rb") as file:
            header = file.read(_HEADER)
            size = path.stat().st_size
        if len(header) < _HEADER:
            raise DataError("is cut short within its header", where=self.name, remedy="write or copy it again")
        (count,) = struct.unpack("<q", header)
        if count < 0 or count > size:
            raise DataError(
                f"says it has {count} images and has {size} bytes",
                where=self.name,
                remedy="is it such a file? an int64 count, float32 images, int64 labels",
            )
        self.count: int | None = count
        self._shape = _shape(self.name, count, size, dim, inputs) if count else (0,)
        self._labels = self._read_labels(count)

    def pieces(self, start: int, size: int) -> Iterator[Piece]:
        assert self.count is not None
        with readable(self.name), self._path.open("rb") as file:
            file.seek(_HEADER + start * self._image_bytes)
            for at in range(start, self.count, size):
                count = min(size, self.count - at)
                pixels = self._read(file, count * self._image_bytes, "<f4").reshape(count, *self._shape)
                yield Piece({UNNAMED: pixels, LABELS: self._labels[at : at + count]}, self.name)

    @property
    def _image_bytes(self) -> int:
        return _image_bytes(self._shape)

    def _read_labels(self, count: int) -> Array:
        with readable(self.name), self._path.open("rb") as file:
            file.seek(_HEADER + count * self._image_bytes)
            labels = self._read(file, 8 * count, "<i8")
        if labels.size and labels.min() < 0:
            sample = int(np.argmax(labels < 0))
            raise DataError(
                f"the label is {labels[sample]}",
                where=f"{self.name}: sample {sample}",
                remedy="give the size of the images: ?dim=224",
            )
        return labels

    def _read(self, file: IO[bytes], size: int, dtype: str) -> Array:
        content = read_exactly(file, size)
        if len(content) < size:
            raise DataError("has become shorter while it was read", where=self.name)
        return np.frombuffer(content, dtype).astype(np.dtype(dtype).newbyteorder("="), copy=False)


def _image_bytes(shape: tuple[int, ...]) -> int:
    return 4 * math.prod(shape)


def _shape(
    where: str, count: int, size: int, dim: int | None, inputs: tuple[InputSpec, ...] | None
) -> tuple[int, ...]:
    """The shape of an image."""

    def fits(shape: tuple[int, ...]) -> bool:
        return size == _HEADER + count * (_image_bytes(shape) + 8)

    if dim is not None:
        shape = (_CHANNELS, dim, dim)
        if not fits(shape):
            whole = max(size - _HEADER, 0) // _image_bytes(shape)
            raise DataError(
                f"has {size} bytes where {count} images of {list(shape)} with labels need "
                f"{_HEADER + count * (_image_bytes(shape) + 8)} (there is room for {whole} images)",
                where=where,
                remedy="write or copy it again, or give another ?dim=",
            )
        return shape
    wanted = inputs[0].shape if inputs is not None and len(inputs) == 1 else None
    if wanted is not None and len(wanted) == 4 and None not in wanted[1:]:
        of_model = tuple(int(dim or 0) for dim in wanted[1:])
        if fits(of_model):
            return of_model
    side = math.isqrt(max((size - _HEADER) // count - 8, 0) // (4 * _CHANNELS))
    square = (_CHANNELS, side, side)
    if side and fits(square):
        return square
    raise DataError(
        f"has {size} bytes, which are not {count} square images of {_CHANNELS} channels with labels",
        where=where,
        remedy="write or copy it again",
    )
