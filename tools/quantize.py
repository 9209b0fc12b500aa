"""``qat2int8 quantize``: from a float model and some samples to an INT8 model and its evidence."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qat2int8.tools.console import Debug, Json, Quiet, Report, Verbose
from qat2int8.tools.convert import deliver, fidelity_of
from qat2int8.tools.options import (
    BatchSize,
    Calibrating,
    Data,
    FidelityFlag,
    Format,
    OnMissingScale,
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
    from qat2int8.pipelines.tables import CalibrationTable

__all__ = ["quantize"]


def quantize(
    context: typer.Context,
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL", help="The float model.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where to write the INT8 model.", show_default=False),
    ] = None,
    data: Data = "",
    table: Annotated[
        Path | None,
        typer.Option(
            metavar="TABLE",
            help="Ranges that were calibrated before; with --data a cache, used if it fits and written if not.",
        ),
    ] = None,
    trust_table: Annotated[
        bool, typer.Option("--trust-table", help="Take a table of another model, by the names of tensors.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="These options as YAML; what the command line says comes first."),
    ] = None,
    calibrator: Calibrating = "entropy",
    samples: Samples = None,
    batch_size: BatchSize = 1,
    threads: Threads = 0,
    target: TargetName = "ort-x86",
    per_channel: Annotated[
        bool,
        typer.Option("--per-channel/--per-tensor", help="A step per output channel of weights, or one for each."),
    ] = True,
    symmetric: Annotated[
        bool,
        typer.Option(
            "--symmetric/--asymmetric", help="Whether activations have as many levels below zero as above."
        ),
    ] = False,
    keep_fp32_weights: Annotated[
        bool,
        typer.Option("--keep-fp32-weights", help="Leave weights in float; the runtime quantizes them on loading."),
    ] = False,
    skip_first_conv: Annotated[
        bool, typer.Option("--skip-first-conv", help="Leave the first Conv in float.")
    ] = False,
    bias_correction: Annotated[
        bool,
        typer.Option("--bias-correction", help="Keep mean and spread of each channel of the quantized weights."),
    ] = False,
    quantize_ops: QuantizeOps = "",
    skip_node: SkipNode = None,
    on_missing_scale: OnMissingScale = "error",
    relu_encoding: ReluEncoding = "",
    format: Format = "",
    pipeline: Annotated[
        str,
        typer.Option(metavar="PIPELINE", help="A shipped pipeline's name, a .yaml file, or pipeline text."),
    ] = "post-training",
    verify: Verify = "checker",
    require_int8: RequireInt8 = None,
    fidelity: FidelityFlag = True,
    report_file: ReportFile = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Turn a float model into a real INT8 model, on ranges from data or a table.

    Prints what changed, how much of it onnxruntime runs in integers, how closely the result follows the float
    model, and what stayed in float and why.
    """
    from qat2int8.ir.io import check_output_path
    from qat2int8.pipelines.quantize import quantize as quantize_model
    from qat2int8.pipelines.quantize_config import QuantizeConfig
    from qat2int8.pipelines.tables import write_table

    report = Report(json=json, quiet=quiet, verbose=verbose)
    started = time.perf_counter()
    given = {
        "model": None if model is None else str(model),
        "output": None if output is None else str(output),
        "data": data or None,
        "table": None if table is None else str(table),
        "trust_table": trust_table,
        "calibrator": calibrator,
        "samples": samples,
        "batch_size": batch_size,
        "threads": threads,
        "target": target,
        "per_channel": per_channel,
        "symmetric": symmetric,
        "keep_fp32_weights": keep_fp32_weights,
        "skip_first_conv": skip_first_conv,
        "bias_correction": bias_correction,
        "quantize_ops": names_of(quantize_ops),
        "skip_nodes": skip_node or [],
        "on_missing_scale": on_missing_scale,
        "relu_encoding": relu_encoding or None,
        "format": format or None,
        "pipeline": pipeline,
        "verify": verify,
        "require_int8": require_int8,
    }
    said = {name for name in given if _is_said(context, "skip_node" if name == "skip_nodes" else name)}
    settings = QuantizeConfig.read(config) if config is not None else QuantizeConfig()
    settings = settings.model_copy(update={k: v for k, v in given.items() if k in said or config is None})
    source, written = settings.files()
    check_output_path(written, source=source)
    page = None
    if report_file is not None:
        page = Page(report_file, settings.data, batch_size=settings.batch_size)
        page.check(source, written, None if settings.table is None else Path(settings.table), config)
    with progress(quiet or json) as shown:
        known, why_not = _known_ranges(settings, source)
        if why_not:
            report.line(f"calibrating  {why_not}")
        conversion = quantize_model(
            source,
            None if known is not None else settings.data,
            table=known,
            **settings.options_of_quantize(),
            on_batch=shown.on_batch,
            observers=shown.observers,
        )
        # What onnxruntime refuses to load is not written at all.
        conversion.certificate  # noqa: B018
        compared = fidelity_of(conversion) if fidelity else None
        conversion.save(written)
    if why_not and conversion.calibration is not None and settings.table is not None:
        write_table(conversion.calibration, settings.table)
    seconds = time.perf_counter() - started
    deliver(report, conversion, compared, source, written, seconds, settings.require_int8, page=page)


def _is_said(context: typer.Context, name: str) -> bool:
    """Whether the command line names an option, be it with the value it has by itself."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _known_ranges(settings: Any, source: Path) -> tuple[CalibrationTable | None, str]:
    """The table that was given, if it is to be used; and why it is not, where data could replace it.

    Raises:
        DataError: it cannot be read, and there are no data.
    """
    from qat2int8.ir import load_model
    from qat2int8.pipelines.calibration import parse_algorithm
    from qat2int8.pipelines.tables import read_table, reusable

    if settings.table is None:
        return None, ""
    if settings.data is None:
        return read_table(settings.table), ""
    graph = load_model(source)
    return reusable(
        settings.table,
        model_digest=graph.digest(),
        algorithm=str(parse_algorithm(settings.calibrator)),
        tensors=graph.values().keys(),
    )
