"""Image files prepared once and packed into one file, so that no measurement waits for a decoder.

After PaddlePaddle's ``full_ILSVRC2012_val_preprocess.py``, but that the size asked for is the size of the pixels,
and that an image which cannot be read leaves no hole in the file.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np

from qat2int8.ir import DataError, OutputError
from qat2int8.ir.io import check_output_path, replacing
from qat2int8.pipelines.data.image_folder import Listed, Preparation
from qat2int8.pipelines.data.normalise import Normalise

__all__ = ["SUFFIXES", "Packed", "pack"]

SUFFIXES = (".bin", ".npz")
"""PaddlePaddle's binary, or the arrays ``images`` and ``labels``."""

OnImage = Callable[[int], None]
"""Told after each image how many of the list are done."""


@dataclass(frozen=True)
class Packed:
    """What became of a list of images.

    Attributes:
        count: images in the file.
        shape: of one of them.
        skipped: why others are not in it, each with its place in the list.
    """

    count: int
    shape: tuple[int, ...]
    skipped: tuple[str, ...]


def pack(
    images: Sequence[Listed],
    preparation: Preparation,
    normalise: Normalise,
    path: str | os.PathLike[str],
    *,
    on_image: OnImage | None = None,
) -> Packed:
    """Write images and their labels to ``path``, in the format of its suffix; whole or not at all.

    Images that cannot be read are left out. One image at a time is in memory.

    Raises:
        DataError: another suffix, images of different sizes, or none that can be read.
        OutputError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"the suffix '{path.suffix}' names no format to pack into",
            where=str(path),
            remedy="end it with .bin for PaddlePaddle's binary, or with .npz",
        )
    check_output_path(path)
    write = _paddle if path.suffix == ".bin" else _npz
    labels: list[int] = []
    skipped: list[str] = []
    shape: tuple[int, ...] = ()
    # How many there will be stands in front of the images, and is known behind them.
    with _scratch(path) as body:
        for done, image in enumerate(images, 1):
            try:
                pixels = preparation(image.path)
            except DataError as error:
                skipped.append(f"{image.where}: {error}")
                pixels = None
            if pixels is not None:
                if shape and pixels.shape != shape:
                    raise DataError(
                        f"has the shape {list(pixels.shape)}, those before it {list(shape)}",
                        where=str(image.path),
                        remedy="crop all to one size",
                    )
                shape = pixels.shape
                body.write(normalise(pixels[None], str(image.path)).astype("<f4").tobytes())
                labels.append(image.label)
            if on_image is not None:
                on_image(done)
        if not labels:
            raise DataError(f"none of {len(images)} images can be read; {skipped[0]}")
        body.seek(0)
        with replacing(path) as file:
            write(file, body, shape, labels)
    return Packed(len(labels), shape, tuple(skipped))


@contextmanager
def _scratch(path: Path) -> Iterator[IO[bytes]]:
    """A file without a name beside ``path``, where there is room for the result too."""
    try:
        with tempfile.TemporaryFile(dir=path.parent) as body:
            yield body
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", where=str(path)) from error


def _paddle(file: BinaryIO, body: IO[bytes], shape: tuple[int, ...], labels: Sequence[int]) -> None:
    file.write(struct.pack("<q", len(labels)))
    shutil.copyfileobj(body, file)
    file.write(np.asarray(labels, "<i8").tobytes())


def _npz(file: BinaryIO, body: IO[bytes], shape: tuple[int, ...], labels: Sequence[int]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open("images.npy", "w", force_zip64=True) as member:
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(labels), *shape)}
            np.lib.format.write_array_header_1_0(member, header)
            shutil.copyfileobj(body, member)
        with archive.open("labels.npy", "w") as member:
            np.lib.format.write_array(member, np.asarray(labels, np.int64), allow_pickle=False)
