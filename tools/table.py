"""``qat2int8 table``: calibration tables shown, converted, compared, merged, and taken out of models."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qat2int8.tools.console import Debug, Json, Quiet, Report, Verbose

if TYPE_CHECKING:
    from qat2int8.pipelines.tables import CalibrationTable, Difference, Entry

__all__ = ["apply_table", "convert_table", "diff_tables", "extract_table", "merge_tables", "show_table"]

Table = Annotated[Path, typer.Argument(metavar="TABLE", help="A table of any format.", show_default=False)]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write the table.", show_default=False)
]
To = Annotated[
    str,
    typer.Option("--to", metavar="FORMAT", help="Its format: qat2int8, tensorrt, dynamic-range or onnxruntime."),
]
Version = Annotated[
    str,
    typer.Option(
        "--trt-version",
        metavar="VERSION",
        help="Version in the header of a TensorRT cache (7000, 8601, 100300); the one it came with if not given.",
    ),
]

_DIFFERENT = 1
_SHOWN_DIFFERENCES = 20


def show_table(
    path: Table, json: Json = False, quiet: Quiet = False, verbose: Verbose = False, debug: Debug = False
) -> None:
    """Show what a table holds, whatever its format."""
    from qat2int8.pipelines.tables.files import FORMATS, parse_table, read_text, recognise

    report = Report(json=json, quiet=quiet, verbose=verbose)
    text = read_text(path)
    format = recognise(text, where=str(path))
    shown = parse_table(text, where=str(path))
    report.line(f"format       {format}, {FORMATS[format].title}")
    report.line(f"algorithm    {shown.algorithm or 'not told'}{f' ({shown.origin})' if shown.origin else ''}")
    report.line(f"samples      {shown.samples or 'not told'}")
    report.line(f"model        {shown.model_digest or 'not told'}")
    kept = sum(entry.statistics is not None for entry in shown.entries.values())
    report.line(f"statistics   {f'of {kept} tensors, so that it can be merged' if kept else 'none'}")
    report.line()
    rows = [(name, *_figures(entry)) for name, entry in shown.entries.items()]
    report.table(("tensor", "from", "to", "amax"), rows, right=(1, 2, 3))
    report.data({"table": str(path), "format": format, **_document(shown)})


def convert_table(
    path: Table,
    output: Output,
    to: To,
    trt_version: Version = "",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Write a table in another format, and say what that format cannot hold."""
    from qat2int8.pipelines.tables.files import read_table

    report = Report(json=json, quiet=quiet, verbose=verbose)
    _write(report, read_table(path), output, to, trt_version, {"table": str(path)})


def diff_tables(
    left: Table,
    right: Annotated[Path, typer.Argument(metavar="OTHER", help="The table to compare with.", show_default=False)],
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", min=0.0, help="Exit with 1 if a range differs by more than this share of its size."
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Compare two tables tensor by tensor, the worst relative difference first."""
    from qat2int8.pipelines.tables import diff
    from qat2int8.pipelines.tables.files import read_table

    report = Report(json=json, quiet=quiet, verbose=verbose)
    one, other = read_table(left), read_table(right)
    found = diff(one, other)
    unequal = [row for row in found if row.relative > 0]
    report.line(f"first        {left}")
    report.line(f"second       {right}")
    for what, mine, others in (
        ("algorithm", one.algorithm, other.algorithm),
        ("model", one.model_digest, other.model_digest),
    ):
        if mine != others:
            report.line(f"{what:13}{mine or 'not told'} and {others or 'not told'}")
    report.line(f"tensors      {len(found)}, {len(found) - len(unequal)} equal")
    if unequal:
        report.line()
        limit = len(unequal) if report.verbose else _SHOWN_DIFFERENCES
        rows = [(row.name, _share(row), _span(row.left), _span(row.right)) for row in unequal[:limit]]
        report.table(("tensor", "differs by", "first", "second"), rows, right=(1,))
        if len(unequal) > limit:
            report.line(f"and {len(unequal) - limit} more (--verbose shows them)")
    worst = max((row.relative for row in found), default=0.0)
    met = tolerance is None or worst <= tolerance
    report.data(
        {
            "left": str(left),
            "right": str(right),
            "differences": [
                {
                    "tensor": row.name,
                    "relative": row.relative,
                    "left": _row(row.left) if row.left is not None else None,
                    "right": _row(row.right) if row.right is not None else None,
                }
                for row in found
            ],
            "requirement_met": met,
        }
    )
    if not met:
        sys.stderr.write(f"requirement not met: tensor '{found[0].name}' differs by {_share(found[0])}\n")
        raise typer.Exit(_DIFFERENT)


def merge_tables(
    paths: Annotated[
        list[Path], typer.Argument(metavar="TABLE...", help="Tables of disjoint samples.", show_default=False)
    ],
    output: Output,
    to: To = "qat2int8",
    trt_version: Version = "",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Merge the tables that were calibrated on parts of the data into the table of all of them."""
    from qat2int8.pipelines.calibration import combine
    from qat2int8.pipelines.tables import merge
    from qat2int8.pipelines.tables.files import read_table

    report = Report(json=json, quiet=quiet, verbose=verbose)
    merged = merge([read_table(path) for path in paths], names=[str(path) for path in paths], combine=combine)
    _write(report, merged, output, to, trt_version, {"tables": [str(path) for path in paths]})


def extract_table(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="With fake quantization, or computing in integers.", show_default=False
        ),
    ],
    output: Output,
    to: To = "qat2int8",
    trt_version: Version = "",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Write the ranges of the activations of a model whose grids are in it already."""
    from qat2int8.pipelines.tables.extraction import extract

    report = Report(json=json, quiet=quiet, verbose=verbose)
    extracted, findings = extract(model)
    _write(report, extracted, output, to, trt_version, {"model": str(model)})
    report.findings(findings)


def apply_table(
    path: Table,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A float model.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="Where to write the INT8 model.", show_default=False),
    ],
    target: Annotated[str, typer.Option(metavar="TARGET", help="A target's name or .yaml file.")] = "ort-x86",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Turn a float model into an INT8 model on the ranges of a table, of whatever format and from whatever model.

    Tensors are matched by name. A table that was calibrated on this very model is what 'quantize --table' takes;
    this takes tables of other tools and of the same network trained otherwise as well.
    """
    from qat2int8.ir.io import check_output_path, load_model
    from qat2int8.pipelines.quantize import quantize
    from qat2int8.pipelines.tables.files import read_table
    from qat2int8.pipelines.tables.spreading import spread
    from qat2int8.tools.convert import report_conversion, report_float

    report = Report(json=json, quiet=quiet, verbose=verbose)
    given = read_table(path)
    check_output_path(output, source=model)
    graph = load_model(model)
    names = graph.values()
    known = sum(name in names for name in given.entries)
    own = given.model_digest == graph.digest()
    ranges = spread(replace(given, model_digest=""), graph)
    del graph
    conversion = quantize(model, table=ranges, target=target)
    certificate = conversion.certificate
    conversion.save(output)
    report_conversion(report, conversion, None)
    report.line(f"table        {path}: {known} of {len(given.entries)} tensors are in the model")
    if not own:
        report.line("             it does not tell this model: tensors are matched by name alone")
    report.line(f"written      {output} for {conversion.target.name}")
    report_float(report, conversion)
    report.findings(conversion.diagnostics)
    report.data(
        {
            "table": str(path),
            "model": str(model),
            "output": str(output),
            "tensors": {"table": len(given.entries), "model": known},
            "same_model": own,
            "certificate": certificate.as_dict(),
            "diagnostics": [finding.as_dict() for finding in conversion.diagnostics],
        }
    )


def _write(
    report: Report, written: CalibrationTable, output: Path, to: str, version: str, source: dict[str, Any]
) -> None:
    from qat2int8.pipelines.tables.files import losses, write_table

    lost = losses(written, to)
    write_table(written, output, to, version=version)
    report.line(f"written      {output}: {len(written.entries)} tensors, {to}")
    for line in lost:
        report.line(f"lost         {line}")
    report.data({**source, "output": str(output), "format": to, "lost": lost, **_document(written)})


def _document(shown: CalibrationTable) -> dict[str, Any]:
    return {
        "algorithm": shown.algorithm,
        "samples": shown.samples,
        "digest": shown.model_digest,
        "origin": shown.origin,
        "tensors": {name: _row(entry) for name, entry in shown.entries.items()},
    }


def _row(entry: Entry) -> dict[str, float]:
    return {"lo": entry.lo, "hi": entry.hi, "amax": entry.amax}


def _figures(entry: Entry) -> tuple[str, str, str]:
    return f"{entry.lo:.6g}", f"{entry.hi:.6g}", f"{entry.amax:.6g}"


def _span(entry: Entry | None) -> str:
    return "-" if entry is None else f"{entry.lo:.6g} to {entry.hi:.6g}"


def _share(row: Difference) -> str:
    if math.isinf(row.relative):
        return "missing"
    return f"{100 * row.relative:.3g} %"
