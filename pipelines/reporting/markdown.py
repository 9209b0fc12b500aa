"""A report as Markdown, for a pull request or a log."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qat2int8.pipelines.figures import as_count, as_decimal
from qat2int8.pipelines.reporting.document import ReportDocument, worst_first

__all__ = ["as_markdown"]

_WORST = 10


def as_markdown(document: ReportDocument) -> str:
    """The figures and tables of the report; the drawings are in the HTML only."""
    parts = [f"# {document.title}", document.made]
    parts.append("\n".join(f"- **{card.label}**: {card.value} ({card.hint})" for card in document.cards))
    parts += [f"- {note}" for note in document.notes]
    if document.accuracy:
        parts += ["## Answers", f"On {document.data}.", _answers(document)]
    if document.speed:
        parts += ["## Speed", _speed(document)]
    parts += ["## Integer coverage", _coverage(document)]
    if document.layer_errors:
        parts += ["## The layers with the largest error", _errors(document)]
    if document.histograms:
        parts += ["## Activations", _activations(document)]
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
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    parts += [
        "## Environment",
        f"{machine.processor} ({machine.instructions}), {machine.cores} cores; {versions}.",
    ]
    parts += [f"- {warning}" for warning in machine.warnings]
    if document.pipeline:
        parts += ["## Pipeline", ", ".join(f"`{name}`" for name in document.pipeline)]
    return "\n\n".join(parts) + "\n"


def _answers(document: ReportDocument) -> str:
    figures = list(document.accuracy[0].figures)
    rows = [
        (
            row.model,
            str(row.samples),
            *(
                _with_range(as_decimal(row.figures.get(figure)), row.intervals.get(figure), 1)
                for figure in figures
            ),
            as_decimal(row.difference, signed=True) if index else "",
        )
        for index, row in enumerate(document.accuracy)
    ]
    unit = f", {document.unit}" if document.unit else ""
    return _table(("model", "samples", *(f"{figure}{unit}" for figure in figures), "difference"), rows)


def _speed(document: ReportDocument) -> str:
    rows = [
        (
            row.model,
            str(row.threads or "auto"),
            as_decimal(row.samples_per_second, 1),
            _with_range(as_decimal(row.median_ms), (row.lower_quartile_ms, row.upper_quartile_ms)),
            as_decimal(row.p99_ms),
            _with_range(f"{as_decimal(row.ratio)}x", (row.ratio_lower_quartile, row.ratio_upper_quartile)),
        )
        for row in document.speed
    ]
    batch = f"ms a batch of {document.speed[0].batch_size}"
    return _table(("model", "threads", "samples/s", batch, "99 % within, ms", "speed"), rows)


def _coverage(document: ReportDocument) -> str:
    rows = [
        (layer.name, layer.op_type, as_count(layer.macs), layer.kernel or "float") for layer in document.layers
    ]
    return _table(("layer", "op", "multiply-accumulates", "kernel"), rows)


def _errors(document: ReportDocument) -> str:
    rows = [
        (
            one.name,
            one.op_type,
            "exact" if one.exact else as_decimal(one.sqnr_db, 1),
            as_decimal(one.cosine, 5),
            as_decimal(one.max_error, 4),
        )
        for one in worst_first(document.layer_errors)[:_WORST]
    ]
    return _table(("layer", "op", "signal over error, dB", "cosine", "largest"), rows)


def _activations(document: ReportDocument) -> str:
    rows = [
        (one.layer, *map(as_decimal, (one.lo, one.hi, one.grid_lo, one.grid_hi)), str(one.saturated))
        for one in document.histograms
    ]
    return _table(("layer", "smallest", "largest", "grid from", "to", "values that saturate"), rows)


def _with_range(text: str, ends: Sequence[float | None] | None, digits: int = 2) -> str:
    return text if ends is None else f"{text} ({' – '.join(as_decimal(end, digits) for end in ends)})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> str:
    ruler = ["---", *(["---:" if numbers else "---"] * (len(head) - 1))]
    lines = [head, ruler, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
