"""What calibration costs and what comes of it: time and memory beside onnxruntime's, thresholds, accuracy, speed.

Time is that of running and counting all samples and choosing the ranges, over plain float inference of the same
samples, which takes turns with it sample by sample; loading the model is left out on both sides. Memory is the
peak of a process that does nothing else, loading included.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import report
from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

from qat2int8 import Calibrator, quantize
from qat2int8.pipelines.benchmarking import networks, peer
from qat2int8.pipelines.benchmarking.fake_quant import images
from qat2int8.pipelines.benchmarking.sketch import INPUT, Array
from qat2int8.pipelines.benchmarking.stopwatch import caller, interleave, speedup
from qat2int8.pipelines.calibration import ALGORITHMS, parse_algorithm
from qat2int8.pipelines.calibration.statistics import Statistics
from qat2int8.pipelines.sessions import session

OURS, PEER = "qat2int8", "onnxruntime"
METHODS = {"minmax": CalibrationMethod.MinMax, "entropy": CalibrationMethod.Entropy}
DIGITS = {"lenet_trt_fp32": 255.0, "mnist8_fp32": 1.0, "resnet_trt_fp32": 255.0}
"""What the pixels of MNIST are divided by for each model."""
CALIBRATED = 500
"""Test images that are calibrated on; the others are counted."""
SPEED: dict[str, Callable[..., onnx.ModelProto]] = {
    "resnet50": networks.resnet50,
    "mobilenet_v2": networks.mobilenet_v2,
}


class Samples:
    """Smooth random images, one at a time, a hundred different ones.

    With a model, each is run through it before it is handed out, and ``plain`` adds up what that took.
    """

    def __init__(self, count: int, model: Path | None) -> None:
        self._stored, self._count = images(min(count, 100), 224, seed=3), count
        # Threads that spin on after a run would take the processors from what takes turns with it.
        self._session = None if model is None else session(model, yielding=True)
        if self._session is not None:
            self._session.run(None, {INPUT: self._stored[:1]})
        self.plain = 0.0

    def __iter__(self) -> Iterator[Array]:
        for index in range(self._count):
            sample = self._stored[index % len(self._stored)][None]
            if self._session is not None:
                started = time.perf_counter()
                self._session.run(None, {INPUT: sample})
                self.plain += time.perf_counter() - started
            yield sample


class _Reader(peer.Samples):
    def __init__(self, samples: Samples) -> None:
        self._name, self._left = INPUT, iter(samples)


def prepared(tool: str, algorithm: str, model: Path, folder: Path) -> Callable[[Samples], None]:
    """The model loaded; what is left is to run, to count and to choose ranges."""
    if tool == OURS:
        ours = Calibrator(model, algorithm)

        def calibrate(samples: Samples) -> None:
            for sample in samples:
                ours.observe({INPUT: sample})
            ours.compute()

        return calibrate
    theirs = create_calibrator(
        str(model), augmented_model_path=str(folder / "augmented.onnx"), calibrate_method=METHODS[algorithm]
    )

    def collect(samples: Samples) -> None:
        theirs.collect_data(_Reader(samples))
        theirs.compute_data()

    return collect


def measure_one(tool: str, algorithm: str, model: Path, count: int, *, plain: bool) -> dict[str, float]:
    """Seconds and peak memory of one calibration in this process; with ``plain`` inference takes turns with it."""
    with tempfile.TemporaryDirectory() as folder:
        run = prepared(tool, algorithm, model, Path(folder))
        samples = Samples(count, model if plain else None)
        started = time.perf_counter()
        run(samples)
        seconds = time.perf_counter() - started - samples.plain
    peak = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "plain": samples.plain, "peak": peak}


def child(tool: str, algorithm: str, model: Path, count: int, *, plain: bool) -> dict[str, float] | None:
    """:func:`measure_one` in a process of its own; None where it did not come to an end."""
    words = ["--one", tool, algorithm, str(model), str(count), *(["--plain"] if plain else [])]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def costs(model: Path, *, rounds: int, long: int) -> str:
    """The table of time and memory."""
    rows = []
    for algorithm in METHODS:
        ratios: dict[str, list[float]] = {OURS: [], PEER: []}
        for _ in range(rounds):
            for tool in ratios:
                found = child(tool, algorithm, model, 32, plain=True)
                if found is not None:
                    ratios[tool].append(found["seconds"] / found["plain"])
        told = [f"{statistics.median(ratios[tool]):.2f}x" if ratios[tool] else "failed" for tool in (PEER, OURS)]
        rows.append([f"time of {algorithm}, 32 samples", *told])
    for count in (32, long):
        # The peer holds all activations of all samples, some 70 MB each.
        tools = (PEER, OURS) if count == 32 else (OURS,)
        peaks = {tool: child(tool, "entropy", model, count, plain=False) for tool in tools}
        told = [
            "not tried" if (peak := peaks.get(t)) is None else f"{peak['peak'] / 1e9:.2f} GB" for t in (PEER, OURS)
        ]
        rows.append([f"peak memory of entropy, {count} samples", *told])
    return report.table(["ResNet-50", "onnxruntime.quantization", "qat2int8"], rows)


def thresholds() -> str:
    """What each algorithm makes of a normal distribution with one value far away, in three orders of batches."""
    values = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    values[1234] = 40.0
    batches = np.split(values, 20)
    rows = []
    for name in ALGORITHMS:
        chosen = []
        for order in (range(20), reversed(range(20)), np.random.default_rng(1).permutation(20)):
            statistics_ = Statistics.of(["x"], histograms=True)
            for index in order:
                statistics_.add(int(index), 1, {"x": batches[int(index)][None]})
            statistics_.sort()
            chosen.append(parse_algorithm(name).span(statistics_.tensors["x"])[1])
        rows.append([name, f"{chosen[0]:.3f}", "yes" if len(set(chosen)) == 1 else "no"])
    return report.table(["algorithm", "threshold", "same in every order"], rows)


def accuracy(folder: Path) -> str:
    """Top-1 of each algorithm beside the float model."""
    data = np.load(folder / "mnist.npz")
    rows = []
    for name, scale in DIGITS.items():
        path = folder / f"{name}.onnx"
        pixels = data["x_test"].astype(np.float32)[:, None] / np.float32(scale)
        unseen, labels = pixels[CALIBRATED:], data["y_test"][CALIBRATED:]
        exact = _top1(path, unseen, labels)
        row = [name, f"{exact:.2%}"]
        for algorithm in ("entropy", "minmax", "percentile", "mse"):
            with tempfile.TemporaryDirectory() as scratch:
                conversion = quantize(path, pixels[:CALIBRATED], calibrator=algorithm)
                conversion.save(Path(scratch) / "int8.onnx")
                row.append(f"{100 * (_top1(Path(scratch) / 'int8.onnx', unseen, labels) - exact):+.2f}")
        rows.append(row)
    return report.table(["model", "float top-1", "entropy", "minmax", "percentile", "mse"], rows)


def _top1(path: Path, pixels: Array, labels: Array) -> float:
    model = session(path, threads=0)
    put = model.get_inputs()[0]
    size = put.shape[0] if isinstance(put.shape[0], int) else 500
    batches = (pixels[at : at + size] for at in range(0, len(pixels), size))
    answers = [model.run(None, {put.name: batch})[0].reshape(size, -1).argmax(1) for batch in batches]
    return float((np.concatenate(answers) == labels).mean())


def speeds(folder: Path, *, rounds: int) -> str:
    """The float network and its two INT8 twins, calibrated on the same images."""
    rows = []
    for name, build in SPEED.items():
        source, theirs, ours = (folder / f"{name}.{form}.onnx" for form in ("float", "peer", "ours"))
        onnx.save(build(fake_quant=False, bn_folded=True), source)
        samples = images(8, 224)
        peer.quantize(source, theirs, samples)
        quantize(source, {INPUT: samples}).save(ours)
        contenders = {form.name: caller(form, images(1, 224, seed=2)) for form in (source, theirs, ours)}
        runs = interleave(contenders, rounds=rounds, repeat=3)
        rows.append([name, *(f"{speedup(runs, form.name, source.name):.2f}x" for form in (theirs, ours))])
    return report.table(["network", "quantize_static", "qat2int8 quantize"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, help="folder with mnist.npz and float models beside it")
    parser.add_argument("--rounds", type=int, default=3, help="of the time of calibration")
    parser.add_argument("--long", type=int, default=512, help="samples of the long run")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/calibration.md")
    parser.add_argument(
        "--one", nargs=4, metavar=("TOOL", "ALGORITHM", "MODEL", "SAMPLES"), help=argparse.SUPPRESS
    )
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        tool, algorithm, model, count = options.one
        print(json.dumps(measure_one(tool, algorithm, Path(model), int(count), plain=options.plain)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "resnet50.onnx"
        onnx.save(networks.resnet50(fake_quant=False), model)
        parts = [
            costs(model, rounds=options.rounds, long=options.long),
            thresholds(),
            speeds(Path(scratch), rounds=15),
        ]
    told = [
        "Over plain float inference of the same samples, all processors; a ResNet-50 with BatchNormalization.",
        "200,000 values of a standard normal distribution, one of them 40, in 20 batches.",
        "Speed against the float network, batch 1, one thread, interleaved.",
    ]
    if options.models is not None:
        parts.append(accuracy(options.models))
        told.append(
            f"Points of top-1 on 9,500 test images of MNIST, calibrated on the other {CALIBRATED}; per channel."
        )
    text = "\n\n".join(f"{table}\n\n{line}" for table, line in zip(parts, told, strict=True))
    text += f"\n{report.circumstances('onnxruntime', 'qat2int8')}"
    print(text)
    if options.write:
        report.write(report.DOCS / "calibration.md", "measured", text)


if __name__ == "__main__":
    main()
