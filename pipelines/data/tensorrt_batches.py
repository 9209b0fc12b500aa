"""Batch files as TensorRT's samples read them for calibration, and as Caffe wrote them.

A file ``<prefix><number><suffix>`` holds four int32 (N, C, H, W), N*C*H*W float32 and, if there are any, N float32
labels, all little endian. Numbers start at 0. After ``BatchStream`` of TensorRT's samples.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qat2int8.ir import DataError
from qat2int8.pipelines.data.array_file import read_exactly, readable
from qat2int8.pipelines.data.dataset import Array, Piece
from qat2int8.pipelines.data.inputs import LABELS
from qat2int8.pipelines.data.python_source import UNNAMED

__all__ = ["TensorrtBatches", "has_batches"]

_SUFFIXES = r"(?:\.batch)?"
"""What the files end with where the caller does not say."""

_HEADER = 16


@dataclass(frozen=True)
class _File:
    path: Path
    shape: tuple[int, int, int, int]
    labelled: bool

    @property
    def sample_bytes(self) -> int:
        return 4 * math.prod(self.shape[1:])

    def __str__(self) -> str:
        return f"samples of the shape {list(self.shape[1:])} with{'' if self.labelled else 'out'} labels"


class TensorrtBatches:
    """The files of one folder, joined: a batch may start in one and end in the next.

    ``folder`` may end with the prefix of the files, as in ``batches/batch``.

    As with TensorRT, samples at the end that do not fill a batch are left out.
    """

    whole_batches = True

    def __init__(self, folder: Path, prefix: str | None, suffix: str | None) -> None:
        self.name = str(folder)
        if prefix is None and not folder.exists():
            prefix, folder = folder.name, folder.parent
        with readable(self.name):
            paths = _numbered(folder, prefix, suffix)
        self._files = [_opened(path) for path in paths]
        first = self._files[0]
        for file in self._files[1:]:
            if file.shape[1:] != first.shape[1:] or file.labelled != first.labelled:
                raise DataError(f"has {file}, {first.path.name} has {first}", where=str(file.path))
        self._starts = [0, *itertools.accumulate(file.shape[0] for file in self._files)]
        self.count: int | None = self._starts[-1]

    def pieces(self, start: int, size: int) -> Iterator[Piece]:
        for index in range(bisect.bisect_right(self._starts, start) - 1, len(self._files)):
            file = self._files[index]
            inside = max(start - self._starts[index], 0)
            for at in range(inside, file.shape[0], size):
                yield _read(file, at, min(size, file.shape[0] - at))


def has_batches(folder: Path) -> bool:
    """Whether the first of a series of batch files is in the folder, or starts with its path."""
    if not folder.is_dir():
        return any(Path(f"{folder}0{suffix}").is_file() for suffix in ("", ".batch"))
    return any(re.fullmatch(rf".*?(?<!\d)0+{_SUFFIXES}", path.name) for path in folder.iterdir())


def _numbered(folder: Path, prefix: str | None, suffix: str | None) -> list[Path]:
    """The files in order of their numbers, from 0 without a gap."""
    series: dict[tuple[str, str], dict[int, Path]] = {}
    start = ".*?" if prefix is None else re.escape(prefix)
    end = _SUFFIXES if suffix is None else re.escape(suffix)
    name = re.compile(rf"({start})(\d+)({end})")
    for path in folder.iterdir():
        match = name.fullmatch(path.name)
        if match is not None and path.is_file():
            series.setdefault((match[1], match[3]), {})[int(match[2])] = path
    if not series:
        shown = f"'{prefix or ''}0{suffix or ''}'" if prefix or suffix else "'batch0' or '0.batch'"
        raise DataError(
            f"holds no batch files, such as {shown}", where=str(folder), remedy="say ?prefix=...&suffix=..."
        )
    if len(series) > 1:
        told = ", ".join(f"'{first}0{last}'" for first, last in sorted(series))
        raise DataError(
            f"holds several series of batch files: {told}",
            where=str(folder),
            remedy="say which one: ?prefix=...&suffix=...",
        )
    (((first, last), found),) = series.items()
    for number in range(max(found) + 1):
        if number not in found:
            raise DataError(
                f"'{first}{number}{last}' is missing, '{found[max(found)].name}' is there",
                where=str(folder),
                remedy="batch files are numbered from 0 without a gap",
            )
    return [found[number] for number in sorted(found)]


def _opened(path: Path) -> _File:
    where = str(path)
    with readable(where), path.open("rb") as stream:
        header = stream.read(_HEADER)
        size = path.stat().st_size
    if len(header) < _HEADER:
        raise DataError("is cut short within its header", where=where, remedy="write or copy it again")
    shape = struct.unpack("<4i", header)
    if any(size < 1 for size in shape):
        raise DataError(
            f"says it has the shape {list(shape)}",
            where=where,
            remedy="is it a batch file? four int32, then float32",
        )
    file = _File(path, shape, False)
    plain = _HEADER + shape[0] * file.sample_bytes
    labelled = plain + 4 * shape[0]
    if size not in (plain, labelled):
        whole = min((size - _HEADER) // file.sample_bytes, shape[0])
        raise DataError(
            f"has {size} bytes; its header {list(shape)} wants {plain}, or {labelled} with labels "
            f"({whole} samples are whole)",
            where=where,
            remedy="write or copy it again",
        )
    return _File(path, shape, size == labelled)


def _read(file: _File, first: int, count: int) -> Piece:
    where = str(file.path)
    with readable(where), file.path.open("rb") as stream:
        stream.seek(_HEADER + first * file.sample_bytes)
        content = read_exactly(stream, count * file.sample_bytes)
        stream.seek(_HEADER + file.shape[0] * file.sample_bytes + 4 * first)
        labels = read_exactly(stream, 4 * count) if file.labelled else bytearray()
    if len(content) < count * file.sample_bytes or len(labels) < 4 * count * file.labelled:
        raise DataError("has become shorter while it was read", where=where)
    arrays = {UNNAMED: _floats(content).reshape(count, *file.shape[1:])}
    if file.labelled:
        arrays[LABELS] = _floats(labels)
    return Piece(arrays, where)


def _floats(content: bytearray) -> Array:
    return np.frombuffer(content, "<f4").astype(np.float32, copy=False)
