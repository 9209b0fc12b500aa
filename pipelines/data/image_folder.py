"""Image files named in a list of lines ``path label``, prepared as they were in training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qat2int8.ir import DataError
from qat2int8.pipelines.data.array_file import readable
from qat2int8.pipelines.data.dataset import Array, Piece
from qat2int8.pipelines.data.inputs import LABELS, InputSpec
from qat2int8.pipelines.data.options import DataOptions
from qat2int8.pipelines.data.python_source import UNNAMED

__all__ = ["LIST_NAME", "ImageFolder", "Listed", "Preparation", "read_list"]

LIST_NAME = "val_list.txt"


@dataclass(frozen=True)
class Preparation:
    """From an image file to pixels.

    Attributes:
        resize: what the short side becomes, the other in proportion, both rounded; None: the image as it is.
        crop: height and width cut from the middle; None: the whole image.
        order: ``RGB`` or ``BGR``.
        channels_last: HWC instead of CHW.
        interpolation: nearest, bilinear, bicubic or lanczos.
    """

    resize: int | None
    crop: tuple[int, int] | None
    order: str = "RGB"
    channels_last: bool = False
    interpolation: str = "lanczos"

    def __call__(self, path: Path) -> Array:
        """The pixels, uint8 of the shape [3, height, width] or [height, width, 3].

        Resized and cropped before it becomes RGB, as ``full_ILSVRC2012_val_preprocess.py`` does.

        Raises:
            DataError: no image, or smaller than the crop.
        """
        pillow = _pillow()
        where = str(path)
        try:
            with readable(where), pillow.open(path) as file:
                image = file.copy()
        except (DataError, MemoryError):
            raise
        except Exception as error:  # whatever Pillow's decoders raise: SyntaxError, struct.error ...
            raise DataError(f"is not an image that can be read: {error}", where=where) from error
        if self.resize is not None:
            factor = self.resize / min(image.size)
            width, height = (max(1, round(size * factor)) for size in image.size)
            image = image.resize((width, height), getattr(pillow.Resampling, self.interpolation.upper()))
        if self.crop is not None:
            height, width = self.crop
            left, top = (image.width - width) // 2, (image.height - height) // 2
            if left < 0 or top < 0:
                raise DataError(
                    f"is {image.height} x {image.width} pixels, smaller than the crop of {height} x {width}",
                    where=where,
                    remedy="resize it first: ?resize=256",
                )
            image = image.crop((left, top, left + width, top + height))
        pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
        if self.order == "BGR":
            pixels = pixels[..., ::-1]
        return np.ascontiguousarray(pixels if self.channels_last else pixels.transpose(2, 0, 1))

    @classmethod
    def of(cls, options: DataOptions, inputs: tuple[InputSpec, ...] | None) -> Preparation:
        """What ``options`` say, and where they are silent the preset and the shape that the model wants."""
        imagenet = options.preset == "imagenet"
        shape = inputs[0].shape if inputs is not None and len(inputs) == 1 else None
        last = shape is not None and len(shape) == 4 and shape[-1] == 3 and shape[1] != 3
        if options.layout is not None:
            last = options.layout == "NHWC"
        crop = options.crop
        if crop is None and shape is not None and len(shape) == 4:
            height, width = shape[1:3] if last else shape[2:]
            crop = (height, width) if height is not None and width is not None else None
        if crop is None and imagenet:
            crop = (224, 224)
        resize = options.resize
        if resize is None and imagenet:
            resize = 256
        return cls(resize, crop, options.order or "RGB", last, options.interpolation or "lanczos")


@dataclass(frozen=True)
class Listed:
    """One line of a list: where the image is, its label, and where in which file that is written."""

    path: Path
    label: int
    where: str


class ImageFolder:
    """The images of a list, decoded one after the other."""

    whole_batches = False

    def __init__(self, folder: Path, list_file: Path | None, root: Path | None, preparation: Preparation) -> None:
        self.name = str(folder)
        _pillow()
        if list_file is None:
            list_file = folder / LIST_NAME if folder.is_dir() else folder
        self._images = read_list(list_file, root or list_file.parent)
        for image in self._images:
            if not image.path.is_file():
                raise DataError(f"there is no file '{image.path}'", where=image.where, remedy="take the line out")
        self.count: int | None = len(self._images)
        self._preparation = preparation

    def pieces(self, start: int, size: int) -> Iterator[Piece]:
        for image in self._images[start:]:
            yield Piece(
                {UNNAMED: self._preparation(image.path)[None], LABELS: np.asarray([image.label])}, str(image.path)
            )


def read_list(path: Path, root: Path) -> list[Listed]:
    """The images of a file of lines ``path label``; the path is relative to ``root`` and may contain spaces.

    Raises:
        DataError: the file cannot be read, or a line is something else.
    """
    with readable(str(path)):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise DataError("is not UTF-8 text", where=str(path)) from None
    listed = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        name, label = line.rsplit(maxsplit=1) if len(line.split()) > 1 else ("", "")
        if not name or not label.isascii() or not label.isdigit():
            raise DataError(
                f"'{line.strip()[:80]}' is not 'path label' with a whole number from 0", where=f"{path}:{number}"
            )
        listed.append(Listed(root / name.strip(), int(label), f"{path}:{number}"))
    if not listed:
        raise DataError("names no images", where=str(path), remedy="a line for each: path label")
    return listed


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            "images are read with Pillow, which is not installed", remedy="pip install 'qat2int8[images]'"
        ) from error
    return Image
