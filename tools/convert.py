"""``qat2int8 convert``: the main job, from a model with fake quantization to an INT8 model and its evidence."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qat2int8.tools.console import Debug, Json, Quiet, Report, Verbose
from qat2int8.tools.evidence import report_certificate
from qat2int8.tools.figures import as_bytes, as_count, as_percent

if TYPE_CHECKING:
    from qat2int8.ir import DataError, Diagnostic
    from qat2int8.pipelines.convert import Conversion
    from qat2int8.pipelines.fidelity import Fidelity
    from qat2int8.pipelines.observers import Observer

__all__ = ["convert", "report_conversion", "report_float"]

_REQUIREMENT_NOT_MET = 1


def convert(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="The model with fake quantization.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="Where to write the INT8 model.", show_default=False),
    ],
    target: Annotated[str, typer.Option(metavar="TARGET", help="A target's name or .yaml file.")] = "ort-x86",
    quantize_ops: Annotated[
        str,
        typer.Option(
            metavar="OPS", help="Op types to quantize, comma separated (Conv,Gemm); all that can be if not given."
        ),
    ] = "",
    skip_node: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NODE", help="Name or '*' pattern of a node to leave in float; can be given more than once."
        ),
    ] = None,
    on_missing_scale: Annotated[
        str,
        typer.Option(metavar="error|float", help="What becomes of an op of --quantize-ops that has no scale."),
    ] = "error",
    relu_encoding: Annotated[
        str,
        typer.Option(metavar="ENCODING", help="How grids behind a Relu use uint8: exact, refine or same-grid."),
    ] = "",
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
    format: Annotated[
        str,
        typer.Option(
            metavar="qdq|qoperator",
            help="Form of the result: Q/DQ around float ops, or operators that compute on integers; "
            "qdq unless the pipeline says otherwise.",
        ),
    ] = "",
    fp32_out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the float model: fake quants removed, layers fused."),
    ] = None,
    pipeline: Annotated[
        str,
        typer.Option(metavar="PIPELINE", help="A shipped pipeline's name, a .yaml file, or pipeline text."),
    ] = "qat-to-int8",
    verify: Annotated[
        str,
        typer.Option(
            metavar="LEVEL", help="What is checked after each pass: none, structure, checker or numeric."
        ),
    ] = "checker",
    require_int8: Annotated[
        float | None,
        typer.Option(
            help="Exit with 1 unless this percentage of multiply-accumulates is integer.",
            metavar="PERCENT",
            min=0.0,
            max=100.0,
        ),
    ] = None,
    fidelity: Annotated[bool, typer.Option(help="Compare the result with its source on synthetic inputs.")] = True,
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
    from qat2int8.pipelines.fidelity import Fidelity

    report = Report(json=json, quiet=quiet, verbose=verbose)
    started = time.perf_counter()
    check_output_path(output, source=model)
    if fp32_out is not None:
        check_output_path(fp32_out, source=model)
        _check_apart(fp32_out, output)
    with _progress(quiet or json) as observers:
        conversion = convert_model(
            model,
            target=target,
            pipeline=pipeline,
            quantize_ops=[op.strip() for op in quantize_ops.split(",") if op.strip()],
            skip_nodes=skip_node or (),
            on_missing_scale=on_missing_scale,
            narrow_16_bit=narrow_16_bit,
            format=format or None,
            options=_pass_options(relu_encoding, exact_weights=exact_weights),
            verify=verify,
            observers=observers,
        )
        in_float = convert_model(model, pipeline="qat-to-fp32", verify=verify) if fp32_out is not None else None
        # What onnxruntime refuses to load is not written at all.
        certificate = conversion.certificate
        compared = _fidelity(conversion) if fidelity else None
        if in_float is not None and fp32_out is not None:
            in_float.save(fp32_out)
        conversion.save(output)
    seconds = time.perf_counter() - started

    percent = certificate.integer_macs_percent
    met = require_int8 is None or percent >= require_int8
    written = _file_bytes(output)
    report.data(
        {
            "source": str(model),
            "output": str(output),
            "fp32_output": str(fp32_out) if fp32_out is not None else None,
            "target": conversion.target.name,
            "pipeline": str(conversion.pipeline),
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
    report.line(f"size         {as_bytes(conversion.source_bytes)} -> {as_bytes(written)}")
    report.line(f"written      {output} for {conversion.target.name} in {seconds:.1f} s")
    if fp32_out is not None:
        report.line(f"             {fp32_out}, the float model")
    report_float(report, conversion)
    report.findings(_not_told(conversion))
    if not met:
        sys.stderr.write(
            f"requirement not met: {as_percent(percent)} of multiply-accumulates are integer, "
            f"{require_int8:g} % required\n"
        )
        raise typer.Exit(_REQUIREMENT_NOT_MET)


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
        for index, text in enumerate(_fidelity_lines(compared)):
            report.line(f"{'' if index else 'fidelity':13}{text}")
        if report.verbose and not isinstance(compared, Exception):
            _report_levels(report, compared)


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


def _fidelity(conversion: Conversion) -> Fidelity | DataError:
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


def _fidelity_lines(compared: Fidelity | DataError) -> tuple[str, ...]:
    from qat2int8.pipelines.fidelity import Fidelity

    if not isinstance(compared, Fidelity):
        return "not measured on synthetic inputs", f"({compared})"
    worst = compared.sqnr_db
    if math.isnan(worst):
        first = "unknown: the outputs hold NaN or infinities"
    elif math.isinf(worst):
        first = "identical to the fake-quant model"
    else:
        first = f"{worst:.1f} dB against the fake-quant model"
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


@contextlib.contextmanager
def _progress(silent: bool) -> Iterator[Sequence[Observer]]:
    """Observers that show which pass runs, on a terminal; nothing anywhere else."""
    if silent or not sys.stderr.isatty():
        yield ()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from qat2int8.pipelines.observers import Quiet as Silent

    columns = (TextColumn("{task.description:28}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading the model", total=None)

        class Shown(Silent):
            def before(self, model: Any, pass_: Any, position: Any) -> None:
                progress.update(task, description=pass_.name, total=position.total + 1, completed=position.index)

            def finished(self, model: Any, run: Any) -> None:
                progress.update(task, description="certifying")

        yield (Shown(),)


def _file_bytes(path: Path) -> int:
    data = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)
