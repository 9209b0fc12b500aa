"""What every command shares: its common flags, how it reports, and how errors look.

Commands import onnx, onnxruntime and rich when they run, not when they are defined, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
import sys
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


class Report:
    """What a command has to say on stdout: tables and lines for a person, or one document for a machine."""

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.as_json = json
        self.verbose = verbose
        self._silent = quiet or json

    def line(self, text: str = "") -> None:
        """One line of text, as it is."""
        if not self._silent:
            sys.stdout.write(f"{text}\n")

    def table(
        self, headers: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[int] = ()
    ) -> None:
        """A table; the columns at the indices ``right`` are numbers, the last column takes what room is left."""
        if self._silent:
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

    def findings(self, diagnostics: Sequence[Diagnostic]) -> None:
        """Warnings and errors, the first few of them; with ``--verbose`` all, notes included."""
        shown = [d for d in diagnostics if self.verbose or d.severity != "note"]
        limit = len(shown) if self.verbose else SHOWN_FINDINGS
        if shown:
            self.line()
            self.table(("code", "finding"), [(d.code, str(d).removeprefix(f"{d.code} ")) for d in shown[:limit]])
        if shown[limit:]:
            self.line(f"... and {len(shown) - limit} more (see them with --verbose)")

    def data(self, document: Any) -> None:
        """The document of ``--json``; nothing otherwise."""
        if self.as_json:
            sys.stdout.write(f"{json.dumps(document, indent=1)}\n")


def print_error(error: BaseException, *, debug: bool = False) -> None:
    """``error: <where>: <what> (<remedy>)`` on stderr, its notes below it; above it the traceback if asked for."""
    if debug:
        traceback.print_exception(error)
    text = " ".join(str(error).split())
    lines = [f"error: {text}", *getattr(error, "__notes__", ())]
    sys.stderr.write("".join(f"{line}\n" for line in lines))
