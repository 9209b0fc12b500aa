"""``qat2int8 compare``: a model against the one it was made from, layer by layer, the worst ones first."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qat2int8.pipelines.figures import as_decimal, as_percent
from qat2int8.tools.console import Debug, Json, Quiet, Report, Verbose
from qat2int8.tools.feeding import Source, named_models, print_failures
from qat2int8.tools.progress import counting

if TYPE_CHECKING:
    from qat2int8.pipelines.data import Batch
    from qat2int8.pipelines.evaluation.compare import Comparison, LayerComparison, View
    from qat2int8.pipelines.evaluation.errors import Errors
    from qat2int8.pipelines.evaluation.metrics import Metric
    from qat2int8.pipelines.evaluation.read_reference import ReadReference
    from qat2int8.pipelines.evaluation.skip_trials import Quality, SkipTrials

__all__ = ["compare"]

_INCOMPLETE = 2
_ROWS = 15
_SHOWN_NAMES = 5
_RANDOM_SAMPLES = 16
_VIEWS = ("local", "end-to-end")


def compare(
    reference: Annotated[
        Path,
        typer.Argument(
            metavar="REFERENCE", help="The model it was made from: float or fake quant.", show_default=False
        ),
    ],
    candidate: Annotated[
        Path, typer.Argument(metavar="CANDIDATE", help="The converted model.", show_default=False)
    ],
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Samples: file, folder, module:function.", show_default=False),
    ] = None,
    random_data: Annotated[bool, typer.Option("--random-data", help="Compare on made-up inputs.")] = False,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Samples a batch; all tensors of one are in memory.")
    ] = 8,
    samples: Annotated[int, typer.Option(metavar="N", min=0, help="Samples to run; 0 runs all.")] = 0,
    sort: Annotated[
        str,
        typer.Option(
            metavar="local|end-to-end",
            help="Order by what each layer does wrong by itself, or with what it was given.",
        ),
    ] = "local",
    as_written: Annotated[
        bool,
        typer.Option("--as-written", help="Run the candidate node by node too, without fused kernels."),
    ] = False,
    try_skip: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Convert again with each of the N worst layers in float; tell the gain."
        ),
    ] = 0,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC",
            help="What --try-skip judges answers by; see evaluate.",
            show_default="topk where there are labels",
        ),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="NAME", help="The data's labels.", show_default="labels")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Find the layers in which a converted model differs from the one it was made from.

    Exit code 2 says that a model failed on a batch or computes NaN; the rest is reported all the same.
    """
    from qat2int8.ir import DataError
    from qat2int8.pipelines.evaluation.compare import compare_layers
    from qat2int8.pipelines.evaluation.metrics import metric_factory
    from qat2int8.pipelines.evaluation.random_data import RandomSamples
    from qat2int8.pipelines.evaluation.read_reference import ReadReference

    report = Report(json=json, quiet=quiet, verbose=verbose)
    view = _view(sort)
    if (data is None) != random_data:
        raise DataError("give either --data or --random-data", remedy="errors on real data are those that matter")
    for option, given in (("--metric", metric), ("--labels", labels)):
        if given is not None and not (try_skip and data is not None):
            raise DataError(f"{option} says how --try-skip judges answers", remedy="give --try-skip N and --data")
    judged_by = None if metric is None else metric_factory(metric)
    source = ReadReference.open(reference)
    fed = Source.open(named_models([reference, candidate]), data, batch_size, labels, samples or None)
    batches: Any = fed.batches
    if random_data:
        batches = RandomSamples(source.gathered, samples or _RANDOM_SAMPLES)
    total = samples or _RANDOM_SAMPLES if random_data else fed.batches_in(0)
    with counting("comparing", total, quiet or json) as show:
        found = compare_layers(
            source,
            candidate,
            batches,
            as_written=as_written,
            on_batch=None if show is None else lambda done: show(done, ""),
        )
    ranked = found.worst_first(view)
    _show_layers(report, found, ranked, view)
    wrong = list(dict.fromkeys(layer.source for layer in ranked if layer.errors(view).sqnr_db < math.inf))
    trials, refusal = None, ""
    if try_skip and wrong:
        bad = {failure.first for failure in found.failures}
        good = [batch for batch in batches if batch.first not in bad] if bad else batches
        trials, refusal = _try(reference, source, candidate, wrong[:try_skip], good, judged_by)
    if trials is not None:
        _show_trials(report, trials)
    elif refusal:
        report.line(f"{'--try-skip':<13}{refusal}")
    elif ranked and not wrong:
        report.line(f"{'to try':<13}nothing: no layer differs")
    elif wrong and not try_skip:
        report.line(f"{'to try':<13}{_how_to_skip(reference, source, data, wrong[0])}")
        report.line(f"{'':<13}--try-skip {min(3, len(wrong))} measures what that gains")
    report.data(
        {
            "reference": str(reference),
            "candidate": str(candidate),
            "data": batches.name,
            "sort": view if found.has_local else "end-to-end",
            **found.as_dict(),
            "worst": [layer.name for layer in ranked],
            "try_skip": None if trials is None else trials.as_dict(),
            "try_skip_error": refusal,
        }
    )
    _finish(found)


def _view(text: str) -> View:
    from qat2int8.ir import DataError

    if text == "local":
        return "local"
    if text == "end-to-end":
        return "end-to-end"
    raise DataError(f"layers cannot be sorted by '{text}'", remedy=f"one of {', '.join(_VIEWS)}")


def _show_layers(report: Report, found: Comparison, ranked: Sequence[LayerComparison], view: View) -> None:
    shown = ranked if report.verbose else ranked[:_ROWS]
    levels = any(layer.integer for layer in found.layers)
    headers = [*(["local"] if found.has_local else []), "whole", "cosine", "max", "mean"]
    headers += ["off by 1/2/3+"] if levels else []
    rows = [
        (
            *([_decibels(layer.local)] if found.has_local else []),
            _decibels(layer.end_to_end),
            *_figures(layer.errors(view), levels),
            f"{layer.op_type} {layer.name}",
        )
        for layer in shown
    ]
    report.table([*headers, "layer"], rows, right=range(len(headers)))
    if len(shown) < len(ranked):
        report.line(f"... and {len(ranked) - len(shown)} better layers (--verbose shows them)")
    report.line()
    if found.has_local:
        report.line(f"{'local':<13}SQNR in dB of the layer alone, computed from the reference's own tensors")
    report.line(f"{'whole':<13}SQNR in dB with what went wrong before it, from the model's input")
    shares = ", off by levels in percent of the values" if levels else ""
    report.line(f"{'errors':<13}{view if found.has_local else 'end-to-end'}: cosine, max, mean{shares}")
    report.line(f"{'layers':<13}{len(found.layers)} of {found.total} have a counterpart in the reference")
    if found.alone:
        names = found.alone if report.verbose else found.alone[:_SHOWN_NAMES]
        more = len(found.alone) - len(names)
        report.line(f"{'not matched':<13}{', '.join(names)}{f' and {more} more' if more else ''}")
    report.line(f"{'samples':<13}{found.samples}")
    for note in found.notes:
        report.line(f"{'note':<13}{note}")


def _figures(errors: Errors, levels: bool) -> list[str]:
    figures = [f"{errors.cosine:.4f}", f"{errors.max_error:.2g}", f"{errors.mean_error:.2g}"]
    shares = "/".join(f"{100.0 * share:.1f}" if share else "0" for share in errors.off_by_shares[1:])
    return [*figures, *([shares] if levels else [])]


def _decibels(errors: Errors | None) -> str:
    return "-" if errors is None else _db(errors.sqnr_db)


def _db(value: float) -> str:
    if math.isinf(value):
        return "exact" if value > 0 else "no signal"
    return f"{value:.1f}"


def _how_to_skip(reference: Path, source: ReadReference, data: str | None, layer: str) -> str:
    """The command that leaves a layer in float."""
    from qat2int8.pipelines.dialects import has_fake_quant

    words = ["qat2int8", "convert", str(reference)]
    if not has_fake_quant(source.model):
        words = ["qat2int8", "quantize", str(reference), "--data", data or "DATA"]
    return shlex.join([*words, "-o", "FILE", "--skip-node", layer])


def _try(
    reference: Path,
    source: ReadReference,
    candidate: Path,
    layers: Sequence[str],
    batches: Iterable[Batch],
    metric: Callable[[], Metric] | None,
) -> tuple[SkipTrials | None, str]:
    """The trials; or why there are none."""
    from qat2int8.ir import Qat2Int8Error
    from qat2int8.pipelines.evaluation.metrics import METRICS
    from qat2int8.pipelines.evaluation.skip_trials import try_skips

    if metric is None and any(batch.labels is not None for batch in islice(batches, 1)):
        metric = METRICS["topk"]
    try:
        return try_skips(reference, source.path, candidate, layers, batches, metric), ""
    except Qat2Int8Error as error:
        return None, f"the reference cannot be converted: {error.what}"


_OTHER_MODEL = 1.0
"""Decibels between the candidate and the same conversion from which on they are called different models."""


def _show_trials(report: Report, trials: SkipTrials) -> None:
    whole = trials.whole
    figure = next(iter(trials.reference), None)
    answers = whole.same_argmax_percent is not None
    made = "quantized" if trials.calibrated else "converted"
    headers = ["output dB", "gain", *([figure, "gain"] if figure else [])]
    headers += [*(["same answers"] if answers else []), "integer MACs"]

    def row(quality: Quality | None, gains: tuple[str, str], text: str) -> tuple[str, ...]:
        if quality is None:
            return (*["-"] * len(headers), text)
        return (
            _db(quality.sqnr_db),
            gains[0],
            *((as_decimal(quality.metrics[figure]), gains[1]) if figure else ()),
            *([_share(quality.same_argmax_percent)] if answers else []),
            as_percent(quality.integer_macs_percent),
            text,
        )

    rows = [row(whole, ("", ""), "(none)")]
    for trial in trials.trials:
        gains = f"{trials.gain_db(trial):+.1f}", as_decimal(trials.gain(trial), signed=True)
        text = f"{trial.layer}: {trial.error}" if trial.quality is None else trial.layer
        rows.append(row(trial.quality, gains, text))
    report.line()
    report.table([*headers, "left in float"], rows, right=range(len(headers)))
    report.line()
    calibrated = ", which the ranges are from too" if trials.calibrated else ""
    report.line(f"{'tried on':<13}{trials.samples} samples{calibrated}; '(none)' is the reference {made} again")
    if figure:
        report.line(f"{figure:<13}{as_decimal(trials.reference[figure])} of the reference on the same samples")
    if trials.unjudged:
        report.line(f"{'note':<13}answers are not judged: {trials.unjudged}")
    if abs(trials.candidate - whole.sqnr_db) > _OTHER_MODEL:
        report.line(
            f"{'note':<13}the candidate's output has {_db(trials.candidate)} dB: it is not what qat2int8 makes "
            "of the reference now"
        )


def _share(percent: float | None) -> str:
    return "-" if percent is None else as_percent(percent)


def _finish(found: Comparison) -> None:
    print_failures(found.failures)
    for layer in found.not_finite[:_SHOWN_NAMES]:
        wrong = f"{layer.end_to_end.not_finite} values are NaN, or infinite in one model only"
        sys.stderr.write(f"error: layer '{layer.name}': {wrong}\n")
    if len(found.not_finite) > _SHOWN_NAMES:
        sys.stderr.write(f"... and {len(found.not_finite) - _SHOWN_NAMES} more layers (--json has them all)\n")
    if found.failures or found.not_finite:
        raise typer.Exit(_INCOMPLETE)
