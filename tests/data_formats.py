"""The same ten samples in every format of data, small enough to be cut at every byte."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qat2int8.pipelines.data import Batch, InputSpec

Array = npt.NDArray[Any]

COUNT = 10
LABELS = np.arange(COUNT) % 7


@dataclass(frozen=True)
class Golden:
    """A format.

    Attributes:
        put: writes samples into a folder and returns what to open, and the file with the sample number 5.
        shape: of a sample as the model takes it.
        floats: whether the file holds floats, among which NaN is possible.
    """

    name: str
    put: Callable[[Path, Array], tuple[str, Path]]
    shape: tuple[int, ...]
    floats: bool = True

    def write(self, folder: Path) -> tuple[str, Path]:
        """Write the ten samples."""
        return self.put(folder, pixels(*self.shape))

    @property
    def samples(self) -> Array:
        """All samples as they are to come out."""
        return pixels(*self.shape) if self.floats else pixels(*self.shape) / np.float32(255)

    @property
    def spec(self) -> InputSpec:
        """The input of a model that takes them."""
        return InputSpec("x", np.dtype(np.float32), (None, *self.shape))

    def __str__(self) -> str:
        return self.name


def pixels(*shape: int) -> Array:
    """Ten samples with whole numbers from 0 to 250, none like another."""
    count = COUNT * int(np.prod(shape))
    return (np.arange(count, dtype=np.float32) * 7 % 251).reshape(COUNT, *shape)


def npz(folder: Path, x: Array) -> tuple[str, Path]:
    np.savez(folder / "d.npz", x=x, labels=LABELS)
    return str(folder / "d.npz"), folder / "d.npz"


def npz_compressed(folder: Path, x: Array) -> tuple[str, Path]:
    np.savez_compressed(folder / "d.npz", x=x, labels=LABELS)
    return str(folder / "d.npz"), folder / "d.npz"


def npy(folder: Path, x: Array) -> tuple[str, Path]:
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", LABELS)
    return f"{folder / 'x.npy'}?labels={folder / 'y.npy'}", folder / "x.npy"


def npz_folder(folder: Path, x: Array) -> tuple[str, Path]:
    """Batches of 4, 4 and 2."""
    for first in range(0, COUNT, 4):
        part = slice(first, first + 4)
        np.savez(folder / f"b{first}.npz", x=x[part], labels=LABELS[part])
    return str(folder), folder / "b4.npz"


def npy_folder(folder: Path, x: Array) -> tuple[str, Path]:
    """A sample a file."""
    for index, sample in enumerate(x):
        np.save(folder / f"s{index}.npy", sample)
    np.save(folder / "labels.npy", LABELS)
    return str(folder), folder / "s5.npy"


def idx(magic: int, array: Array) -> bytes:
    sizes = struct.pack(f">{array.ndim}i", *array.shape)
    return struct.pack(">i", magic) + sizes + array.astype(np.uint8).tobytes()


def mnist(folder: Path, x: Array) -> tuple[str, Path]:
    images = folder / "t10k-images-idx3-ubyte"
    images.write_bytes(idx(2051, x[:, 0]))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(2049, LABELS))
    return str(images), images


def mnist_gzip(folder: Path, x: Array) -> tuple[str, Path]:
    images = folder / "t10k-images-idx3-ubyte.gz"
    images.write_bytes(gzip.compress(idx(2051, x[:, 0]), mtime=0))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(2049, LABELS), mtime=0))
    return str(images), images


def batch_file(x: Array, labels: Array | None) -> bytes:
    end = b"" if labels is None else labels.astype("<f4").tobytes()
    return struct.pack("<4i", *x.shape) + x.astype("<f4").tobytes() + end


def tensorrt(folder: Path, x: Array) -> tuple[str, Path]:
    """Batches of 4, 4 and 2."""
    for number, first in enumerate(range(0, COUNT, 4)):
        part = slice(first, first + 4)
        content = batch_file(x[part], LABELS[part])
        (folder / f"batch{number}").write_bytes(content)
    return str(folder), folder / "batch1"


def paddle(folder: Path, x: Array) -> tuple[str, Path]:
    content = struct.pack("<q", COUNT) + x.astype("<f4").tobytes() + LABELS.astype("<i8").tobytes()
    (folder / "full_val.bin").write_bytes(content)
    return str(folder / "full_val.bin"), folder / "full_val.bin"


GOLDEN = [
    Golden("npz", npz, (2, 3)),
    Golden("npz-compressed", npz_compressed, (2, 3)),
    Golden("npy", npy, (2, 3)),
    Golden("npz-folder", npz_folder, (2, 3)),
    Golden("npy-folder", npy_folder, (2, 3)),
    Golden("mnist", mnist, (1, 2, 3), floats=False),
    Golden("mnist-gzip", mnist_gzip, (1, 2, 3), floats=False),
    Golden("tensorrt", tensorrt, (1, 2, 3)),
    Golden("paddle", paddle, (3, 2, 2)),
]


def inputs_of(batches: list[Batch], name: str = "x") -> Array:
    """All samples of one input."""
    return np.concatenate([batch.inputs[name] for batch in batches])


def labels_of(batches: list[Batch]) -> list[int]:
    """All labels."""
    return [int(label) for batch in batches if batch.labels is not None for label in batch.labels]
