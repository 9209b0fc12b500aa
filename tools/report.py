"""``qat2int8 report``: everything about a model in one file that a person can look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qat2int8.tools.console import Debug, Json, Quiet, Report, Verbose

__all__ = ["report"]

_INCOMPLETE = 2


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
        str | None,
        typer.Option(metavar="METRIC", help="What answers are judged by; see evaluate.", show_default="topk"),
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Samples a batch.")] = 1,
    samples: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Samples to compare layer by layer on, in whole batches; all are judged."
        ),
    ] = 64,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Write a report on a model: figures, tables, plots, the graph, what stayed in float and why.

    The HTML file needs no network and no script. With --data and --reference
    both models are run, and compared layer by layer. Exit code 2 says that a model failed on a batch.
    """
    from qat2int8.tools.feeding import print_failures
    from qat2int8.tools.page import Page

    told = Report(json=json, quiet=quiet, verbose=verbose)
    page = Page(output, data, batch_size=batch_size, samples=samples, metric=metric)
    page.check(model, reference)
    document, failures = page.write(model, reference, silent=quiet or json)
    for card in document.cards:
        told.line(f"{card.label:18} {card.value:>8}  {card.hint}")
    page.tell(told, document)
    told.data(document.model_dump(mode="json"))
    print_failures(failures)
    if failures:
        raise typer.Exit(_INCOMPLETE)
