"""A report as Markdown, for a pull request or a log."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qat2int8.pipelines.figures import as_decimal
from qat2int8.pipelines.reporting.document import ReportDocument, worst_first

__all__ = ["as_markdown"]

_WORST = 10


def as_markdown(document: ReportDocument) -> str:
    """The figures and tables of the report; the drawings are in the HTML only."""
    parts = [f"# {document.title}", document.made]
    parts.append("\n".join(f"- **{card.label}**: {card.value} ({card.hint})" for card in document.cards))
    if document.accuracy:
        figures = list(document.accuracy[0].figures)
        rows = [
            (
                row.model,
                str(row.samples),
                *(as_decimal(row.figures.get(figure)) for figure in figures),
                as_decimal(row.difference, signed=True) if index else "",
            )
            for index, row in enumerate(document.accuracy)
        ]
        parts += ["## Answers", f"On {document.data}.", _table(("model", "samples", *figures, "difference"), rows)]
    if document.speed:
        rows = [
            (
                row.model,
                str(row.threads or "auto"),
                as_decimal(row.samples_per_second, 1),
                as_decimal(row.median_ms),
                as_decimal(row.p99_ms),
                f"{as_decimal(row.ratio)}x",
            )
            for row in document.speed
        ]
        parts += ["## Speed", _table(("model", "threads", "samples/s", "ms a batch", "99 %", "speed"), rows)]
    if document.layer_errors:
        rows = [
            (one.name, one.op_type, *map(as_decimal, (one.sqnr_db, one.cosine, one.max_error), (1, 5, 4)))
            for one in worst_first(document.layer_errors)[:_WORST]
        ]
        head = ("layer", "op", "SQNR, dB", "cosine", "largest")
        parts += ["## The layers with the largest error", _table(head, rows)]
    parts.append("## What stayed in float")
    if document.left_float:
        rows = [
            (group.code or "–", group.reason, group.remedy or "–", ", ".join(group.nodes))
            for group in document.left_float
        ]
        parts.append(_table(("code", "why", "remedy", "nodes"), rows, numbers=False))
    else:
        parts.append("Nothing that has an integer kernel.")
    machine = document.environment
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    flags = ", ".join(machine["flags"]) or "no VNNI"
    parts += ["## Environment", f"{machine['processor']} ({flags}); {versions}."]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> str:
    ruler = ["---", *(["---:" if numbers else "---"] * (len(head) - 1))]
    lines = [head, ruler, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
