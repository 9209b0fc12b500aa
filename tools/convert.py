"""``qat2int8 convert``: the main job, from a model with fake quantization to an INT8 model and its evidence."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qat2int8.pipelines.figures import as_bytes, as_count, as_percent
from qat2int8.tools.console import Debug, Json, Quiet, Report, Verbose
from qat2int8.tools.evidence import report_certificate, report_overflow
from qat2int8.tools.options import (
    BatchSize,
    Calibrating,
    Data,
    FidelityFlag,
    Format,
    OnMissingScale,
    Output,
    QuantizeOps,
    ReluEncoding,
    ReportFile,
    RequireInt8,
    Samples,
    SkipNode,
    TargetName,
    Threads,
    Verify,
    names_of,
)
from qat2int8.tools.page import Page
from qat2int8.tools.progress import progress

if TYPE_CHECKING:
    from qat2int8.ir import DataError, Diagnostic
    from qat2int8.pipelines.convert import Conversion
    from qat2int8.pipelines.fidelity import Fidelity
    from qat2int8.pipelines.tables.table import CalibrationTable

__all__ = ["convert", "deliver", "fidelity_of", "report_conversion", "report_float"]

_REQUIREMENT_NOT_MET = 1


def convert(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="The model with fake quantization.", show_default=False)
    ],
    output: Output,
    target: TargetName = "ort-x86",
    quantize_ops: QuantizeOps = "",
    skip_node: SkipNode = None,
    on_missing_scale: OnMissingScale = "error",
    relu_encoding: ReluEncoding = "",
    exact_weights: Annotated[
        bool,
        typer.Option(
            "--exact-weights",
            help="Keep the zero point of uint8 weights that do not fit int8 around 0, at the cost of speed.",
        ),
    ] = False,
    narrow_16_bit: Annotated[
        bool,
        typer.Option("--narrow-16-bit", help="Put 16-bit grids, which no kernel computes, on 8-bit grids."),
    ] = False,
    format: Format = "",
    fp32_out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the float model: fake quants removed, layers fused."),
    ] = None,
    pipeline: Annotated[
        str,
        typer.Option(metavar="PIPELINE", help="A shipped pipeline's name, a .yaml file, or pipeline text."),
    ] = "qat-to-int8",
    data: Data = "",
    calibrator: Calibrating = "entropy",
    samples: Samples = None,
    batch_size: BatchSize = 1,
    threads: Threads = 0,
    verify: Verify = "checker",
    require_int8: RequireInt8 = None,
    fidelity: FidelityFlag = True,
    report_file: ReportFile = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Turn a model trained with fake quantization into a real INT8 model.

    Prints what changed, how much of it runs in integers, how closely the result follows its source, and what
    stayed in float and why.
    """
    from qat2int8.ir.io import check_output_path
    from qat2int8.pipelines.convert import convert as convert_model

    report = Report(json=json, quiet=quiet, verbose=verbose)
    started = time.perf_counter()
    check_output_path(output, source=model)
    if fp32_out is not None:
        check_output_path(fp32_out, source=model)
        _check_apart(fp32_out, output)
    page = Page(report_file, data or None, batch_size=batch_size) if report_file is not None else None
    if page is not None:
        page.check(model, output, fp32_out)
    with progress(quiet or json) as shown:
        conversion = convert_model(
            model,
            target=target,
            pipeline=pipeline,
            quantize_ops=names_of(quantize_ops),
            skip_nodes=skip_node or (),
            on_missing_scale=on_missing_scale,
            narrow_16_bit=narrow_16_bit,
            format=format or None,
            options=_pass_options(relu_encoding, exact_weights=exact_weights),
            data=data or None,
            calibrator=calibrator,
            samples=samples,
            batch_size=batch_size,
            threads=threads,
            on_batch=shown.on_batch,
            verify=verify,
            observers=shown.observers,
        )
        in_float = convert_model(model, pipeline="qat-to-fp32", verify=verify) if fp32_out is not None else None
        # What onnxruntime refuses to load is not written at all.
        conversion.certificate  # noqa: B018
        compared = fidelity_of(conversion) if fidelity else None
        if in_float is not None and fp32_out is not None:
            in_float.save(fp32_out)
        conversion.save(output)
    seconds = time.perf_counter() - started
    deliver(report, conversion, compared, model, output, seconds, require_int8, fp32_out, page)


def deliver(
    report: Report,
    conversion: Conversion,
    compared: Fidelity | DataError | None,
    source: Path,
    output: Path,
    seconds: float,
    require_int8: float | None,
    fp32_out: Path | None = None,
    page: Page | None = None,
) -> None:
    """Tell everything about a conversion that has been written to ``output``.

    Args:
        page: the report to write on it.

    Raises:
        typer.Exit: with 1, when less than ``require_int8`` percent is integer.
    """
    from qat2int8.pipelines.fidelity import Fidelity

    certificate = conversion.certificate
    percent = certificate.integer_macs_percent
    met = require_int8 is None or percent >= require_int8
    written = _file_bytes(output)
    calibration = conversion.calibration
    report.data(
        {
            "source": str(source),
            "output": str(output),
            "fp32_output": str(fp32_out) if fp32_out is not None else None,
            "report": str(page.file) if page is not None else None,
            "target": conversion.target.name,
            "pipeline": str(conversion.pipeline),
            "calibration": None
            if calibration is None
            else {
                "algorithm": calibration.algorithm,
                "samples": calibration.samples,
                "tensors": len(calibration.entries),
            },
            "seconds": seconds,
            "bytes": {"before": conversion.source_bytes, "after": written},
            "nodes": {"before": conversion.before, "after": conversion.after},
            "certificate": certificate.as_dict(),
            "fidelity": compared.as_dict() if isinstance(compared, Fidelity) else None,
            "diagnostics": [finding.as_dict() for finding in conversion.diagnostics],
            "requirement_met": met,
        }
    )
    report_conversion(report, conversion, compared)
    if calibration is not None:
        report.line(f"calibrated   {_calibrated(calibration)}")
    report.line(f"size         {as_bytes(conversion.source_bytes)} -> {as_bytes(written)}")
    report.line(f"written      {output} for {conversion.target.name} in {seconds:.1f} s")
    if fp32_out is not None:
        report.line(f"             {fp32_out}, the float model")
    report_float(report, conversion)
    report.findings(_not_told(conversion))
    if page is not None:
        report.line()
        document, _ = page.write(output, source, silent=report.silent)
        page.tell(report, document)
    if not met:
        sys.stderr.write(
            f"requirement not met: {as_percent(percent)} of multiply-accumulates are integer, "
            f"{require_int8:g} % required\n"
        )
        raise typer.Exit(_REQUIREMENT_NOT_MET)


def _calibrated(table: CalibrationTable) -> str:
    tensors = f"{len(table.entries)} tensor{'s' if len(table.entries) != 1 else ''}"
    algorithm = table.algorithm or table.origin or "an algorithm that the table does not name"
    return f"{tensors} by {algorithm}" + (f" over {table.samples} samples" if table.samples else "")


def report_conversion(report: Report, conversion: Conversion, compared: Fidelity | DataError | None) -> None:
    """Nodes before and after, what runs in integers, and how faithful it is.

    Args:
        compared: fidelity, why there is none, or None to say nothing about it.
    """
    certificate = conversion.certificate
    report.table(("op", "before", "after"), _op_rows(conversion, full=report.verbose), right=(1, 2))
    report.line()
    report_certificate(report, certificate)
    if compared is not None:
        for index, text in enumerate(_fidelity_lines(compared, conversion.reference)):
            report.line(f"{'' if index else 'fidelity':13}{text}")
        if report.verbose and not isinstance(compared, Exception):
            _report_levels(report, compared)
    report_overflow(report, conversion.diagnostics)


def report_float(report: Report, conversion: Conversion) -> None:
    """What stayed in float, by reason."""
    certificate = conversion.certificate
    in_float = certificate.float_compute
    if not in_float:
        report.line("left float   no Conv, Gemm or MatMul")
        return
    report.line(f"left float   {len(in_float)} of {len(certificate.compute)} Conv, Gemm and MatMul nodes:")
    by_reason: dict[str, list[str]] = {}
    reasons = {finding.node: finding for finding in conversion.diagnostics if finding.code in _REASONS}
    for record in in_float:
        node = f"{record.node} ({as_count(record.macs)})"
        by_reason.setdefault(_why(reasons.get(record.node)), []).append(node)
    for reason, nodes in by_reason.items():
        report.item(reason, nodes, indent=13)


_WORST = 8
"""Tensors told of in detail."""
_DOUBTFUL_DB = 15.0
"""Below this, answers change; made-up inputs may be to blame, or a grid."""
_REASONS = ("Q301", "Q302", "Q303", "Q304")


def _op_rows(conversion: Conversion, *, full: bool) -> list[tuple[str, object, object]]:
    """Op types with counts before and after: those that changed, the others in one row unless ``full``."""
    before, after = conversion.before, conversion.after
    kinds = sorted({*before, *after}, key=lambda kind: (-after.get(kind, 0), -before.get(kind, 0), kind))
    shown = [kind for kind in kinds if full or before.get(kind) != after.get(kind)]
    rows: list[tuple[str, object, object]] = [
        (kind, before.get(kind, "-"), after.get(kind, "-")) for kind in shown
    ]
    same = [before[kind] for kind in kinds if kind not in shown]
    if same:
        rows.append((f"{len(same)} others", sum(same), sum(same)))
    return [*rows, ("all", sum(before.values()), sum(after.values()))]


def fidelity_of(conversion: Conversion) -> Fidelity | DataError:
    """What is measured, or why it could not be: made-up inputs need not suit every model."""
    from qat2int8.ir import DataError, UnsupportedModel

    try:
        return conversion.fidelity
    except (DataError, UnsupportedModel) as error:
        return DataError(error.what)


def _report_levels(report: Report, compared: Fidelity) -> None:
    """The integer tensors that are farthest from training, both ways of comparing them."""
    if compared.levels is None or compared.local_levels is None:
        return
    pairs = zip(compared.levels.tensors, compared.local_levels.tensors, strict=True)
    worst = sorted(pairs, key=lambda pair: (pair[0].within_one_percent, -pair[0].largest))[:_WORST]
    report.line()
    report.table(
        ("integers of", "within 1 LSB", "largest", "layer by layer", "largest"),
        [
            (
                whole.tensor,
                as_percent(whole.within_one_percent),
                f"{whole.largest:.0f}",
                as_percent(local.within_one_percent),
                f"{local.largest:.0f}",
            )
            for whole, local in worst
        ],
        right=(1, 2, 3, 4),
    )
    report.line()


def _fidelity_lines(compared: Fidelity | DataError, reference: str) -> tuple[str, ...]:
    from qat2int8.pipelines.fidelity import Fidelity

    if not isinstance(compared, Fidelity):
        return "not measured on synthetic inputs", f"({compared})"
    worst = compared.sqnr_db
    if math.isnan(worst):
        first = "unknown: the outputs hold NaN or infinities"
    elif math.isinf(worst):
        first = f"identical to the {reference} model"
    else:
        first = f"{worst:.1f} dB against the {reference} model"
    if compared.same_argmax_percent is not None and math.isfinite(worst):
        first += f", same answer on {as_percent(compared.same_argmax_percent)}"
    doubt = "; low: measure it on your data" if worst < _DOUBTFUL_DB else ""
    lines = first, f"({compared.data} inputs: {compared.samples}{doubt})"
    if compared.levels is None or compared.local_levels is None:
        return lines
    whole, local = (one.within_one_percent for one in (compared.levels, compared.local_levels))
    levels = f"integers within 1 LSB: {as_percent(whole)} end to end, {as_percent(local)} layer by layer"
    return lines[0], levels, lines[1]


def _why(finding: Diagnostic | None) -> str:
    if finding is None:
        return "the runtime did not fuse it"
    reason = finding.reason.split(": ", 1)[-1]
    return f"{reason} ({finding.remedy})" if finding.remedy else reason


def _not_told(conversion: Conversion) -> list[Diagnostic]:
    """The findings that are not behind a line of "left float" already."""
    in_float = {record.node for record in conversion.certificate.float_compute}
    return [
        finding
        for finding in (*conversion.diagnostics, *conversion.certificate.broken_rules)
        if not (finding.code in _REASONS and finding.node in in_float)
    ]


def _pass_options(relu_encoding: str, *, exact_weights: bool) -> dict[str, dict[str, Any]]:
    """What options of the command set in passes."""
    options: dict[str, dict[str, Any]] = {}
    if relu_encoding:
        options["update-relu-output-scales"] = {"encoding": relu_encoding}
    if exact_weights:
        options["centre-weights"] = {"exact": True}
    return options


def _check_apart(fp32_out: Path, output: Path) -> None:
    from qat2int8.ir import OutputError

    if fp32_out.resolve() == output.resolve():
        raise OutputError("--fp32-out and --output are the same file", where=str(output), remedy="name two files")


def _file_bytes(path: Path) -> int:
    data = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)
