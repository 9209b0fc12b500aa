"""The JSON of onnxruntime's quantizer: what ``quantize_static(calibration_cache_path=...)`` keeps and reads again.

``write_calibration_table`` writes the same entries without the frame around them; both are read. Layout and names
as in ``onnxruntime.quantization.calibrate`` 1.31.
"""

from __future__ import annotations

import json
from typing import Any

from qat2int8.ir import DataError
from qat2int8.pipelines.tables.json_table import parse_json
from qat2int8.pipelines.tables.table import CalibrationTable, Entry, algorithm_name

__all__ = ["METHODS", "is_onnxruntime", "read_onnxruntime", "write_onnxruntime"]

METHODS = {"MinMax": "minmax", "Entropy": "entropy", "Percentile": "percentile"}
"""onnxruntime's methods of calibration, and what the same algorithm is called here."""

_OTHER = "MinMax"
"""The method that takes ranges as they are."""


def is_onnxruntime(document: Any) -> bool:
    """Whether a JSON document looks like such a table."""
    if not isinstance(document, dict):
        return False
    if document.get("CLS") == "TensorsData":
        return True
    return bool(document) and all(
        isinstance(row, dict) and row.get("CLS") == "TensorData" for row in document.values()
    )


def read_onnxruntime(text: str, *, where: str = "") -> CalibrationTable:
    """Read such a table. Of a tensor with a range a channel the whole range is taken.

    Raises:
        DataError: it is none, or cut off; names the tensor.
    """
    document = parse_json(text, where=where)
    if not is_onnxruntime(document):
        raise DataError("is not a calibration table of onnxruntime", where=where)
    rows = document.get("data") if document.get("CLS") == "TensorsData" else document
    if not isinstance(rows, dict):
        raise DataError("the key 'data' holds no tensors", where=where)
    method = document.get("calibration_method")
    name = method.get("value") if isinstance(method, dict) else None
    origin = name.split(".")[-1] if isinstance(name, str) else ""
    entries = {tensor: _entry(row, f"{where}: tensor '{tensor}'") for tensor, row in rows.items()}
    return CalibrationTable(METHODS.get(origin, ""), 0, "", entries)


def write_onnxruntime(table: CalibrationTable) -> str:
    """The table as ``calibration_cache_path`` takes it; call ``quantize_static`` with the method it names."""
    known = {ours: theirs for theirs, ours in METHODS.items()}
    method = known.get(algorithm_name(table.algorithm), _OTHER)
    document = {
        "CLS": "TensorsData",
        "data": {
            name: {"lowest": _number(entry.lo), "highest": _number(entry.hi), "CLS": "TensorData"}
            for name, entry in table.entries.items()
        },
        "calibration_method": {"CLS": "CalibrationMethod", "value": f"CalibrationMethod.{method}"},
        "smooth_quant": False,
    }
    return f"{json.dumps(document)}\n"


def _number(value: float) -> dict[str, Any]:
    return {"data": value, "dtype": "float32", "CLS": "numpy.array"}


def _entry(row: Any, where: str) -> Entry:
    try:
        lo, hi = (_flat(row[key]) for key in ("lowest", "highest"))
        low, high = min(lo), max(hi)
        return Entry(low, high, max(abs(low), abs(high)))
    except DataError as error:
        raise DataError(error.what, where=where) from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"its entry is not a range: {error}", where=where, remedy="calibrate again") from error


def _flat(value: Any) -> list[float]:
    """The numbers of an array as nested lists, however deep."""
    if isinstance(value, dict):
        return _flat(value["data"])
    if isinstance(value, list):
        return [number for part in value for number in _flat(part)]
    return [float(value)]
