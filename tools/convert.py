"""``qat2int8 convert``: the main job, from a model with fake quantization to an INT8 model and its evidence."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qat2int8.tools.console import Debug, Json, Quiet, Report, Verbose

if TYPE_CHECKING:
    from qat2int8.pipelines.convert import Conversion
    from qat2int8.pipelines.observers import Observer

__all__ = ["convert", "report_conversion"]

_REQUIREMENT_NOT_MET = 1


def convert(
    model: Annotated[Path, typer.Argument(help="The model with fake quantization.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where to write the INT8 model.", show_default=False)
    ],
    target: Annotated[str, typer.Option(help="A target's name or .yaml file.")] = "ort-x86",
    quantize_ops: Annotated[
        str, typer.Option(help="Op types to quantize, comma separated (Conv,Gemm); all that can be if not given.")
    ] = "",
    skip_node: Annotated[
        list[str] | None,
        typer.Option(help="Name or '*' pattern of a node to leave in float; can be given more than once."),
    ] = None,
    on_missing_scale: Annotated[
        str, typer.Option(help="For ops of --quantize-ops that lack a scale: 'error', or leave them in 'float'.")
    ] = "error",
    relu_encoding: Annotated[
        str, typer.Option(help="How grids behind a Relu use uint8: same-grid, refine or exact.")
    ] = "",
    fp32_out: Annotated[
        Path | None, typer.Option(help="Also write the float model: fake quants removed, layers fused.")
    ] = None,
    pipeline: Annotated[
        str, typer.Option(help="A shipped pipeline's name, a .yaml file, or pipeline text.")
    ] = "qat-to-int8",
    verify: Annotated[
        str, typer.Option(help="What is checked after each pass: none, structure, checker or numeric.")
    ] = "checker",
    require_int8: Annotated[
        float | None,
        typer.Option(
            help="Exit with 1 unless this percentage of multiply-accumulates is integer.",
            metavar="PCT",
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
    """Turn a model trained with fake quantization into a real INT8 model."""
    from qat2int8.ir.io import check_output_path
    from qat2int8.pipelines.convert import convert as convert_model

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
            options={"update-relu-output-scales": {"encoding": relu_encoding}} if relu_encoding else None,
            verify=verify,
            observers=observers,
        )
        if fp32_out is not None:
            convert_model(model, pipeline="qat-to-fp32").save(fp32_out)
        conversion.save(output)
        certificate = conversion.certificate
        compared = conversion.fidelity if fidelity else None
    seconds = time.perf_counter() - started

    percent = certificate.integer_macs_percent
    met = require_int8 is None or percent >= require_int8
    report.data(
        {
            "source": str(model),
            "output": str(output),
            "target": conversion.target.name,
            "pipeline": str(conversion.pipeline),
            "seconds": seconds,
            "bytes": {"before": _file_bytes(model), "after": _file_bytes(output)},
            "nodes": {"before": conversion.before, "after": conversion.after},
            "certificate": certificate.as_dict(),
            "fidelity": compared.as_dict() if compared is not None else None,
            "diagnostics": [finding.as_dict() for finding in conversion.diagnostics],
            "requirement_met": met,
        }
    )
    report_conversion(report, conversion, compared=compared is not None)
    report.line()
    report.line(f"size         {_bytes(_file_bytes(model))} -> {_bytes(_file_bytes(output))}")
    report.line(f"written      {output} in {seconds:.1f} s")
    report.findings(_not_in_table(conversion))
    if not met:
        sys.stderr.write(
            f"requirement not met: {percent:.1f} % of multiply-accumulates are integer, "
            f"{require_int8:g} % required\n"
        )
        raise typer.Exit(_REQUIREMENT_NOT_MET)


def report_conversion(report: Report, conversion: Conversion, *, compared: bool = True) -> None:
    """Nodes before and after, what runs in integers, how faithful it is, and what stayed float and why."""
    certificate = conversion.certificate
    kinds = sorted(
        {*conversion.before, *conversion.after},
        key=lambda kind: (-conversion.after.get(kind, 0), -conversion.before.get(kind, 0), kind),
    )
    rows = [(kind, conversion.before.get(kind, "-"), conversion.after.get(kind, "-")) for kind in kinds]
    report.table(("op", "before", "after"), rows, right=(1, 2))
    report.line()
    report.line(
        f"certificate  {certificate.integer_macs_percent:.1f} % of {_millions(certificate.macs)} "
        f"multiply-accumulates and {certificate.integer_nodes_percent:.1f} % of nodes"
    )
    report.line(f"             run in integers on {certificate.runtime}")
    if compared:
        fidelity = conversion.fidelity
        same = fidelity.same_argmax_percent
        answer = f", same answer on {same:.1f} %" if same is not None else ""
        report.line(f"fidelity     {fidelity.sqnr_db:.1f} dB against the fake-quant model{answer}")
        report.line(f"             ({fidelity.data} inputs: {fidelity.samples})")
    in_float = certificate.float_compute
    if not in_float:
        report.line("left float   no Conv, Gemm or MatMul")
        return
    report.line(f"left float   {len(in_float)} of {len(certificate.compute)} Conv, Gemm and MatMul nodes:")
    report.line()
    reasons = {finding.node: finding for finding in conversion.diagnostics if finding.code in _REASONS}
    shown = in_float if report.verbose else in_float[:_SHOWN_NODES]
    report.table(
        ("node", "MACs", "why"),
        [(record.node, _millions(record.macs), _why(reasons.get(record.node))) for record in shown],
        right=(1,),
    )
    if in_float[len(shown) :]:
        report.line(f"... and {len(in_float) - len(shown)} more (see them with --verbose)")


_SHOWN_NODES = 10
_REASONS = ("Q301", "Q302", "Q303", "Q304")


def _why(finding: Any) -> str:
    if finding is None:
        return "the runtime did not fuse it"
    reason: str = finding.reason.split(": ", 1)[-1]
    return f"{reason} ({finding.remedy})" if finding.remedy else reason


def _not_in_table(conversion: Conversion) -> list[Any]:
    in_float = {record.node for record in conversion.certificate.float_compute}
    return [
        finding
        for finding in conversion.diagnostics
        if not (finding.code in _REASONS and finding.node in in_float)
    ]


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


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.2f} M" if count >= 1e4 else str(count)
