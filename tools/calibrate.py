"""``qat2int8 calibrate``: the ranges that tensors take on data, as a table."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qat2int8.tools.console import Debug, Json, Quiet, Report, Verbose
from qat2int8.tools.options import BatchSize, Calibrating, Samples, TargetName, Threads
from qat2int8.tools.progress import progress

if TYPE_CHECKING:
    from qat2int8.pipelines.calibration import Calibrator
    from qat2int8.pipelines.tables import CalibrationTable

__all__ = ["calibrate"]


def calibrate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The float model.", show_default=False)],
    data: Annotated[
        str,
        typer.Option(metavar="DATA", help="Samples: a file or folder, or module:function.", show_default=False),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="TABLE", help="Where to write the table.", show_default=False),
    ],
    calibrator: Calibrating = "entropy",
    samples: Samples = None,
    batch_size: BatchSize = 1,
    target: TargetName = "ort-x86",
    threads: Threads = 0,
    shard: Annotated[
        str,
        typer.Option(metavar="I/N", help="Look at part I of N only; 'qat2int8 table merge' joins the parts."),
    ] = "",
    keep_statistics: Annotated[
        bool,
        typer.Option(
            "--keep-statistics",
            help="Keep in the table what its ranges were computed from, so that it can be merged.",
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from TABLE.part, which an interrupted run has left.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Find the ranges that the tensors of a float model take on data.

    The table serves 'qat2int8 quantize --table', now or on another machine. Ctrl-C keeps what was seen so far.
    """
    from qat2int8.ir import DataError
    from qat2int8.ir.io import check_output_path
    from qat2int8.pipelines.calibration import Calibrator
    from qat2int8.pipelines.data import open_data
    from qat2int8.pipelines.tables import read_table, write_table

    report = Report(json=json, quiet=quiet, verbose=verbose)
    started = time.perf_counter()
    check_output_path(output, source=model)
    part, of = _shard(shard)
    unfinished = output.with_name(f"{output.name}.part")
    if resume and not unfinished.exists():
        raise DataError("there is nothing to go on from", where=str(unfinished), remedy="leave --resume out")
    with progress(quiet or json) as shown:
        calibrating = Calibrator(
            model,
            calibrator,
            target=target,
            resume=read_table(unfinished) if resume else None,
            threads=threads,
            observers=shown.observers,
        )
        opened = open_data(data, calibrating.inputs, batch_size=batch_size, samples=samples)
        opened = opened.shard(part, of) if shard else opened
        try:
            calibrating.run(opened, on_batch=shown.on_batch)
        except BaseException as error:
            _keep(calibrating, unfinished, error)
            raise
        table = calibrating.compute(keep_statistics=keep_statistics or bool(shard))
    write_table(table, output)
    unfinished.unlink(missing_ok=True)

    seconds = time.perf_counter() - started
    for note in opened.notes:
        report.line(f"note         {note}")
    if verbose:
        _report_ranges(report, table, calibrating)
    report.line(
        f"calibrated   {len(table.entries)} tensors by {table.algorithm} over {table.samples} samples "
        f"of {opened.name}"
    )
    report.line(f"written      {output} in {seconds:.1f} s")
    report.data(
        {
            "source": str(model),
            "output": str(output),
            "algorithm": table.algorithm,
            "samples": table.samples,
            "model": table.model_digest,
            "tensors": {name: {"lo": e.lo, "hi": e.hi, "amax": e.amax} for name, e in table.entries.items()},
            "seconds": seconds,
        }
    )


def _shard(text: str) -> tuple[int, int]:
    """``(2, 5)`` of "2/5"; ``(1, 1)`` of nothing.

    Raises:
        DataError: something else.
    """
    from qat2int8.ir import DataError

    found = re.fullmatch(r"([0-9]+)/([0-9]+)", text or "1/1")
    if found is None:
        raise DataError(
            f"'{text}' is not a part of all", where="--shard", remedy="write 2/5 for the second of five"
        )
    return int(found[1]), int(found[2])


def _keep(calibrating: Calibrator, path: Path, error: BaseException) -> None:
    """Write what was seen before ``error``, and say how to go on."""
    from qat2int8.pipelines.tables import write_table

    if not len(calibrating.statistics):
        return
    table = calibrating.compute(keep_statistics=True)
    write_table(table, path)
    note = f"{table.samples} samples are kept in {path}: rerun with --resume to go on from there"
    if isinstance(error, KeyboardInterrupt):  # of which nothing but the exit code reaches whoever prints errors
        sys.stderr.write(f"{note}\n")
    else:
        error.add_note(note)


def _report_ranges(report: Report, table: CalibrationTable, calibrating: Calibrator) -> None:
    seen = calibrating.statistics.tensors
    report.table(
        ("tensor", "range", "seen"),
        [
            (name, f"{entry.lo:.6g} to {entry.hi:.6g}", f"{seen[name].lo:.6g} to {seen[name].hi:.6g}")
            for name, entry in table.entries.items()
        ],
    )
    report.line()
