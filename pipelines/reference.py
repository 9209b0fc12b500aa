"""The fake-quant model to compare with, where the source itself is written in ops that no runtime loads."""

from __future__ import annotations

import tempfile
from pathlib import Path

from qat2int8.ir import Model
from qat2int8.ir.io import save_model
from qat2int8.pipelines.dialects import is_readable
from qat2int8.pipelines.manager import PassRun
from qat2int8.pipelines.observers import Quiet

__all__ = ["ReadableSource"]


class ReadableSource(Quiet):
    """An observer that keeps the model as it is once the last op of another dialect has been read.

    Nothing but the dialect has changed by then: no grid was carried anywhere and nothing was fused. What reading
    itself cannot keep is among the diagnostics (a zero point between two levels).
    """

    def __init__(self, source: Model) -> None:
        self._pending = not is_readable(source)
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def path(self) -> Path | None:
        """The file; None where the source is as good, or where reading it never ended."""
        return None if self._folder is None else Path(self._folder.name) / "reference.onnx"

    def after(self, model: Model, run: PassRun) -> None:
        if self._pending and run.result.modified and is_readable(model):
            self._pending = False
            # A file, as it may be too large for one buffer; it goes when nobody holds this observer.
            self._folder = tempfile.TemporaryDirectory(prefix="qat2int8-")
            save_model(model, Path(self._folder.name) / "reference.onnx")
