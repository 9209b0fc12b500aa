"""How long conversion takes: the whole command beside onnxruntime's quantizer, and how it grows with the model."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import onnx
import report

from qat2int8 import convert
from qat2int8.pipelines.benchmarking import networks

CALIBRATION_IMAGES = 12
PEER_SCRIPT = f"""
import sys
from pathlib import Path
from qat2int8.pipelines.benchmarking import peer
from qat2int8.pipelines.benchmarking.fake_quant import images
peer.quantize(Path(sys.argv[1]), Path(sys.argv[2]), images({CALIBRATION_IMAGES}, 224))
"""
SMALL, LARGE = 33, 333
"""Blocks of the deep chain: about 500 and 5,000 nodes."""


def seconds(*command: str | Path) -> float:
    """Wall time of a command, start of the interpreter included.

    Raises:
        SystemExit: the command failed; its last words are the message.
    """
    start = time.perf_counter()
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr or done.stdout)
    return time.perf_counter() - start


def commands(folder: Path, rounds: int) -> list[list[str]]:
    """Median seconds of both commands on ResNet-50, rounds interleaved."""
    qat, plain, out = (folder / f"{name}.onnx" for name in ("qat", "float", "out"))
    onnx.save(networks.resnet50(), qat)
    onnx.save(networks.resnet50(fake_quant=False, bn_folded=True), plain)
    contenders: dict[str, tuple[str | Path, ...]] = {
        "qat2int8 convert": (sys.executable, "-m", "qat2int8", "convert", qat, "-o", out),
        f"quantize_static, {CALIBRATION_IMAGES} images": (sys.executable, "-c", PEER_SCRIPT, plain, out),
    }
    runs: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, command in contenders.items():
            out.unlink(missing_ok=True)
            runs[name].append(seconds(*command))
    return [[name, f"{statistics.median(times):.1f}"] for name, times in runs.items()]


def growth(folder: Path, rounds: int) -> tuple[int, int, float]:
    """Nodes of the small and the large chain, and the median ratio of their conversion times."""
    paths, nodes = [folder / "small.onnx", folder / "large.onnx"], []
    for path, blocks in zip(paths, (SMALL, LARGE), strict=True):
        model = networks.deep_chain(blocks)
        nodes.append(len(model.graph.node))
        onnx.save(model, path)
    convert(paths[0], target="ort-x86")
    ratios = []
    for _ in range(rounds):
        times = []
        for path in paths:
            start = time.perf_counter()
            convert(path, target="ort-x86")
            times.append(time.perf_counter() - start)
        ratios.append(times[1] / times[0])
    return nodes[0], nodes[1], statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="put the figures into docs/benchmarks.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = commands(Path(name), options.rounds)
        small, large, ratio = growth(Path(name), options.rounds)
    text = (
        f"{report.table(['ResNet-50, whole command', 'seconds'], rows)}\n\n"
        f"{large:,} nodes take {ratio:.1f} times as long as {small:,} ({large / small:.1f} times the nodes).\n"
        f"Medians of {options.rounds} rounds. {report.circumstances('onnxruntime', 'onnx', 'onnx-ir', 'qat2int8')}"
    )
    print(text)
    if options.write:
        report.write(report.DOCS / "benchmarks.md", "convert-time", text)


if __name__ == "__main__":
    main()
