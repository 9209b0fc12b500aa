"""numpy's array format (``.npy``, and the members of ``.npz``) read row by row from any stream."""

from __future__ import annotations

import contextlib
import lzma
import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from qat2int8.ir import DataError

__all__ = ["ArrayHeader", "read_exactly", "read_header", "read_rows", "readable"]


@dataclass(frozen=True)
class ArrayHeader:
    """What stands in front of the numbers. ``offset`` is where they start."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry of the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return math.prod(self.shape) * self.dtype.itemsize

    def as_sample(self) -> ArrayHeader:
        """The same numbers as an array of one sample."""
        return replace(self, shape=(1, *self.shape))


@contextlib.contextmanager
def readable(where: str) -> Iterator[None]:
    """Say of a file that cannot be read that it cannot be read.

    Raises:
        DataError: in place of what the system, zip or gzip raise.
    """
    try:
        yield
    except FileNotFoundError:
        raise DataError("no such file", where=where) from None
    except IsADirectoryError:
        raise DataError("is a folder", where=where, remedy="name a file") from None
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"is damaged or cut short: {reason}", where=where, remedy="write it again") from error
    except (NotImplementedError, RuntimeError) as error:  # compressed or encrypted in ways zipfile does not know
        raise DataError(f"cannot be read: {error}", where=where, remedy="write it with numpy") from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=where) from error


def read_header(stream: IO[bytes], where: str) -> ArrayHeader:
    """The header at the start of ``stream``, which stands at the numbers afterwards.

    Raises:
        DataError: it is none, or that of an array that cannot be read by rows.
    """
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
        else:
            raise ValueError(f"version {version[0]}.{version[1]} of the format is not for arrays of numbers")
    except Exception as error:  # numpy parses the header as Python, which fails in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"is not an array of numpy: {reason}", where=where, remedy="write it with numpy.save or numpy.savez"
        ) from error
    if dtype.kind not in "biuf":
        kind = "Python objects" if dtype.hasobject else f"type {dtype}"
        raise DataError(f"holds {kind}, not numbers", where=where, remedy="store an array of numbers")
    if any(size < 0 for size in shape) or 0 in shape[1:]:
        raise DataError(f"has the shape {list(shape)}", where=where, remedy="store samples with numbers in them")
    if fortran and sum(size > 1 for size in shape) > 1:
        raise DataError(
            "is stored in Fortran order, in which samples are not in one piece",
            where=where,
            remedy="store numpy.ascontiguousarray(x)",
        )
    return ArrayHeader(tuple(shape), dtype, stream.tell())


def read_rows(stream: IO[bytes], header: ArrayHeader, first: int, count: int, where: str) -> npt.NDArray[Any]:
    """``count`` entries of the first axis, of which ``stream`` stands at number ``first``.

    Raises:
        DataError: the stream ends before.
    """
    content = read_exactly(stream, count * header.row_bytes)
    whole = len(content) // header.row_bytes
    if whole < count:
        raise DataError(
            f"is cut short: of {header.shape[0]} samples {first + whole} are there",
            where=where,
            remedy="write or copy it again",
        )
    array = np.frombuffer(content, header.dtype).reshape(count, *header.shape[1:])
    return array.astype(header.dtype.newbyteorder("="), copy=False)


_PIECE = 1 << 26
"""Bytes."""


def read_exactly(stream: IO[bytes], count: int) -> bytearray:
    """``count`` bytes, fewer only where the stream ends.

    Not mapped: pages of a mapped file count as memory of the process, and one that shrinks meanwhile kills it. A
    damaged header may ask for more than there is memory, so no more is taken than the stream turns out to hold.
    """
    content = bytearray()
    filled = 0
    while filled < count:
        content.extend(bytes(min(_PIECE, count - filled)))
        view = memoryview(content)
        while filled < len(content) and (got := stream.readinto(view[filled:])):  # type: ignore[attr-defined]
            filled += got
        view.release()
        if filled < len(content):
            break
    del content[filled:]
    return content
