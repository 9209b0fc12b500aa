"""Write a report in the form that the file's name asks for."""

from __future__ import annotations

import os
from pathlib import Path

from qat2int8.ir import OutputError
from qat2int8.ir.io import check_output_path, write_file
from qat2int8.pipelines.reporting.document import ReportDocument

__all__ = ["check_report_path", "write_report"]

FORMS = (".html", ".md", ".json")


def check_report_path(path: str | os.PathLike[str]) -> None:
    """Refuse a path early, before minutes are spent on what cannot be written.

    Raises:
        OutputError: the ending is none of ``FORMS``, or the path cannot be written.
    """
    if Path(path).suffix.lower() not in FORMS:
        raise OutputError(
            f"a report cannot be written as '{Path(path).suffix or 'a file without an ending'}'",
            where=os.fspath(path),
            remedy=f"let its name end in one of {', '.join(FORMS)}",
        )
    check_output_path(path)


def write_report(document: ReportDocument, path: str | os.PathLike[str]) -> None:
    """Write the report atomically, as HTML, Markdown or JSON by the ending of ``path``.

    Raises:
        OutputError: as :func:`check_report_path`.
    """
    check_report_path(path)
    form = Path(path).suffix.lower()
    if form == ".html":
        from qat2int8.pipelines.reporting.html import as_html

        text = as_html(document)
    elif form == ".md":
        from qat2int8.pipelines.reporting.markdown import as_markdown

        text = as_markdown(document)
    else:
        text = document.model_dump_json(indent=1) + "\n"
    write_file(path, text.encode("utf-8"))
