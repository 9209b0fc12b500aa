"""The errors a person can meet. Each says what is wrong, where, and what to do about it."""

from __future__ import annotations


class Qat2Int8Error(Exception):
    """Base of every error this project raises on purpose.

    Args:
        what: what is wrong, one sentence.
        where: the file, node or tensor it was found at; empty when that is clear from ``what``.
        remedy: what the reader can do; empty when nothing can be done.
    """

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        super().__init__(self._line())

    def _line(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        return f"{line} ({self.remedy})" if self.remedy else line


class InvalidModel(Qat2Int8Error):
    """The file is not a valid ONNX model, or a pass left the graph invalid."""


class UnsupportedModel(Qat2Int8Error):
    """The model is valid, but this tool or the chosen target cannot compute it faithfully."""


class PipelineError(Qat2Int8Error):
    """A pipeline is misspelt, misordered, or has options its passes do not know."""


class PassFailed(Qat2Int8Error):
    """A pass could not do what was asked of it, or broke its own contract."""


class DataError(Qat2Int8Error):
    """Input data does not fit the model, or cannot be read."""


class OutputError(Qat2Int8Error):
    """The result cannot be written where it was asked to be."""
