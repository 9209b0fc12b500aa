"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "BatchSize",
    "Calibrating",
    "Data",
    "FidelityFlag",
    "Format",
    "OnMissingScale",
    "Output",
    "QuantizeOps",
    "ReluEncoding",
    "ReportFile",
    "RequireInt8",
    "Samples",
    "SkipNode",
    "TargetName",
    "Threads",
    "Verify",
    "names_of",
]

Output = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="FILE", help="Where to write the INT8 model.", show_default=False),
]
TargetName = Annotated[
    str,
    typer.Option("--target", metavar="TARGET", help="A target's name or .yaml file; native: for this machine."),
]
QuantizeOps = Annotated[
    str,
    typer.Option(
        metavar="OPS", help="Op types to quantize, comma separated (Conv,Gemm); all that can be if not given."
    ),
]
SkipNode = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NODE", help="Name or '*' pattern of a node to leave in float; can be given more than once."
    ),
]
OnMissingScale = Annotated[
    str,
    typer.Option(metavar="error|float", help="What becomes of an op of --quantize-ops that has no scale."),
]
ReluEncoding = Annotated[
    str,
    typer.Option(metavar="ENCODING", help="How grids behind a Relu use uint8: exact, refine or same-grid."),
]
Format = Annotated[
    str,
    typer.Option(
        metavar="qdq|qoperator",
        help="Form of the result: Q/DQ around float ops, or operators that compute on integers; "
        "qdq unless the pipeline says otherwise.",
    ),
]
Verify = Annotated[
    str,
    typer.Option(metavar="LEVEL", help="What is checked after each pass: none, structure, checker or numeric."),
]
RequireInt8 = Annotated[
    float | None,
    typer.Option(
        help="Exit with 1 unless this percentage of multiply-accumulates is integer.",
        metavar="PERCENT",
        min=0.0,
        max=100.0,
    ),
]
FidelityFlag = Annotated[
    bool,
    typer.Option(
        "--fidelity/--no-fidelity", help="Compare the result with its source, on data or inputs made up."
    ),
]
ReportFile = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE",
        help="Also write a report on the result: .html, .md or .json; measured on --data.",
        show_default=False,
    ),
]

Data = Annotated[
    str,
    typer.Option(metavar="DATA", help="Samples to calibrate on: a file or folder, or module:function."),
]
Calibrating = Annotated[
    str,
    typer.Option(
        "--calibrator",
        metavar="ALGORITHM",
        help="entropy, entropy-v1, legacy, percentile, mse, hist, minmax, direct, avg or moving-average; "
        "options as in percentile{percent=99.9}.",
    ),
]
Samples = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="How many samples to use at most; all if not given.")
]
BatchSize = Annotated[int, typer.Option(metavar="N", min=1, help="Samples a run, if the model takes any number.")]
Threads = Annotated[int, typer.Option(metavar="N", min=0, help="Threads of calibration; 0 for all processors.")]


def names_of(text: str) -> list[str]:
    """The names in a comma separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]
