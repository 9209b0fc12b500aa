"""Tables as files: the format is seen from the content, and a file is written whole or not at all."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qat2int8.ir import DataError
from qat2int8.ir.io import write_file
from qat2int8.pipelines.tables import tensorrt_cache
from qat2int8.pipelines.tables.dynamic_range_text import (
    is_dynamic_ranges,
    read_dynamic_ranges,
    write_dynamic_ranges,
)
from qat2int8.pipelines.tables.json_table import parse_json, read_json, write_json
from qat2int8.pipelines.tables.onnxruntime_json import METHODS, is_onnxruntime, read_onnxruntime, write_onnxruntime
from qat2int8.pipelines.tables.table import CalibrationTable, Entry, algorithm_name
from qat2int8.pipelines.tables.tensorrt_cache import read_tensorrt, write_tensorrt

__all__ = ["FORMATS", "format_named", "losses", "parse_table", "read_table", "recognise", "write_table"]


class _Read(Protocol):
    def __call__(self, text: str, *, where: str) -> CalibrationTable: ...


@dataclass(frozen=True)
class Format:
    """How one kind of table is read and written."""

    title: str
    read: _Read
    write: Callable[[CalibrationTable], str]


FORMATS: dict[str, Format] = {
    "qat2int8": Format("JSON of qat2int8", read_json, write_json),
    "tensorrt": Format("calibration cache of TensorRT", read_tensorrt, write_tensorrt),
    "dynamic-range": Format("dynamic ranges as text", read_dynamic_ranges, write_dynamic_ranges),
    "onnxruntime": Format("JSON of onnxruntime", read_onnxruntime, write_onnxruntime),
}
"""By the names that commands take."""


def format_named(name: str) -> Format:
    """A format by its name.

    Raises:
        DataError: there is none of that name.
    """
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name, FORMATS, n=1)
    remedy = f"did you mean '{near[0]}'?" if near else f"one of {', '.join(FORMATS)}"
    raise DataError(f"no format of tables is called '{name}'", remedy=remedy)


def recognise(text: str, *, where: str = "") -> str:
    """The name of the format a text is in.

    Raises:
        DataError: it is in none.
    """
    start = text.lstrip()
    if not start:
        raise DataError("is an empty file", where=where, remedy="calibrate again")
    if start.startswith("{"):
        document = parse_json(text, where=where)
        if "format" in document:
            return "qat2int8"
        if is_onnxruntime(document):
            return "onnxruntime"
        raise DataError(
            "is JSON, but neither a table of qat2int8 nor one of onnxruntime", where=where, remedy=_KNOWN
        )
    if start.startswith("TRT-"):
        return "tensorrt"
    if is_dynamic_ranges(text):
        return "dynamic-range"
    raise DataError("is not a calibration table", where=where, remedy=_KNOWN)


def parse_table(text: str, *, where: str = "") -> CalibrationTable:
    """The table in a text of any format.

    Raises:
        DataError: it is none, or damaged.
    """
    return FORMATS[recognise(text, where=where)].read(text, where=where)


def read_table(path: str | os.PathLike[str]) -> CalibrationTable:
    """The table in a file of any format.

    Raises:
        DataError: it cannot be read, is no table, or is damaged.
    """
    return parse_table(read_text(path), where=str(path))


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file, its line ends as they are.

    Raises:
        DataError: it cannot be read, or is no text.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError("no such file", where=str(path)) from None
    except IsADirectoryError:
        raise DataError("is a folder", where=str(path), remedy="name a file") from None
    except UnicodeDecodeError:
        raise _not_text(path) from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    # Small binary files can happen to be UTF-8.
    if any(character < " " and character not in "\t\r\n" for character in text):
        raise _not_text(path)
    return text


def _not_text(path: str | os.PathLike[str]) -> DataError:
    return DataError("is not text, so it is no calibration table", where=str(path), remedy=_KNOWN)


def write_table(
    table: CalibrationTable, path: str | os.PathLike[str], format: str = "qat2int8", *, version: str = ""
) -> None:
    """Write a table, atomically: on any failure what stood there before still does.

    Args:
        version: of TensorRT, for its caches.

    Raises:
        DataError: the format does not exist or cannot hold the table.
        OutputError: the file cannot be written.
    """
    chosen = format_named(format)
    content = write_tensorrt(table, version) if format == "tensorrt" else chosen.write(table)
    write_file(path, content.encode("utf-8"))


def losses(table: CalibrationTable, format: str) -> list[str]:
    """What a table loses in a format, a line for people each.

    Raises:
        DataError: the format does not exist.
    """
    format_named(format)
    if format == "qat2int8":
        return []
    told = []
    uneven = [entry for entry in table.entries.values() if not _is_symmetric(entry)]
    if format == "onnxruntime":
        wider = sum(entry.amax != max(-entry.lo, entry.hi) for entry in table.entries.values())
        if wider:
            told.append(f"{wider} of {len(table.entries)} symmetric ends that differ from the range are lost")
    elif uneven:
        told.append(
            f"{len(uneven)} of {len(table.entries)} ranges are not symmetric: -amax to amax is kept of them"
        )
    kept = METHODS.values() if format == "onnxruntime" else tensorrt_cache.ALGORITHMS.values()
    if table.algorithm and (format == "dynamic-range" or algorithm_name(table.algorithm) not in kept):
        told.append(f"the algorithm '{table.algorithm}' is not told")
    if table.model_digest:
        told.append("the model it is of is not told")
    if table.samples:
        told.append(f"the number of samples, {table.samples}, is not told")
    if any(entry.statistics is not None for entry in table.entries.values()):
        told.append("the statistics are lost: it cannot be merged any more")
    return told


def _is_symmetric(entry: Entry) -> bool:
    """Whether a range ends at both its ``amax``, give or take the level that int8 has more below zero."""
    step = 1.001 * entry.amax / 127
    return abs(entry.lo + entry.amax) <= step and entry.hi == entry.amax


_KNOWN = f"known are {', '.join(f'{key} ({format.title})' for key, format in FORMATS.items())}"
