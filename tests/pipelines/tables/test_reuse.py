"""When a table from before stands for calibrating again, and the one line that says why it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from qat2int8.pipelines.tables import CalibrationTable, Entry, reusable, write_table

ENTRIES = {"x": Entry(-1, 1, 1)}


@pytest.mark.parametrize(
    ("table", "format", "says"),
    [
        (CalibrationTable("entropy", 5, "m", ENTRIES), "qat2int8", ""),
        (
            CalibrationTable("minmax", 5, "m", ENTRIES),
            "qat2int8",
            "made by 'minmax', and 'entropy' is asked for",
        ),
        (CalibrationTable("entropy", 5, "n", ENTRIES), "qat2int8", "of another model (digest n, this one is m)"),
        (CalibrationTable("entropy", 5, "m", ENTRIES), "tensorrt", ""),
        (CalibrationTable("minmax", 5, "m", ENTRIES), "tensorrt", "it was made by 'minmax'"),
        (
            CalibrationTable("entropy", 5, "m", {"z": ENTRIES["x"]}),
            "tensorrt",
            "it names tensor 'z', which the model",
        ),
        (CalibrationTable("entropy", 5, "m", ENTRIES), "dynamic-range", "an algorithm it does not tell"),
    ],
)
def test_model_algorithm_and_format_decide(
    tmp_path: Path, table: CalibrationTable, format: str, says: str
) -> None:
    path = tmp_path / "cache"
    write_table(table, path, format)
    found, reason = reusable(path, model_digest="m", algorithm="entropy", tensors=["x", "y"])
    assert (found is None) == bool(says)
    assert says in reason
    assert "\n" not in reason
    if found is None:
        assert reason.startswith(f"{path}: ")


def test_without_the_models_tensors_a_foreign_table_is_not_taken(tmp_path: Path) -> None:
    write_table(CalibrationTable("entropy", 5, "m", ENTRIES), tmp_path / "cache", "tensorrt")
    found, reason = reusable(tmp_path / "cache", model_digest="m", algorithm="entropy")
    assert found is None
    assert "does not tell which model it is of" in reason


def test_no_table_and_half_a_table_are_reasons_too(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    assert reusable(path, model_digest="m", algorithm="entropy") == (None, f"{path}: there is no table yet")
    write_table(CalibrationTable("entropy", 5, "m", ENTRIES), path)
    path.write_bytes(path.read_bytes()[:-20])
    found, reason = reusable(path, model_digest="m", algorithm="entropy")
    assert found is None
    assert reason.startswith(f"{path}: is not JSON or was cut off")
