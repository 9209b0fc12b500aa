"""How data are described: a path, a path with ``?key=value&key=value``, or a YAML file of the same keys."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from qat2int8.ir import DataError, PipelineError
from qat2int8.pipelines.data.normalise import IMAGENET, Normalise
from qat2int8.pipelines.spec import read_document

__all__ = ["FORMATS", "DataOptions", "parse"]

FORMATS: dict[str, tuple[str, ...]] = {
    "npz": ("inputs", "labels"),
    "npy": ("labels",),
    "folder": ("inputs", "labels", "each"),
    "mnist": ("labels",),
    "tensorrt": ("prefix", "suffix"),
    "paddle": ("dim",),
    "images": ("list", "root", "preset", "resize", "crop", "order", "interpolation"),
    "python": ("inputs", "labels"),
}
"""Each format with the keys that only it and some others have."""

EVERYWHERE = ("path", "format", "skip", "scale", "mean", "std", "layout")


def _number(value: Any) -> Any:
    """``1/255`` as a number; a text without end would be one too."""
    if isinstance(value, str):
        try:
            value = float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError, OverflowError):
            raise ValueError(f"'{value}' is not a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"'{value}' is not a number")
    return value


def _numbers(value: Any) -> Any:
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    return tuple(_number(part) for part in parts)


def _sizes(value: Any) -> Any:
    sizes = _numbers(value)
    if len(sizes) not in (1, 2) or any(size != int(size) or size < 1 for size in sizes):
        raise ValueError("one size, or height and width, is expected")
    return tuple(int(size) for size in sizes) * (3 - len(sizes))


def _renamed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    pairs = (part.rpartition(":") for part in value.split(","))
    return {name.strip(): array.strip() for name, _, array in pairs}


Number = Annotated[float, BeforeValidator(_number)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_numbers)]
Sizes = Annotated[tuple[int, int], BeforeValidator(_sizes)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class DataOptions(BaseModel):
    """What can be said of data. None: the format's own default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    """File, folder, or ``module:function``; relative to the YAML file, where it stands in one."""
    format: Literal["npz", "npy", "folder", "mnist", "tensorrt", "paddle", "images", "python"] | None = None
    """One of them; recognised by name and content if not given."""
    inputs: Annotated[dict[str, str], BeforeValidator(_renamed)] = {}
    """``array``, or ``input:array,input:array``: which array is for which input, where names differ."""
    labels: str | None = None
    """Array of the labels (``npz``, ``folder`` of it, ``python``), or their file (``npy``, ``mnist``)."""
    skip: Count = 0
    """Samples to leave out at the start."""
    scale: Number | None = None
    """Factor on every number, such as ``1/255``."""
    mean: Numbers | None = None
    """Subtracted after ``scale``: one number, or one a channel."""
    std: Numbers | None = None
    """Divided by after that: likewise."""
    layout: Literal["NCHW", "NHWC"] | None = None
    """Where the channels are."""
    each: Literal["sample", "batch"] | None = None
    """What a file of a folder holds; told from the rank of its arrays if not given."""
    prefix: str | None = None
    """What stands before the number in the names of batch files."""
    suffix: str | None = None
    """What stands behind it."""
    dim: Positive | None = None
    """Height and width of the images in the file."""
    list: str | None = None
    """The file with a line ``path label`` for each image; ``val_list.txt`` in the folder if not given."""
    root: str | None = None
    """The folder that the paths in the list start from; the list's own if not given."""
    preset: Literal["imagenet"] | None = None
    """``imagenet``: resize 256, crop 224, RGB, scale 1/255 and the usual mean and std."""
    resize: Positive | None = None
    """What the short side of an image becomes, the other in proportion."""
    crop: Sizes | None = None
    """Height and width of what is cut from the middle; the model's input if not given."""
    order: Literal["RGB", "BGR"] | None = None
    """Order of the channels."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    """How images are resized."""

    def normalise(self) -> Normalise | None:
        """What ``scale``, ``mean`` and ``std`` say together; None when nothing is said."""
        default = IMAGENET if self.preset == "imagenet" else Normalise()
        if self.preset is None and self.scale is None and self.mean is None and self.std is None:
            return None
        return Normalise(
            default.scale if self.scale is None else self.scale,
            default.mean if self.mean is None else self.mean,
            default.std if self.std is None else self.std,
            self.layout == "NHWC",
        )

    def check_keys(self, format: str) -> None:
        """Refuse keys that mean nothing for ``format``.

        Raises:
            DataError: there is one.
        """
        for key in self.model_fields_set - set(EVERYWHERE) - set(FORMATS[format]):
            known = [name for name, keys in FORMATS.items() if key in keys]
            raise DataError(
                f"the key '{key}' means nothing for data of the format '{format}'",
                where=self.path,
                remedy=f"it is for {', '.join(known)}",
            )


def parse(source: str | Path | Mapping[str, Any]) -> DataOptions:
    """The options in a path, a text ``PATH?key=value&key=value``, a YAML file or a mapping.

    A ``?`` in the name of a file that exists is a part of that name.

    Raises:
        DataError: an unknown key or a value that is none; with the line, where it is in a file.
    """
    if isinstance(source, Mapping):
        return _validated(dict(source), str(source.get("path", "data")))
    text = str(source)
    if text.endswith((".yaml", ".yml")) and Path(text).is_file():
        return _of_file(Path(text))
    path, question, query = text.partition("?")
    if not question or isinstance(source, Path) or Path(text).exists():
        return _validated({"path": text}, text)
    given: dict[str, Any] = {"path": path}
    for part in query.split("&"):
        key, equals, value = part.partition("=")
        if not equals:
            raise DataError(f"'{part}' is not key=value", where=text, remedy="such as ?scale=1/255&skip=100")
        if key in given:
            raise DataError(f"the key '{key}' is given twice", where=text)
        given[key] = value
    return _validated(given, text)


def _of_file(file: Path) -> DataOptions:
    try:
        options = read_document(file.read_text(encoding="utf-8"), DataOptions, where=str(file))
    except PipelineError as error:
        raise DataError(error.what, where=error.where, remedy=error.remedy) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DataError(f"cannot be read: {reason}", where=str(file)) from error
    if options.std is not None and not all(options.std):
        raise DataError("'std' is 0", where=str(file))
    moved = {
        key: str(file.parent / value)
        for key in ("path", "root", "list")
        if (value := getattr(options, key)) is not None and not (key == "path" and _is_python(options))
    }
    return options.model_copy(update=moved)


def _is_python(options: DataOptions) -> bool:
    return options.format == "python" or (":" in options.path and not Path(options.path).exists())


def _validated(given: dict[str, Any], where: str) -> DataOptions:
    try:
        options = DataOptions.model_validate(given)
    except ValidationError as error:
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        key = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, DataOptions.model_fields, n=1)
            remedy = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(DataOptions.model_fields)}"
            raise DataError(f"unknown key '{key}'", where=where, remedy=remedy) from error
        if first["type"] == "missing":
            raise DataError(f"the key '{key}' is missing", where=where) from error
        raise DataError(f"{key}: {first['msg'].removeprefix('Value error, ')}", where=where) from error
    if options.std is not None and not all(options.std):
        raise DataError("'std' is 0", where=where)
    return options
