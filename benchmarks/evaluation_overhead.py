"""What ``qat2int8 evaluate`` takes over the bare loop of ``session.run``: ResNet-50, batch 1, one thread.

Both run the same arrays in turns, sample by sample, so that what slows the machine down for a while slows both.
All that the command does between two samples is evaluation's: checking, running, judging, showing how far it is.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pty
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import report

from qat2int8 import convert
from qat2int8.pipelines.benchmarking import networks
from qat2int8.pipelines.benchmarking.fake_quant import images
from qat2int8.pipelines.benchmarking.sketch import INPUT
from qat2int8.pipelines.sessions import session
from qat2int8.tools.cli import app

WARM_UP = 5
SIZE = 224


class Turns:
    """Data for the command that run the samples bare as well; seconds of both, the first few samples left out."""

    model: ort.InferenceSession
    count = 0

    def samples(self) -> Iterator[tuple[dict[str, npt.NDArray[np.float32]], npt.NDArray[np.int64]]]:
        """One sample at a time; the command's time is what passes until it asks for the next."""
        self.bare, self.evaluated = 0.0, 0.0
        labels = np.random.default_rng(0).integers(0, 1000, (self.count + WARM_UP, 1))
        for number, label in enumerate(labels):
            image = images(1, SIZE, seed=number)
            started = time.perf_counter()
            self.model.run(None, {INPUT: image})
            between = time.perf_counter()
            yield {INPUT: image}, label
            ended = time.perf_counter()
            if number >= WARM_UP:
                self.bare += between - started
                self.evaluated += ended - between


TURNS = Turns()


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """Standard error is a terminal that nobody reads."""
    keeper, screen = pty.openpty()

    def drain() -> None:
        with contextlib.suppress(OSError):
            while os.read(keeper, 1 << 16):
                pass

    threading.Thread(target=drain, daemon=True).start()
    with open(screen, "w") as stream, contextlib.redirect_stderr(stream):
        yield


def overhead(path: Path, *, bar: bool) -> float:
    """Percent of the bare loop's time that the command takes on top.

    Raises:
        SystemExit: the command failed.
    """
    words = ["evaluate", str(path), "--data", f"{__name__}:TURNS.samples"]
    with contextlib.ExitStack() as held:
        if bar:
            held.enter_context(terminal())
        held.enter_context(contextlib.redirect_stdout(held.enter_context(open(os.devnull, "w"))))
        try:
            app(words)
        except SystemExit as ended:
            if ended.code:
                raise
    return 100.0 * (TURNS.evaluated / TURNS.bare - 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=150)
    parser.add_argument("--write", action="store_true", help="put the figures into docs/evaluation.md")
    options = parser.parse_args()
    TURNS.count = options.samples
    rows = []
    with tempfile.TemporaryDirectory() as name:
        paths = {kind: Path(name) / f"{kind}.onnx" for kind in ("qat", "float", "int8")}
        onnx.save(networks.resnet50(), paths["qat"])
        onnx.save(networks.resnet50(fake_quant=False, bn_folded=True), paths["float"])
        convert(paths["qat"]).save(paths["int8"])
        for kind in ("float", "int8"):
            TURNS.model = session(paths[kind], threads=1)
            shares = [f"{overhead(paths[kind], bar=bar):+.1f} %" for bar in (False, True)]
            rows.append([f"ResNet-50, {kind}", f"{1000.0 * TURNS.bare / options.samples:.1f}", *shares])
    head = ["network", "ms a sample, bare", "evaluate", "with the progress bar"]
    text = (
        f"{report.table(head, rows)}\n\n"
        f"Batch 1, one thread, top-k on {options.samples} samples, in turns with the bare loop; load "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.\n"
        f"{report.circumstances('onnxruntime', 'qat2int8')}"
    )
    print(text)
    if options.write:
        report.write(report.DOCS / "evaluation.md", "evaluation-overhead", text)


if __name__ == "__main__":
    main()
