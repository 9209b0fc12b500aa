"""``.npz``: arrays named after the model's inputs, the first axis of each the samples."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qat2int8.ir import DataError
from qat2int8.pipelines.data.array_file import ArrayHeader, read_header, read_rows, readable
from qat2int8.pipelines.data.dataset import Piece, check_lengths
from qat2int8.pipelines.data.inputs import Names

__all__ = ["Npz"]


class Npz:
    """Arrays of one file. Only what the model needs and the labels are read, a batch at a time.

    ``each`` says whether the file is a batch or one sample without an axis of samples; None tells it by the rank.
    """

    whole_batches = False

    def __init__(self, path: Path, names: Names, each: str | None = "batch") -> None:
        self.name = str(path)
        self._path = path
        found = _headers(path)
        chosen = names.choose(list(found), self.name)
        shapes = {name: header.shape for name, header in found.items()}
        single = each == "sample" or (each is None and names.one_sample(shapes, chosen, self.name))
        headers = {name: header for name, header in found.items() if name in chosen.arrays}
        self._headers = {name: header.as_sample() for name, header in headers.items()} if single else headers
        lengths = {name: header.shape[0] for name, header in self._headers.items() if header.shape}
        self._lengths = lengths
        self.count: int | None = check_lengths(lengths, chosen.labels, self.name)

    def pieces(self, start: int, size: int) -> Iterator[Piece]:
        assert self.count is not None
        with readable(self.name), contextlib.ExitStack() as stack:
            archive = stack.enter_context(zipfile.ZipFile(self._path))
            streams = {name: stack.enter_context(archive.open(f"{name}.npy")) for name in self._headers}
            for name, header in self._headers.items():
                first = min(start, self._lengths.get(name, 0))
                streams[name].seek(header.offset + first * (header.row_bytes if header.shape else 0))
            shared = {
                name: np.frombuffer(streams[name].read(), header.dtype)[0]
                for name, header in self._headers.items()
                if not header.shape
            }
            for at in range(start, self.count, size):
                count = min(size, self.count - at)
                rows = {
                    name: read_rows(
                        streams[name],
                        header,
                        at,
                        max(0, min(count, self._lengths[name] - at)),
                        f"{self.name}: array '{name}'",
                    )
                    for name, header in self._headers.items()
                    if header.shape
                }
                yield Piece({**shared, **rows}, self.name)


def _headers(path: Path) -> dict[str, ArrayHeader]:
    headers = {}
    with readable(str(path)), zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.filename.endswith(".npy"):
                continue
            name = info.filename.removesuffix(".npy")
            where = f"{path}: array '{name}'"
            with archive.open(info) as stream:
                header = read_header(stream, where)
            if info.file_size != header.offset + header.nbytes:
                raise DataError(
                    f"has {info.file_size - header.offset} bytes of numbers where its header says {header.nbytes}",
                    where=where,
                    remedy="write it again",
                )
            headers[name] = header
    if not headers:
        raise DataError("holds no arrays", where=str(path), remedy="write it with numpy.savez")
    return headers
