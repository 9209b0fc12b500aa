"""``qat2int8 bench``: well-known networks with random weights, float and integer, beside published figures."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qat2int8.tools.console import Debug, Json, Quiet, Report, Verbose

if TYPE_CHECKING:
    from qat2int8.pipelines.benchmarking.run import Run
    from qat2int8.pipelines.benchmarking.tables import Table

__all__ = ["bench"]

_INCOMPLETE, _INTERRUPTED = 2, 130
_ROUNDS, _QUICK_ROUNDS = 11, 3


def bench(
    networks: Annotated[
        list[str] | None, typer.Argument(metavar="[NETWORK...]", help="All eight if none.", show_default=False)
    ] = None,
    style: Annotated[
        str, typer.Option(metavar="STYLE", help="Of the fake quant: layer-inputs, every-tensor, or both.")
    ] = "layer-inputs",
    quick: Annotated[
        bool, typer.Option("--quick", help="Four small networks unless named, 3 rounds unless given.")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Turns of every contender.", show_default="11")
    ] = None,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Also other quantizers that are here.")] = True,
    history: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Add this run, compare with the last one there.", show_default=False),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables in Markdown.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Measure networks built in code: float, as exported, converted, and by other quantizers, on one thread.

    All forms of a network run in turns, so ratios hold on a noisy machine; milliseconds and published figures are
    each of their own machine. Exit code 2 says that a network failed, 130 that Ctrl-C ended the run; the others
    are reported all the same.
    """
    from qat2int8.ir import DataError
    from qat2int8.pipelines.benchmarking import suite, tables
    from qat2int8.pipelines.benchmarking.history import append_run, changes, last_run, read_history
    from qat2int8.pipelines.benchmarking.run import measure_all
    from qat2int8.pipelines.environment import environment

    report = Report(json=json, quiet=quiet, verbose=verbose)
    if style not in (*suite.STYLES, "both"):
        raise DataError(f"no style is called '{style}'", remedy=f"there are {', '.join(suite.STYLES)} and both")
    styles = [*suite.STYLES] if style == "both" else [style]
    chosen = suite.chosen_networks(networks or [], quick=quick)
    past = read_history(history) if history is not None else []
    if history is not None and not history.parent.is_dir():
        raise DataError(f"{history}: there is no such folder", remedy="make it, or name another file")
    against = suite.peers() if peers else []
    machine = environment()
    tell = _silent if json or quiet else _say
    for warning in machine.warnings:
        tell(f"warning: {warning}\n")

    turns = rounds or (_QUICK_ROUNDS if quick else _ROUNDS)
    run = measure_all(chosen, styles, rounds=turns, against=against, machine=machine, tell=tell)
    document = run.as_dict()
    before = last_run(past, document)
    changed = changes(before, document) if before else []
    if history is not None and run.results:
        append_run(history, document)

    _show(report, run, markdown=markdown)
    if run.results and peers and suite.OPENVINO not in against:
        report.line(f"{suite.OPENVINO} takes part once it is installed: pip install 'qat2int8[bench]'")
    if changed:
        report.line()
        report.line(f"Against the run of {before['environment']['date'] if before else ''} on this machine:")
        report.line()
        _put(report, tables.changes(changed), markdown=markdown)
    if history is not None and before is None:
        report.line(f"{history}: no earlier run of this machine to compare with")
    report.data(document | {"changes": [vars(change) | {"percent": change.percent} for change in changed]})
    for failure in run.failures:
        if debug:
            traceback.print_exception(failure.error)
        sys.stderr.write(f"error: {failure.network} ({failure.style}): {failure.reason}\n")
    if run.missing:
        sys.stderr.write(f"not measured: {', '.join(f'{name} ({form})' for name, form in run.missing)}\n")
        raise typer.Exit(_INTERRUPTED)
    if run.failures:
        raise typer.Exit(_INCOMPLETE)


def _show(report: Report, run: Run, *, markdown: bool) -> None:
    from qat2int8.pipelines.benchmarking import suite, tables

    for style, parts in tables.sections(run):
        report.line(f"Fake quant in the style {style}: {suite.STYLES[style]}.")
        report.line()
        for caption, table in parts:
            if caption:
                report.line(caption)
                report.line()
            _put(report, table, markdown=markdown)
    if run.results:
        for note in tables.notes(run):
            report.line(note)


def _put(report: Report, table: Table, *, markdown: bool) -> None:
    from qat2int8.pipelines.benchmarking.tables import as_markdown

    head, rows = table
    if markdown:
        for line in as_markdown(table):
            report.line(line)
    else:
        report.table(head, rows, right=range(1, len(head)))
    report.line()


def _say(text: str) -> None:
    """A piece of a line, seen at once."""
    sys.stderr.write(text)
    sys.stderr.flush()


def _silent(text: str) -> None:
    pass
