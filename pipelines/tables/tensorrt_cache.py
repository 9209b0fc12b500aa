"""TensorRT's calibration cache: a header line, then a line ``name: scale`` for each tensor.

The scale is ``amax / 127`` as the hexadecimal digits of a big-endian float32. After the documentation of TensorRT
and its ``sampleINT8``. Names may hold colons and spaces; the last ``": "`` separates.
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import PurePath

from qat2int8.ir import DataError
from qat2int8.pipelines.tables.table import CalibrationTable, Entry, algorithm_name

__all__ = ["ALGORITHMS", "DEFAULT_VERSION", "header_of", "read_tensorrt", "write_tensorrt"]

ALGORITHMS = {
    "EntropyCalibration2": "entropy",
    "EntropyCalibration": "entropy-v1",
    "MinMaxCalibration": "minmax",
    "LegacyCalibration": "legacy",
}
"""TensorRT's names of calibrators, and what the same algorithm is called here."""

DEFAULT_VERSION = "7000"
_OTHER = "EntropyCalibration2"
"""What the header says of an algorithm that TensorRT does not have: its own default."""

_HEADER = re.compile(r"TRT-(.+)-([A-Za-z]\w*)")
_LEVELS = 127.0


def read_tensorrt(text: str, *, where: str = "") -> CalibrationTable:
    """Read a cache, of any version of TensorRT.

    Raises:
        DataError: it is none, or cut off; names the line.
    """
    header, *lines = text.splitlines()
    match = _HEADER.fullmatch(header.strip())
    if match is None:
        raise DataError(
            f"'{header.strip()[:60]}' is not the header of a calibration cache",
            where=f"{where}:1",
            remedy="such as TRT-7000-EntropyCalibration2",
        )
    entries: dict[str, Entry] = {}
    whole = text.endswith("\n")
    for number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        place = f"{where}:{number}"
        name, separator, digits = line.rstrip().rpartition(": ")
        if not separator or not name or not re.fullmatch(r"[0-9a-fA-F]{1,8}", digits):
            raise DataError(
                f"'{line.strip()[:80]}' is not 'name: 8 hexadecimal digits'", where=place, remedy="write it again"
            )
        if len(digits) < 8 and number == len(lines) + 1 and not whole:
            raise DataError(
                f"is cut off within the scale of tensor '{name}'", where=place, remedy="write it again"
            )
        if name in entries:
            raise DataError(f"tensor '{name}' is there twice", where=place)
        # Some tools write the number without leading zeros.
        (scale,) = struct.unpack(">f", bytes.fromhex(digits.rjust(8, "0")))
        if not math.isfinite(scale) or scale < 0:
            raise DataError(f"the scale of tensor '{name}' is {scale}", where=place, remedy="calibrate again")
        entries[name] = Entry.symmetric(scale * _LEVELS)
    if not entries:
        raise DataError("names no tensors", where=where, remedy="it may be cut off: calibrate again")
    return CalibrationTable(ALGORITHMS.get(match[2], ""), 0, "", entries, header.strip())


def write_tensorrt(table: CalibrationTable, version: str = "") -> str:
    """The table as a cache. Symmetric ranges are all it holds.

    Args:
        version: of TensorRT as its headers write it (7000, 8601, 100300); empty: the one the table came with.

    Raises:
        DataError: a name that no line can hold, or a range too large for float32.
    """
    lines = [header_of(table, version)]
    for name, entry in table.entries.items():
        if name.splitlines() != [name] or name != name.strip():
            raise DataError(f"the name {name!r} does not fit into a line of its own", where=f"tensor {name!r}")
        try:
            digits = struct.pack(">f", entry.amax / _LEVELS).hex()
        except OverflowError:
            raise DataError(f"its range of {entry.amax} does not fit", where=f"tensor '{name}'") from None
        lines.append(f"{name}: {digits}")
    return "".join(f"{line}\n" for line in lines)


def header_of(table: CalibrationTable, version: str = "") -> str:
    """The first line of the table as a cache.

    Raises:
        DataError: ``version`` is none.
    """
    own = _HEADER.fullmatch(table.origin)
    name = algorithm_name(table.algorithm)
    known = {ours: theirs for theirs, ours in ALGORITHMS.items()}
    kept = own is not None and ALGORITHMS.get(own[2], "") == name
    kind = own[2] if own is not None and kept else known.get(name, _OTHER)
    header = f"TRT-{version or (own[1] if own is not None else DEFAULT_VERSION)}-{kind}"
    if _HEADER.fullmatch(header) is None or header.split() != [header] or PurePath(header).name != header:
        raise DataError(f"'{version}' is not a version of TensorRT", remedy="such as 7000, 8601 or 100300")
    return header
