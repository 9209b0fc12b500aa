"""What format data are in, from names and first bytes."""

from __future__ import annotations

import struct
from pathlib import Path

from qat2int8.ir import DataError
from qat2int8.pipelines.data.array_file import readable
from qat2int8.pipelines.data.array_folder import SUFFIXES
from qat2int8.pipelines.data.image_folder import LIST_NAME
from qat2int8.pipelines.data.mnist_idx import MAGICS, images_in
from qat2int8.pipelines.data.options import FORMATS
from qat2int8.pipelines.data.python_source import is_function_name
from qat2int8.pipelines.data.tensorrt_batches import has_batches

__all__ = ["recognised"]

_BY_SUFFIX = {".npz": "npz", ".npy": "npy", ".txt": "images", ".bin": "paddle"}


def recognised(path: str) -> str:
    """The format of the file, folder or function.

    Raises:
        DataError: there is none, or it is of no known format.
    """
    place = Path(path)
    if not place.exists():
        if is_function_name(path):
            return "python"
        if has_batches(place):
            return "tensorrt"
        raise DataError("no such file or folder", where=path)
    with readable(path):
        found = _of_folder(place) if place.is_dir() else _of_file(place)
    if found is None:
        raise DataError(
            "is in no format that is recognised",
            where=path,
            remedy=f"say which it is: ?format={'|'.join(FORMATS)}",
        )
    return found


def _of_folder(folder: Path) -> str | None:
    if (folder / LIST_NAME).is_file():
        return "images"
    if images_in(folder):
        return "mnist"
    if any(path.suffix in SUFFIXES for path in folder.iterdir()):
        return "folder"
    return "tensorrt" if has_batches(folder) else None


def _of_file(file: Path) -> str | None:
    with file.open("rb") as stream:
        start = stream.read(6)
    if not start:
        raise DataError("is an empty file", where=str(file))
    if start[:4] == b"PK\x03\x04":
        return "npz"
    if start == b"\x93NUMPY":
        return "npy"
    if start[:2] == b"\x1f\x8b" or start[:4] in [struct.pack(">i", magic) for magic in MAGICS]:
        return "mnist"
    return _BY_SUFFIX.get(file.suffix)
