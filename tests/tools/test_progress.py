"""What a terminal shows while models run: how far it is, and the answers so far; nothing anywhere else."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from support import parse

from qat2int8.ir.io import save_model
from qat2int8.tools.cli import app
from qat2int8.tools.progress import counting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def opened(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard error as a terminal; no fixture, because pytest puts its own back before the test runs."""
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def test_a_terminal_is_told_how_many_and_what(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = opened(monkeypatch)
    with counting("evaluating", 7, False) as show:
        assert show is not None
        show(3, "93.75")
    shown = terminal.getvalue()
    assert "evaluating" in shown
    assert "3/7" in shown
    assert "93.75" in shown


@pytest.mark.parametrize(("silent", "where"), [(True, Terminal()), (False, io.StringIO())])
def test_nobody_else_is_told_anything(monkeypatch: pytest.MonkeyPatch, silent: bool, where: io.StringIO) -> None:
    monkeypatch.setattr(sys, "stderr", where)
    with counting("evaluating", 7, silent) as show:
        assert show is None
    assert where.getvalue() == ""


def test_evaluation_shows_the_accuracy_of_every_model_so_far(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    terminal = opened(monkeypatch)
    for name, op in (("right", "Identity"), ("wrong", "Neg")):
        save_model(parse(f"g (float[N,3] x) => (float[N,3] y) {{ y = {op} (x) }}"), tmp_path / f"{name}.onnx")
    labels = np.array([0, 1, 2, 0])
    np.savez(tmp_path / "data.npz", x=np.eye(3, dtype=np.float32)[labels], labels=labels)
    models = (str(tmp_path / f"{name}.onnx") for name in ("right", "wrong"))
    with pytest.raises(SystemExit) as ended:
        app(["evaluate", *models, "--data", str(tmp_path / "data.npz")])
    assert not ended.value.code
    assert "4/4" in terminal.getvalue()
    assert "100.00 / 0.00" in terminal.getvalue()
