"""A report as one HTML file: no network, no script, light and dark, on paper and on a phone."""

from __future__ import annotations

import importlib.resources
import re
from functools import partial

import jinja2

from qat2int8.pipelines.figures import as_bytes, as_count, as_decimal
from qat2int8.pipelines.reporting.boxes import picture
from qat2int8.pipelines.reporting.charts import error_chart, histogram_chart, spreads, strip
from qat2int8.pipelines.reporting.document import ReportDocument, worst_first

__all__ = ["as_html"]

_JOINTS = re.compile(r"(?<=[/_.:-])(?=\w)")


def as_html(document: ReportDocument) -> str:
    """The report as the text of an HTML file that needs nothing else."""
    folder = importlib.resources.files("qat2int8.pipelines.reporting")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    signed = partial(as_decimal, signed=True)
    environment.filters.update(number=as_decimal, signed=signed, count=as_count, bytes=as_bytes, parts=_parts)
    template = environment.from_string((folder / "report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        document=document,
        style=(folder / "report.css").read_text(encoding="utf-8"),
        strip=strip(document.layers),
        errors=error_chart(document.layer_errors),
        worst_first=worst_first(document.layer_errors),
        histograms=[histogram_chart(each) for each in document.histograms],
        spreads=spreads(document.speed),
        pictures=[picture(each, str(number)) for number, each in enumerate(document.drawings)],
    )


def _parts(name: str) -> list[str]:
    """A name in pieces between which it may be broken, rather than just anywhere."""
    return _JOINTS.split(name)
