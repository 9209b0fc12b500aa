"""What every command shares: its common flags, how it reports, and how errors look.

Commands import onnx, onnxruntime and rich when they run, not when they are defined, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import textwrap
import traceback
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from qat2int8.ir import Diagnostic

__all__ = ["Debug", "Json", "Quiet", "Report", "Verbose", "print_error"]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print every finding, notes included.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

SHOWN_FINDINGS = 10
SHOWN_NAMES = 6
SHOWN_CHARACTERS = 48


class Report:
    """What a command has to say on stdout: tables and lines for a person, or one document for a machine."""

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.as_json = json
        self.verbose = verbose
        self.silent = quiet or json

    def line(self, text: str = "") -> None:
        """One line of text, as it is."""
        if not self.silent:
            sys.stdout.write(f"{text}\n")

    def table(
        self, headers: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[int] = ()
    ) -> None:
        """A table; the columns at the indices ``right`` are numbers, the last column takes what room is left."""
        if self.silent:
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        last = len(headers) - 1
        for index, header in enumerate(headers):
            table.add_column(
                header,
                justify="right" if index in right else "left",
                overflow="fold",
                no_wrap=index != last and len(headers) > 1,
            )
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        Console(file=sys.stdout, highlight=False).print(table)

    def item(self, heading: str, names: Sequence[str], *, indent: int = 2) -> None:
        """``heading`` and below it the nodes or tensors it is about; long names and long lists are cut short.

        With ``--verbose`` everything is there in full.
        """
        if self.silent:
            return
        width = max(shutil.get_terminal_size().columns, 40)
        indent = min(indent, width // 4)
        limit = len(names) if self.verbose else SHOWN_NAMES
        shown = [name if self.verbose else _shortened(name, width - indent - 8) for name in names[:limit]]
        if names[limit:]:
            shown.append(f"and {len(names) - limit} more (--verbose shows them)")
        for text, margin in ((heading, indent), (", ".join(shown), indent + 2)):
            first = " " * margin
            rest = first if text is not heading else first + "  "
            lines = textwrap.wrap(
                text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
            )
            for line in lines:
                self.line(line)

    def findings(self, diagnostics: Sequence[Diagnostic]) -> None:
        """Warnings and errors, what is said of several nodes once; with ``--verbose`` notes too."""
        grouped: dict[tuple[str, str, str, str], list[Diagnostic]] = {}
        for found in diagnostics:
            if self.verbose or found.severity != "note":
                kind = (found.code, found.severity, _NUMBER.sub("#", found.reason), found.remedy)
                grouped.setdefault(kind, []).append(found)
        limit = len(grouped) if self.verbose else SHOWN_FINDINGS
        for index, ((code, severity, _, remedy), group) in enumerate(grouped.items()):
            if index == limit:
                self.line(f"... and {len(grouped) - limit} more findings (--verbose shows them)")
                return
            if index == 0:
                self.line()
            reason = _spanning([found.reason for found in group])
            told = reason if self.verbose else _shortened_words(reason)
            remedy = f" ({remedy})" if remedy else ""
            names = [found.node or found.value for found in group]
            self.item(f"{code} {severity}: {told}{remedy}", [name for name in names if name], indent=0)

    def data(self, document: Any) -> None:
        """The document of ``--json``; nothing otherwise."""
        if self.as_json:
            sys.stdout.write(f"{json.dumps(_finite(document), indent=1, allow_nan=False)}\n")


_NUMBER = re.compile(r"(?<![\w.'/:#-])\d+(?:\.\d+)?(?![\w'/:]|\.\d)")
"""A number that stands alone, not one in a name."""


def _spanning(reasons: Sequence[str]) -> str:
    """One sentence for sentences that differ in their numbers only: from the smallest number to the largest."""
    columns = list(zip(*(_NUMBER.findall(reason) for reason in reasons), strict=True))
    spans = iter(
        column[0] if len(set(column)) == 1 else f"{min(column, key=float)} to {max(column, key=float)}"
        for column in columns
    )
    return _NUMBER.sub(lambda _: next(spans), reasons[0])


def _finite(document: Any) -> Any:
    """``document`` with null for infinities and NaN, which JSON does not have."""
    if isinstance(document, dict):
        return {key: _finite(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [_finite(value) for value in document]
    return None if isinstance(document, float) and not math.isfinite(document) else document


def _shortened(name: str, room: int) -> str:
    """``name`` in ``room`` characters: exporters build names of hundreds, which differ at the end."""
    room = min(room, SHOWN_CHARACTERS)
    if len(name) <= room:
        return name
    head = room // 3
    return f"{name[:head]}...{name[len(name) - (room - head - 3) :]}"


def _shortened_words(text: str) -> str:
    return " ".join(_shortened(word, SHOWN_CHARACTERS) for word in text.split())


def print_error(error: BaseException, *, debug: bool = False) -> None:
    """``error: <where>: <what> (<remedy>)`` on stderr, its notes below it; above it the traceback if asked for."""
    if debug:
        traceback.print_exception(error)
    text = " ".join(str(error).split())
    lines = [f"error: {text}", *getattr(error, "__notes__", ())]
    sys.stderr.write("".join(f"{line}\n" for line in lines))
