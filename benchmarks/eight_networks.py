"""The tables of ``qat2int8 bench``, for the documents. After Ctrl-C it prints them, but writes nothing."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterable

import report

from qat2int8.ir import DataError
from qat2int8.pipelines.benchmarking import suite, tables
from qat2int8.pipelines.benchmarking.run import Run, measure_all
from qat2int8.pipelines.environment import environment


def full(run: Run) -> str:
    """Everything that was measured, for the page on benchmarks."""
    lines: list[str] = []
    for style, parts in tables.sections(run):
        lines += [f"**{style}**: {suite.STYLES[style]}.", ""]
        for caption, table in parts:
            lines += [caption, ""] if caption else []
            lines += [*tables.as_markdown(table), ""]
    return "\n".join([*lines, *_listed(tables.notes(run))])


def short(run: Run) -> str:
    """The first style that was measured, beside the published ratios, for the README."""
    style = run.results[0].style
    lines = tables.as_markdown(tables.short([result for result in run.results if result.style == style]))
    told = f"Fake quant in the style {style}, batch 1, one thread, median of {run.rounds} interleaved rounds."
    return "\n".join([*lines, "", told, run.machine.summary])


def _listed(sentences: Iterable[str]) -> list[str]:
    """A list in lines that are not too long for the documents."""
    wrapped = [textwrap.wrap(sentence, 118, break_on_hyphens=False) for sentence in sentences]
    return [f"{'- ' if not number else '  '}{line}" for lines in wrapped for number, line in enumerate(lines)]


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=", ".join(suite.SUITE))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--style", choices=[*suite.STYLES, "both"], default="both")
    parser.add_argument("--write", action="store_true", help="put them into docs/benchmarks.md and README.md")
    options = parser.parse_args()
    try:
        networks = suite.chosen_networks(options.networks, quick=False)
    except DataError as error:
        parser.error(str(error))
    styles = [*suite.STYLES] if options.style == "both" else [options.style]
    machine = environment()
    run = measure_all(networks, styles, rounds=options.rounds, against=suite.peers(), machine=machine, tell=_say)
    if run.results:
        print(full(run))
    for failure in run.failures:
        _say(f"error: {failure.network} ({failure.style}): {failure.reason}\n")
    if run.failures or run.missing:
        raise SystemExit(2)
    if options.write:
        report.write(report.DOCS / "benchmarks.md", "bench", full(run))
        report.write(report.README, "bench", short(run))


if __name__ == "__main__":
    main()
