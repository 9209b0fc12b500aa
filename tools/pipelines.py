"""``qat2int8 pipelines``: which pipelines there are, and which passes one of them runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qat2int8.tools.console import Debug, Json, Quiet, Report, Verbose
from qat2int8.tools.passes import summary

if TYPE_CHECKING:
    from qat2int8.pipelines.spec import PipelineSpec

__all__ = ["pipelines"]


def pipelines(
    name: Annotated[
        str,
        typer.Argument(
            metavar="PIPELINE",
            help="A pipeline's name or .yaml file; all shipped ones without.",
            show_default=False,
        ),
    ] = "",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """List the shipped pipelines, or show the passes of one in order and as text for --passes."""
    from qat2int8.pipelines.shipped import load_pipeline, pipeline_names

    report = Report(json=json, quiet=quiet, verbose=verbose)
    if name:
        _show(report, load_pipeline(name))
        return
    specs = [load_pipeline(shipped) for shipped in pipeline_names()]
    report.table(
        ("pipeline", "passes", "what it is for"),
        [(spec.name, len(spec.passes), spec.description) for spec in specs],
        right=(1,),
    )
    report.data([_document(spec) for spec in specs])


def _show(report: Report, spec: PipelineSpec) -> None:
    from qat2int8.passes import all_passes
    from qat2int8.pipelines.spec import Fixpoint, flatten

    known = all_passes()
    rounds = {id(one) for step in spec.passes if isinstance(step, Fixpoint) for one in step.passes}
    if spec.name:
        report.line(f"{spec.name}: {spec.description}" if spec.description else spec.name)
        report.line()
    report.table(
        ("", "pass", "what it does"),
        [
            (
                position,
                f"{one} (until settled)" if id(one) in rounds else str(one),
                summary(known[one.name]) if one.name in known else "not installed",
            )
            for position, one in enumerate(flatten(spec.passes), start=1)
        ],
        right=(0,),
    )
    report.line()
    report.line(str(spec))
    report.data(_document(spec))


def _document(spec: PipelineSpec) -> dict[str, Any]:
    from qat2int8.pipelines.spec import flatten

    return {
        "name": spec.name,
        "description": spec.description,
        "target": spec.target,
        "passes": [{"name": one.name, "options": dict(one.options)} for one in flatten(spec.passes)],
        "text": str(spec),
    }
