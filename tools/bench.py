"""``qat2int8 bench``: well-known networks with random weights, float and integer, beside published figures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qat2int8.pipelines.figures import as_bytes, as_milliseconds, as_rate
from qat2int8.tools.console import Debug, Json, Quiet, Report, Verbose

if TYPE_CHECKING:
    from qat2int8.pipelines.benchmarking.history import Change
    from qat2int8.pipelines.benchmarking.suite import Result

__all__ = ["bench"]

_INCOMPLETE = 2
_ROUNDS, _QUICK_ROUNDS, _REPEAT = 11, 3, 3

Table = tuple[Sequence[str], list[Sequence[str]]]


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
    each of their own machine. Exit code 2 says that a network failed; the others are reported all the same.
    """
    from qat2int8.ir import DataError, Qat2Int8Error
    from qat2int8.pipelines.benchmarking import suite
    from qat2int8.pipelines.benchmarking.history import append_run, changes, last_run, read_history
    from qat2int8.pipelines.benchmarking.published import PUBLISHED_ON
    from qat2int8.pipelines.environment import environment

    report = Report(json=json, quiet=quiet, verbose=verbose)
    if style not in (*suite.STYLES, "both"):
        raise DataError(f"no style is called '{style}'", remedy=f"there are {', '.join(suite.STYLES)} and both")
    styles = [*suite.STYLES] if style == "both" else [style]
    chosen = suite.chosen_networks(networks or [], quick=quick)
    past = read_history(history) if history is not None else []
    if history is not None and not history.parent.is_dir():
        raise DataError(f"{history}: there is no such folder", remedy="make it, or name another file")
    turns = rounds or (_QUICK_ROUNDS if quick else _ROUNDS)
    against = suite.peers() if peers else []
    machine = environment()

    results: list[Result] = []
    failures: list[dict[str, str]] = []
    for each in styles:
        for name in chosen:
            if not (json or quiet):
                sys.stderr.write(f"{name} ({each}) ...\n")
            try:
                results.append(suite.measure(name, each, rounds=turns, repeat=_REPEAT, against=against))
            except Qat2Int8Error as error:
                failures.append({"network": name, "style": each, "reason": str(error)})

    document = {
        "results": [result.as_dict() for result in results],
        "failures": failures,
        "rounds": turns,
        "repeat": _REPEAT,
        "environment": machine.as_dict(),
    }
    before = last_run(past, document)
    changed = changes(before, document) if before else []
    if history is not None and results:
        append_run(history, document)

    put = _markdown if markdown else _plain
    for each in styles:
        measured = [result for result in results if result.style == each]
        if measured:
            report.line(f"Fake quant in the style {each}: {suite.STYLES[each]}.")
            report.line()
            for table in (_published(measured), _contenders(measured)):
                put(report, table)
            report.line("Time and peak memory of the process that makes the integer model:")
            report.line()
            put(report, _costs(measured))
    if changed:
        report.line(f"Against the run of {before['environment']['date'] if before else ''} on this machine:")
        report.line()
        put(report, _changes(changed))
    report.line(f"6271: published for one core of a {PUBLISHED_ON}, '-' where none is. ERNIE: ms a sequence.")
    report.line(f"Batch 1, one thread, median of {turns} interleaved rounds. Ratios are against float.")
    report.line(machine.summary)
    report.line(f"Of this processor: {machine.expectation}.")
    for warning in machine.warnings:
        report.line(f"warning: {warning}")
    for result in results:
        for one, reason in result.left_out.items():
            report.line(f"warning: {result.network}: {one} is left out: {reason}")
    if history is not None and before is None:
        report.line(f"{history}: no earlier run of this machine to compare with")
    report.data(document | {"changes": [vars(change) | {"percent": change.percent} for change in changed]})
    for failure in failures:
        sys.stderr.write(f"error: {failure['network']} ({failure['style']}): {failure['reason']}\n")
    if failures:
        raise typer.Exit(_INCOMPLETE)


def _published(results: Sequence[Result]) -> Table:
    """The table such figures are published in, with the published ones at the right."""
    from qat2int8.pipelines.benchmarking.suite import FLOAT, OURS

    rows: list[Sequence[str]] = []
    for result in results:
        theirs = result.published
        latency = theirs is not None and theirs.latency
        ours = [_speed(result.milliseconds(form), latency) for form in (FLOAT, OURS)]
        cells = ["-"] * 3
        if theirs is not None:
            unit = " ms" if latency else ""
            cells = [f"{theirs.fp32:.2f}{unit}", f"{theirs.int8:.2f}{unit}", f"{theirs.ratio:.2f}x"]
        rows.append((result.title, *ours, f"{result.speedup(OURS):.2f}x", *cells))
    return ("network", "FP32 img/s", "INT8 img/s", "ratio", "6271 FP32", "INT8", "ratio"), rows


def _speed(milliseconds: float, latency: bool) -> str:
    return f"{as_milliseconds(milliseconds)} ms" if latency else as_rate(1000 / milliseconds)


def _contenders(results: Sequence[Result]) -> Table:
    from qat2int8.pipelines.benchmarking.suite import FLOAT

    names = list(dict.fromkeys(name for result in results for name in result.runs if name != FLOAT))
    rows: list[Sequence[str]] = [
        (
            result.title,
            as_milliseconds(result.milliseconds(FLOAT)),
            *(f"{result.speedup(name):.2f}x" if name in result.runs else "-" for name in names),
        )
        for result in results
    ]
    return ("network", "float ms", *names), rows


def _costs(results: Sequence[Result]) -> Table:
    makers = list(dict.fromkeys(name for result in results for name in result.costs))
    rows: list[Sequence[str]] = []
    for result in results:
        cells: list[str] = []
        for maker in makers:
            cost = result.costs.get(maker)
            cells.append(f"{cost.seconds:.1f} s" if cost else "-")
            cells.append(as_bytes(cost.peak_bytes) if cost and cost.peak_bytes else "-")
        rows.append((result.title, *cells))
    return ("network", *(word for maker in makers for word in (maker, "memory"))), rows


def _changes(changed: Sequence[Change]) -> Table:
    rows: list[Sequence[str]] = [
        (
            f"{each.network} ({each.style})",
            each.contender,
            f"{each.before:.2f}x",
            f"{each.now:.2f}x",
            f"{each.percent:+.1f} %",
        )
        for each in changed
    ]
    return ("network", "contender", "before", "now", "change"), rows


def _plain(report: Report, table: Table) -> None:
    head, rows = table
    report.table(head, rows, right=range(1, len(head)))
    report.line()


def _markdown(report: Report, table: Table) -> None:
    head, rows = table
    ruler: Sequence[Any] = ["---", *["---:"] * (len(head) - 1)]
    for row in (head, ruler, *rows):
        report.line("| " + " | ".join(row) + " |")
    report.line()
