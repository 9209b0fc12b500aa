"""``qat2int8 report``: everything about a model in one file that a person can look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qat2int8.pipelines.figures import as_bytes
from qat2int8.tools.console import Debug, Json, Quiet, Report, Verbose

__all__ = ["report"]

_WARM_UP = 2
_HISTOGRAMS = 12


def report(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The converted model.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Where to write it: .html, .md or .json.", show_default=False
        ),
    ],
    reference: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="The model it was made from, or the float one.", show_default=False),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Samples with labels to measure on.", show_default=False),
    ] = None,
    metric: Annotated[
        str, typer.Option(metavar="METRIC", help="What answers are judged by; see evaluate.")
    ] = "topk",
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Samples a batch.")] = 1,
    samples: Annotated[
        int, typer.Option(metavar="N", min=1, help="Samples to compare layer by layer on; all are judged.")
    ] = 64,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Write a report on a model: figures, tables, plots, the graph, what stayed in float and why.

    The HTML file needs no network and no script. With --data and --reference
    both models are run, and compared layer by layer.
    """
    from qat2int8.pipelines.reporting.collect import collect
    from qat2int8.pipelines.reporting.write import check_report_path, write_report

    told = Report(json=json, quiet=quiet, verbose=verbose)
    check_report_path(output)
    measured = _measured(model, reference, data, metric, batch_size, samples)
    document = collect(model, reference, **measured)
    write_report(document, output)
    for card in document.cards:
        told.line(f"{card.label:28} {card.value:>8}  {card.hint}")
    told.line(f"written      {output}, {as_bytes(output.stat().st_size)}")
    told.data(document.model_dump(mode="json"))


def _measured(
    model: Path, reference: Path | None, data: str | None, metric: str, batch_size: int, samples: int
) -> dict[str, Any]:
    """What can be had on data: answers and speed; with a reference the error of each layer and its values too."""
    if data is None:
        return {}
    from qat2int8.pipelines.evaluation.activations import activations
    from qat2int8.pipelines.evaluation.compare import compare_layers
    from qat2int8.pipelines.evaluation.evaluate import evaluate
    from qat2int8.pipelines.evaluation.metrics import metric_factory
    from qat2int8.pipelines.evaluation.read_reference import ReadReference
    from qat2int8.tools.feeding import Source, named_models

    factory = metric_factory(metric)
    models = named_models([model] if reference is None else [reference, model])
    source = Source.open(models, data, batch_size)
    batches = source.batches_in(0)
    skip = _WARM_UP if batches is None or batches > 2 * _WARM_UP else 0
    measured: dict[str, Any] = {
        "evaluation": evaluate(models, source.batches, factory, skip_batches=skip),
        "data": source.name,
    }
    if reference is not None:
        few = Source.open(models, data, batch_size, samples=samples).batches
        readable = ReadReference.open(reference)
        comparison = compare_layers(readable, model, few)
        worst = [layer.name for layer in comparison.worst_first()[:_HISTOGRAMS]]
        measured |= {"comparison": comparison, "values": activations(readable, model, few, worst)}
    return measured
