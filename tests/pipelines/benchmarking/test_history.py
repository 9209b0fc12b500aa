"""Runs in a file, and what is compared with what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qat2int8 import DataError
from qat2int8.pipelines.benchmarking.history import append_run, changes, last_run, read_history


def made(speed: float, *, processor: str = "one", network: str = "resnet50") -> dict[str, Any]:
    contenders = {"float": {"speedup": 1.0}, "qat2int8": {"speedup": speed}}
    return {
        "results": [{"network": network, "style": "layer-inputs", "contenders": contenders}],
        "environment": {"processor": processor, "flags": ["avx_vnni"], "cores": 2},
    }


def test_the_last_run_of_the_same_machine_is_the_one_to_compare_with(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    assert read_history(path) == []
    for run in (made(2.0), made(2.5), made(9.0, processor="other")):
        append_run(path, run)
    runs = read_history(path)
    assert len(runs) == 3
    before = last_run(runs, made(3.0))
    assert before is not None
    (change,) = changes(before, made(3.0))
    assert (change.contender, change.before, change.now) == ("qat2int8", 2.5, 3.0)
    assert change.percent == pytest.approx(20.0)
    assert last_run(runs, made(3.0, processor="new")) is None
    assert changes(before, made(3.0, network="vgg16")) == []


@pytest.mark.parametrize("line", ["no json", "{}", "[]", '{"environment": {}, "results": []}', "3"])
def test_a_line_that_is_no_run_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "runs.jsonl"
    append_run(path, made(2.0))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"runs\.jsonl:2: not a run"):
        read_history(path)
