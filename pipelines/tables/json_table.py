"""Our own format of a table: JSON that keeps everything, statistics included."""

from __future__ import annotations

import json
from typing import Any

from qat2int8.ir import DataError
from qat2int8.pipelines.tables.table import CalibrationTable, Entry

__all__ = ["FORMAT", "parse_json", "read_json", "write_json"]

FORMAT = "qat2int8-calibration-1"
_KEYS = {"algorithm": str, "samples": int, "model": str, "tensors": dict}
_REMEDY = "write one with 'qat2int8 calibrate'"


def write_json(table: CalibrationTable) -> str:
    """The table as JSON; the inverse of :func:`read_json`. One line a tensor, so that tables can be compared."""
    head = {
        "format": FORMAT,
        "algorithm": table.algorithm,
        "samples": table.samples,
        "model": table.model_digest,
        "origin": table.origin,
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    rows = [f"  {json.dumps(name)}: {json.dumps(_row(entry))}" for name, entry in table.entries.items()]
    tensors = ' "tensors": {\n' + ",\n".join(rows) + "\n }" if rows else ' "tensors": {}'
    return "{\n" + ",\n".join([*lines, tensors]) + "\n}\n"


def read_json(text: str, *, where: str = "") -> CalibrationTable:
    """Read what :func:`write_json` wrote.

    Raises:
        DataError: it is something else, or cut off; names the tensor of an entry that is no range.
    """
    document = parse_json(text, where=where)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise DataError(f"is not a calibration table ({FORMAT})", where=where, remedy=_REMEDY)
    for key, kind in _KEYS.items():
        if not isinstance(document.get(key), kind):
            raise DataError(f"lacks or misspells '{key}'", where=where, remedy=_REMEDY)
    place = f"{where}: tensor" if where else "tensor"
    entries = {name: _entry(row, f"{place} '{name}'") for name, row in document["tensors"].items()}
    return CalibrationTable(
        document["algorithm"],
        document["samples"],
        document["model"],
        entries,
        str(document.get("origin", "")),
    )


def parse_json(text: str, *, where: str) -> Any:
    """The document of a JSON text without keys given twice, of which Python would keep the last.

    Raises:
        DataError: it is none.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON or was cut off: {error}", where=where, remedy="write it again") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key '{twice}' is given twice")
    return seen


def _row(entry: Entry) -> dict[str, Any]:
    row: dict[str, Any] = {"lo": entry.lo, "hi": entry.hi, "amax": entry.amax}
    return row if entry.statistics is None else {**row, "statistics": entry.statistics}


def _entry(row: Any, where: str) -> Entry:
    try:
        return Entry(float(row["lo"]), float(row["hi"]), float(row["amax"]), row.get("statistics"))
    except DataError as error:
        raise DataError(error.what, where=where) from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"lacks or misspells {error}", where=where, remedy=_REMEDY) from error
