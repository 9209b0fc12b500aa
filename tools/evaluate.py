"""``qat2int8 evaluate``: one or several models on the same data, their answers and their speed side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qat2int8.pipelines.figures import as_decimal, as_milliseconds, as_rate
from qat2int8.tools.console import Debug, Json, Quiet, Report, Verbose
from qat2int8.tools.feeding import Source, named_models, print_failures
from qat2int8.tools.progress import counting

if TYPE_CHECKING:
    from qat2int8.pipelines.data import Batch
    from qat2int8.pipelines.evaluation.evaluate import Evaluation, ModelScore
    from qat2int8.pipelines.evaluation.profile import OpTime
    from qat2int8.pipelines.evaluation.verdict import Verdict

__all__ = ["evaluate"]

_NOT_GOOD_ENOUGH = 1
_INCOMPLETE = 2
_RANDOM_BATCHES = 50
_PROFILED_BATCHES = 20
_PROFILE_ROWS = 8


def evaluate(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL...", help="Models with the same inputs; the first is the reference.", show_default=False
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Samples, labels: file, folder, module:function.", show_default=False),
    ] = None,
    random_data: Annotated[
        bool, typer.Option("--random-data", help="Time the models on made-up inputs; nothing is judged.")
    ] = False,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Samples a batch.")] = 1,
    iterations: Annotated[int, typer.Option(metavar="N", min=0, help="Batches to run; 0 runs all.")] = 0,
    skip_batches: Annotated[
        int, typer.Option(metavar="N", min=0, help="First batches that are judged but left out of the timing.")
    ] = 0,
    threads: Annotated[
        str, typer.Option(metavar="N,...", help="Threads of the runtime; several are timed side by side.")
    ] = "1",
    metric: Annotated[
        str, typer.Option(metavar="METRIC", help="topk, mean-iou, psnr, spearman, f1, or module:function.")
    ] = "topk",
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The data's labels, or an output that is the accuracy.", show_default="labels"
        ),
    ] = None,
    loss_output: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The graph output that is the loss.", show_default="one called so"),
    ] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(
            metavar="DROP",
            help="Exit with 1 if a model is worse than the first by more: 1% of its figure, or 0.5 points.",
            show_default=False,
        ),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Also show which ops the time goes to.")] = False,
    report_file: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="FILE",
            help="Also write a report on the last model: .html, .md or .json.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Run models on the same data; compare answers, throughput and latency.

    The models run in turns, batch by batch, so that a noisy machine favours none. Exit code 1 says that --max-drop
    was exceeded, 2 that a model failed on a batch; the rest of the run is reported all the same.
    """
    from qat2int8.ir import DataError
    from qat2int8.pipelines.environment import environment
    from qat2int8.pipelines.evaluation.evaluate import evaluate as run_models
    from qat2int8.pipelines.evaluation.metrics import metric_factory
    from qat2int8.pipelines.evaluation.verdict import MaxDrop
    from qat2int8.pipelines.exact_products import overflow_warning

    report = Report(json=json, quiet=quiet, verbose=verbose)
    limit = MaxDrop.parse(max_drop) if max_drop is not None else None
    if report_file is not None:
        from qat2int8.pipelines.reporting.write import check_report_path

        check_report_path(report_file)
    counts = _thread_counts(threads)
    if (data is None) != random_data:
        raise DataError("give either --data or --random-data", remedy="--random-data measures speed only")
    if random_data and limit is not None:
        raise DataError("--max-drop needs data with labels", remedy="give --data")
    factory = None if random_data else metric_factory(metric)
    named = named_models(models)
    machine = environment()
    overflows = (overflow_warning(path) for path in named.values())
    warnings = [*machine.warnings, *(each for each in overflows if each is not None)]
    source = Source.open(named, data, batch_size, labels)
    if random_data:
        iterations = iterations or _RANDOM_BATCHES
    with counting("evaluating", source.batches_in(iterations), quiet or json) as show:
        result = run_models(
            named,
            source.batches,
            factory,
            threads=counts,
            iterations=iterations,
            skip_batches=skip_batches,
            accuracy_output=source.accuracy_output,
            loss_output=loss_output,
            on_batch=None if show is None else lambda done, figures: show(done, _so_far(figures)),
        )
    profiles, unprofiled = _profiles(named if profile else {}, source.batches, counts[0])
    verdicts = limit.judge(result) if limit is not None else ()

    if report_file is not None:
        from qat2int8.pipelines.reporting.collect import collect
        from qat2int8.pipelines.reporting.write import write_report

        reference = models[0] if len(models) > 1 else None
        write_report(collect(models[-1], reference, evaluation=result, data=source.name), report_file)
    _show_answers(report, result, list(named), counts[0])
    _show_speed(report, result, list(named), counts)
    for name, times in profiles.items():
        _show_profile(report, name, times)
    for note in (*result.notes, *unprofiled, *source.notes):
        report.line(f"note         {note}")
    report.line(f"data         {source.name}")
    report.line(f"machine      {machine.summary}")
    report.line(f"             {machine.expectation}")
    for warning in warnings:
        report.line(f"warning      {warning}")
    if report_file is not None:
        report.line(f"written      {report_file}")
    for verdict in verdicts:
        report.line(str(verdict))
    report.data(
        {
            **result.as_dict(),
            "speedup": {
                name: {count: result.speedup(name, next(iter(named)), count) for count in counts} for name in named
            },
            "profile": {name: [vars(each) for each in times] for name, times in profiles.items()},
            "verdicts": [verdict.as_dict() for verdict in verdicts],
            "data": source.name,
            "environment": machine.as_dict() | {"warnings": warnings},
        }
    )
    _finish(result, verdicts)


def _thread_counts(text: str) -> list[int]:
    from qat2int8.ir import DataError

    counts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in counts):
        raise DataError(f"'{text}' is no list of numbers of threads", remedy="for example --threads 1,4")
    return list(dict.fromkeys(int(part) for part in counts))


def _profiles(
    models: dict[str, Path], batches: Iterable[Batch], threads: int
) -> tuple[dict[str, tuple[OpTime, ...]], list[str]]:
    """Where the time of each model goes; and of which that cannot be told, and why."""
    from qat2int8.ir import Qat2Int8Error
    from qat2int8.pipelines.evaluation.profile import profile

    found, notes = {}, []
    for name, path in models.items():
        try:
            feeds = (batch.inputs for batch in islice(batches, _PROFILED_BATCHES))
            found[name] = profile(path, feeds, threads=threads)
        except Qat2Int8Error as error:
            notes.append(f"{name} has no profile: {error.what}")
    return found, notes


def _show_answers(report: Report, result: Evaluation, names: Sequence[str], threads: int) -> None:
    scores = [result.of(name, threads) for name in names]
    figures = list(dict.fromkeys(figure for score in scores for figure in score.metrics))
    if not figures:
        return
    losses = any(score.loss is not None for score in scores)
    base = scores[0].metrics
    rows = [
        (
            score.model,
            score.samples,
            *(_figure(score.metrics.get(figure)) for figure in figures),
            *([_figure(score.loss, 4)] if losses else []),
            _figure(_difference(score, base), signed=True) if score is not scores[0] else "",
        )
        for score in scores
    ]
    headers = ("model", "samples", *figures, *(["loss"] if losses else []), "difference")
    report.table(headers, rows, right=range(1, len(headers)))


def _difference(score: ModelScore, base: dict[str, float]) -> float | None:
    """Of the first figure."""
    for figure, reference in base.items():
        return score.metrics[figure] - reference if figure in score.metrics else None
    return None


def _show_speed(report: Report, result: Evaluation, names: Sequence[str], counts: Sequence[int]) -> None:
    rows = [
        (
            score.model,
            score.threads or "auto",
            as_rate(score.warm.throughput),
            as_milliseconds(score.warm.median_ms),
            as_milliseconds(score.warm.p99_ms),
            f"{result.speedup(name, names[0], count):.2f}x",
            *(
                [as_rate(score.timing.throughput), as_milliseconds(score.timing.median_ms)]
                if result.skipped_batches
                else []
            ),
        )
        for count in counts
        for name in names
        for score in [result.of(name, count)]
    ]
    headers = ["model", "threads", "samples/s", "ms a batch", "99 %", "speed"]
    if result.skipped_batches:
        headers += ["all: /s", "all: ms"]
    report.line()
    report.table(headers, rows, right=range(1, len(headers)))
    report.line()


def _show_profile(report: Report, name: str, times: Sequence[OpTime]) -> None:
    report.line(f"where the time of {name} goes:")
    shown = times if report.verbose else times[:_PROFILE_ROWS]
    rows = [(each.op_type, each.nodes, f"{each.milliseconds:.3f}", f"{each.percent:.1f} %") for each in shown]
    report.table(("op", "nodes", "ms", "share"), rows, right=(1, 2, 3))
    report.line()


def _figure(value: float | None, digits: int = 2, *, signed: bool = False) -> str:
    return as_decimal(value, digits, signed=signed, none="-")


def _so_far(figures: dict[str, dict[str, float]]) -> str:
    return " / ".join(_figure(next(iter(each.values()), None)) for each in figures.values())


def _finish(result: Evaluation, verdicts: Sequence[Verdict]) -> None:
    print_failures(result.failures)
    if result.failures:
        raise typer.Exit(_INCOMPLETE)
    if not all(verdict.passed for verdict in verdicts):
        raise typer.Exit(_NOT_GOOD_ENOUGH)
