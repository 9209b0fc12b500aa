"""Whether a table that was calibrated before can stand for calibrating again."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from qat2int8.ir import DataError
from qat2int8.pipelines.tables.files import read_table
from qat2int8.pipelines.tables.table import CalibrationTable

__all__ = ["reusable", "why_not"]


def why_not(table: CalibrationTable, *, model_digest: str, algorithm: str, tensors: Collection[str] = ()) -> str:
    """Why a table is not the one that calibration would give, in one line; empty when it is.

    A table of a foreign format does not say which model it is of. It is taken if ``tensors``, the names in the
    model, are given and hold all of its own.
    """
    if table.algorithm != algorithm:
        made = f"by '{table.algorithm}'" if table.algorithm else "by an algorithm it does not tell"
        return f"it was made {made}, and '{algorithm}' is asked for"
    if table.model_digest:
        same = table.model_digest == model_digest
        return "" if same else f"it is of another model (digest {table.model_digest}, this one is {model_digest})"
    if not tensors:
        return "it does not tell which model it is of"
    unknown = sorted(table.entries.keys() - set(tensors))
    return f"it names tensor '{unknown[0]}', which the model does not have" if unknown else ""


def reusable(
    path: str | os.PathLike[str], *, model_digest: str, algorithm: str, tensors: Collection[str] = ()
) -> tuple[CalibrationTable | None, str]:
    """The table in a file and an empty text, or None and one line that says why the file does not do.

    Nothing is raised: a cache that cannot be read is a reason to calibrate, not to stop.
    """
    if not Path(path).exists():
        return None, f"{path}: there is no table yet"
    try:
        table = read_table(path)
    except DataError as error:
        return None, str(error)
    reason = why_not(table, model_digest=model_digest, algorithm=algorithm, tensors=tensors)
    return (None, f"{path}: {reason}") if reason else (table, "")
