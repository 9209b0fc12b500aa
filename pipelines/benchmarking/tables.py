"""The tables of a run and what has to be said below them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import TypeAlias

from qat2int8.pipelines.benchmarking.history import Change
from qat2int8.pipelines.benchmarking.published import PUBLISHED_ON
from qat2int8.pipelines.benchmarking.run import REPEAT, Run
from qat2int8.pipelines.benchmarking.suite import EXPORTED, FLOAT, OPENVINO, OURS, STATIC, STYLES, Result
from qat2int8.pipelines.exact_products import products_overflow
from qat2int8.pipelines.figures import as_bytes, as_milliseconds, as_rate
from qat2int8.pipelines.target_files import native_target

__all__ = ["Table", "as_markdown", "changes", "contenders", "costs", "notes", "published", "sections", "short"]

Table: TypeAlias = tuple[Sequence[str], list[Sequence[str]]]
"""Column heads and rows; the first column is text, the others are numbers."""


def sections(run: Run) -> Iterator[tuple[str, list[tuple[str, Table]]]]:
    """For each style that was measured its tables, each with what to say above it, if anything."""
    for style in STYLES:
        results = [result for result in run.results if result.style == style]
        if results:
            made = "Time and peak memory of the process that makes the integer model:"
            yield style, [("", published(results)), ("", contenders(results)), (made, costs(results))]


def published(results: Sequence[Result]) -> Table:
    """The table such figures are published in, with the published ones at the right."""
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


def short(results: Sequence[Result]) -> Table:
    """:func:`published` with nothing but the ratio of what is published."""
    _, rows = published(results)
    return ("network", "FP32 img/s", "INT8 img/s", "ratio", "6271 ratio"), [[*row[:4], row[-1]] for row in rows]


def _speed(milliseconds: float, latency: bool) -> str:
    return f"{as_milliseconds(milliseconds)} ms" if latency else as_rate(1000 / milliseconds)


def contenders(results: Sequence[Result]) -> Table:
    """How much faster than float each contender is."""
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


def costs(results: Sequence[Result]) -> Table:
    """Time and memory of making the integer models."""
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


def changes(changed: Sequence[Change]) -> Table:
    """Ratios of two runs."""
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


def as_markdown(table: Table) -> list[str]:
    """Lines of Markdown."""
    head, rows = table
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (head, ruler, *rows)]


def notes(run: Run) -> Iterator[str]:
    """Sentences, a line each: what the figures are, where they come from and what is doubtful about them."""
    yield f"6271: published for one core of a {PUBLISHED_ON}, '-' where none is. ERNIE: ms a sequence."
    cores = {result.core for result in run.results}
    where = ", pinned to one core" if cores and None not in cores else ", not pinned to a core"
    yield (
        f"Batch 1, one thread{where}, median of {run.rounds} interleaved rounds of {REPEAT} calls. "
        "Ratios are against float."
    )
    seen = {name for result in run.results for name in result.runs}
    if EXPORTED in seen:
        yield f"{EXPORTED}: the QAT export in onnxruntime; {OURS}: the same, converted for {native_target()}."
    if STATIC in seen:
        yield f"{STATIC}: the float network, calibrated anew and run by onnxruntime."
    if OPENVINO in seen:
        yield f"{OPENVINO}: the QAT export in OpenVINO {version(OPENVINO)}."
    if products_overflow():
        yield (
            f"warning: {STATIC}, and {EXPORTED} where onnxruntime makes integer kernels of it, overflow on this "
            "processor: fast, and wrong."
        )
    yield run.machine.summary
    doubt = "" if run.machine.flags else "warning: "
    yield f"{doubt}Of this processor: {run.machine.expectation}."
    for warning in run.machine.warnings:
        yield f"warning: {warning}"
    for result in run.results:
        for one, reason in result.left_out.items():
            yield f"warning: {result.network} ({result.style}): {one} is left out: {reason}"
