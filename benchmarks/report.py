"""Markdown tables with the circumstances of a measurement, and their place in the documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from qat2int8.pipelines.environment import environment

README = Path(__file__).resolve().parent.parent / "README.md"
DOCS = README.parent / "docs"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; the first column is text, the others are numbers."""
    ruler = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ruler, *rows))


def circumstances(*packages: str) -> str:
    """The processor, the versions of ``packages`` and the date, as one line."""
    machine = environment()
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{machine.processor} ({machine.instructions}); {versions}; {machine.date}."


def write(document: Path, section: str, text: str) -> None:
    """Replace what stands between the marker comments of ``section`` in ``document``.

    Raises:
        SystemExit: the document has no such markers.
    """
    begin, end = (f"<!-- {word} {section} -->" for word in ("begin", "end"))
    content = document.read_text() if document.exists() else ""
    head, opened, rest = content.partition(begin)
    _, closed, tail = rest.partition(end)
    if not opened or not closed:
        raise SystemExit(f"{document}: no '{begin}' ... '{end}' to write the table between")
    document.write_text(f"{head}{begin}\n{text}\n{end}{tail}")
