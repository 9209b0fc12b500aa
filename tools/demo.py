"""``qat2int8 demo``: the main job on a bundled network, measured on real digits."""

from __future__ import annotations

import importlib.resources
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qat2int8.tools.console import Debug, Json, Quiet, Report, Verbose
from qat2int8.tools.page import Page

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["demo"]

_ROUNDS = 30
_BATCH = 100
_CALIBRATED = 100
_REPORTED = 20
"""Samples a batch in the report, whose spread is that of batches."""


def demo(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Keep the models and the digits there, with a report, report.html.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Convert the bundled residual network, trained on MNIST with fake quantization, and measure the result.

    Beside it stands its float twin, quantized after training on some of the digits.
    """
    import numpy as np

    from qat2int8.pipelines.convert import convert
    from qat2int8.pipelines.quantize import quantize
    from qat2int8.pipelines.sessions import reference_session, run_session, session
    from qat2int8.pipelines.target_files import NATIVE
    from qat2int8.tools.convert import report_conversion, report_float

    report = Report(json=json, quiet=quiet, verbose=verbose)
    if output is not None:
        _make(output)
    data = importlib.resources.files("qat2int8.tools.demo_data")
    with importlib.resources.as_file(data) as folder, tempfile.TemporaryDirectory() as scratch:
        qat, fp32 = folder / "resnet_trt_qat.onnx", folder / "resnet_trt_fp32.onnx"
        with np.load(folder / "mnist500.npz") as digits:
            images = digits["images"].astype(np.float32)[:, None] / np.float32(255.0)
            labels = digits["labels"]
        place = output or Path(scratch)
        int8 = place / "resnet_int8.onnx"
        conversion = convert(qat, target=NATIVE)
        conversion.save(int8)
        calibrated = place / "resnet_calibrated.onnx"
        quantize(fp32, {"image": images[:_CALIBRATED]}, target=NATIVE).save(calibrated)

        report.line(
            f"A residual network trained on MNIST with fake quantization on the inputs of Conv\n"
            f"and Gemm only ({qat.name}), and {len(labels)} test digits it has not seen.\n"
            f"Its float twin ({fp32.name}), quantized on {_CALIBRATED} of them, as well."
        )
        report.line()
        runners = {
            "float": session(fp32, threads=1),
            "fake quant, as exported": session(qat, threads=1),
            "int8, converted": session(int8, threads=1),
            "int8, post-training": session(calibrated, threads=1),
        }
        answers = {name: run_session(runner, {"image": images})[0].argmax(1) for name, runner in runners.items()}
        # The reference of fidelity is the fake-quant model as trained: node by node, nothing optimised.
        trained = run_session(reference_session(qat), {"image": images})[0].argmax(1)
        answers["fake quant, as exported"] = trained
        milliseconds = _interleaved(
            {name: partial(run_session, runner, {"image": images[:_BATCH]}) for name, runner in runners.items()}
        )
        base = milliseconds["float"]
        rows = [
            (
                name,
                f"{_percent(answers[name] == labels):.2f} %",
                f"{_percent(answers[name] == trained):.2f} %",
                f"{milliseconds[name]:.2f}",
                f"{base / milliseconds[name]:.2f}x",
            )
            for name in runners
        ]
        headers = ("model", "top-1", "same as trained", f"ms per {_BATCH}", "speed")
        report.table(headers, rows, right=(1, 2, 3, 4))
        report.line()
        fidelity = conversion.fidelity_on([{"image": images}], "MNIST")
        certificate = conversion.certificate
        report_conversion(report, conversion, fidelity)
        report_float(report, conversion)
        report.data(
            {
                "rows": [dict(zip(headers, row, strict=True)) for row in rows],
                "certificate": certificate.as_dict(),
                "fidelity": fidelity.as_dict(),
            }
        )
        if output is not None:
            samples = output / "digits.npz"
            np.savez_compressed(samples, image=images, labels=labels)
            page = Page(output / "report.html", str(samples), batch_size=_REPORTED, beside=(fp32, calibrated))
            document, _ = page.write(int8, qat, silent=report.silent)
            report.line()
            page.tell(report, document)


def _make(folder: Path) -> None:
    from qat2int8.ir import OutputError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot be made: {error.strerror or error}", where=str(folder), remedy="name a folder"
        ) from error


def _percent(hits: npt.NDArray[np.bool_]) -> float:
    return 100.0 * float(hits.mean())


def _interleaved(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each, measured in turns so that a busy machine disturbs all alike."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_ROUNDS):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            samples[name].append(1000.0 * (time.perf_counter() - started))
    return {name: statistics.median(times) for name, times in samples.items()}
