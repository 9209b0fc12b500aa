"""``qat2int8 explain``: what a converted model was made from, what runs in float and why, from the file alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qat2int8.pipelines.figures import as_count
from qat2int8.tools.console import Debug, Json, Quiet, Report, Verbose
from qat2int8.tools.evidence import report_certificate

if TYPE_CHECKING:
    from qat2int8.pipelines.explanation import Explanation, NodeExplanation

__all__ = ["explain"]


def explain(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A model that 'convert' wrote.", show_default=False)
    ],
    node: Annotated[
        str,
        typer.Option(metavar="NAME", help="Tell everything known about this one node.", show_default=False),
    ] = "",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Tell what a converted model was made from, what of it runs in float, and why.

    Reads nothing but the model. One that qat2int8 did not make is told as far as its graph goes.
    """
    from qat2int8.pipelines.explanation import explain as explain_model

    report = Report(json=json, quiet=quiet, verbose=verbose)
    explanation = explain_model(model)
    told = explanation.node(node) if node else None
    report.data(
        {
            "model": str(model),
            "made_by": asdict(explanation.origin) if explanation.origin is not None else None,
            "certificate": explanation.certificate.as_dict(),
            "left_float": [asdict(group) for group in explanation.left_float],
            "diagnostics": [finding.as_dict() for finding in explanation.diagnostics],
            "node": told.as_dict() if told is not None else None,
        }
    )
    if told is not None:
        _report_node(report, told)
        return
    _report_origin(report, explanation)
    certificate = explanation.certificate
    report_certificate(report, certificate)
    _report_float(report, explanation)
    report.findings(
        certificate.broken_rules if not verbose else (*explanation.diagnostics, *certificate.broken_rules)
    )


def _report_origin(report: Report, explanation: Explanation) -> None:
    origin = explanation.origin
    if origin is None:
        report.line("made by      not qat2int8: what runs in float is read from the graph, reasons are not known")
        return
    report.line(f"made by      qat2int8 {origin.version}")
    report.line(f"for          {origin.target}")
    report.line(f"from         SHA-256 {origin.source_sha256}")
    report.line(f"pipeline     {origin.pipeline if report.verbose else _short(origin.pipeline)}")


def _short(pipeline: str) -> str:
    """The name of the shipped pipeline that reads like this; the text of any other."""
    from qat2int8.pipelines.shipped import load_pipeline, pipeline_names

    named = {str(load_pipeline(name)): name for name in pipeline_names()}
    return named.get(pipeline, pipeline)


def _report_float(report: Report, explanation: Explanation) -> None:
    groups = explanation.left_float
    if not groups:
        report.line("left float   nothing that could be integer")
        return
    count = sum(len(group.nodes) for group in groups)
    report.line(f"left float   {count} {'node' if count == 1 else 'nodes'}:")
    for group in groups:
        code = f"{group.code} " if group.code else ""
        remedy = f" ({group.remedy})" if group.remedy else ""
        nodes = [
            f"{record.node} ({record.op_type}{f', {as_count(record.macs)}' if record.macs else ''})"
            for record in group.nodes
        ]
        report.item(f"{code}{group.reason}{remedy}", nodes, indent=13)


def _report_node(report: Report, told: NodeExplanation) -> None:
    report.line(f"node         {told.name} ({told.op_type})")
    if told.op_type in ("QuantizeLinear", "DequantizeLinear"):
        runs = "between floats and integers"
    elif told.integer:
        runs = f"in integers, as {told.kernel}"
        if any(tensor.role == "weight" and not tensor.grid for tensor in told.tensors):
            runs += ": the runtime quantizes its float weight by itself"
    else:
        runs = "in float"
    report.line(f"runs         {runs}")
    report.line()
    rows = [(grid.role, grid.grid or "no grid", grid.range, grid.tensor) for grid in told.tensors]
    report.table(("tensor", "grid", "range", "name"), rows)
    if told.chain:
        report.line()
        report.line("what led there, the nearest first:")
        for cause in told.chain:
            maker = f"computed by {cause.op_type} '{cause.node}': " if cause.node else ""
            report.item(f"'{cause.tensor}' has no grid; {maker}{cause.reason}", ())
    if told.diagnostics:
        report.line()
        for finding in told.diagnostics:
            report.line(str(finding))
