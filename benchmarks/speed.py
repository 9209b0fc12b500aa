"""How fast: float, fake quant as exported, onnxruntime's own quantizer and qat2int8, on one thread.

Only ratios within this run mean something; milliseconds are the machine's of the day.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import networks
import numpy as np
import numpy.typing as npt
import onnx
import peer
import report
from fake_quant import images
from stopwatch import Runs, caller, interleave, speedup

from qat2int8 import convert

NETWORKS: dict[str, Callable[..., onnx.ModelProto]] = {
    "resnet50": networks.resnet50,
    "mobilenet_v2": networks.mobilenet_v2,
    "mobilenet_v3": networks.mobilenet_v3,
    "mobilenet_v2_tflite": lambda **export: networks.mobilenet_v2(tflite=True, **export),
    "mobilenet_v2_tflite_exact": lambda **export: networks.mobilenet_v2(tflite=True, **export),
    "inception_like": lambda **export: networks.inception_like(width=64, size=224, **export),
}
OPTIONS: dict[str, dict[str, dict[str, object]]] = {
    "mobilenet_v2_tflite_exact": {"centre-weights": {"exact": True}},
}
"""Options of passes, for networks that are not converted with the default ones."""
FLOAT, EXPORTED, PEER, OURS = "float", "fake quant as exported", "quantize_static", "qat2int8"


def measure(name: str, folder: Path, *, rounds: int, repeat: int) -> Runs:
    """Seconds per image of the four forms of one network."""
    build = NETWORKS[name]
    paths = {form: folder / f"{name}.{form.replace(' ', '_')}.onnx" for form in (FLOAT, EXPORTED, PEER, OURS)}
    onnx.save(build(fake_quant=False, bn_folded=True), paths[FLOAT])
    onnx.save(build(fake_quant=True), paths[EXPORTED])
    _, *sides = (dim.dim_value for dim in onnx.load(paths[FLOAT]).graph.input[0].type.tensor_type.shape.dim)
    peer.quantize(paths[FLOAT], paths[PEER], _laid_out(images(8, sides[1]), sides))
    convert(paths[EXPORTED], target="ort-x86", options=OPTIONS.get(name)).save(paths[OURS])
    image = _laid_out(images(1, sides[1], seed=2), sides)
    contenders = {form: caller(path, image) for form, path in paths.items()}
    return interleave(contenders, rounds=rounds, repeat=repeat)


def _laid_out(batch: npt.NDArray[np.float32], sides: list[int]) -> npt.NDArray[np.float32]:
    """``batch`` [N, 3, H, W] with its channels last where the three ``sides`` of an image say so."""
    return batch if sides[0] == batch.shape[1] else np.ascontiguousarray(batch.transpose(0, 2, 3, 1))


def row(name: str, runs: Runs) -> list[str]:
    """Milliseconds of the float network, and how much faster each other form is."""
    ratios = [f"{speedup(runs, form, FLOAT):.2f}x" for form in (EXPORTED, PEER, OURS)]
    return [name, f"{1000 * statistics.median(runs[FLOAT]):.1f}", *ratios]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="NETWORK", help=", ".join(NETWORKS))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--repeat", type=int, default=3, help="timed calls per round")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options = parser.parse_args()
    if unknown := set(options.networks) - set(NETWORKS):
        parser.error(f"no network is called {', '.join(sorted(unknown))}; there are {', '.join(NETWORKS)}")
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row(name, measure(name, Path(folder), rounds=options.rounds, repeat=options.repeat))
            for name in options.networks
        ]
    head = ["network", "float ms", *(f"{form}" for form in (EXPORTED, PEER, OURS))]
    text = (
        f"{report.table(head, rows)}\n\n"
        f"Speed against the float network, batch 1, one thread, median of {options.rounds} interleaved rounds.\n"
        f"{report.circumstances('onnxruntime', 'onnx', 'qat2int8')}"
    )
    print(text)
    if options.write:
        for document in (report.DOCS / "benchmarks.md", report.README):
            report.write(document, "speed", text)


if __name__ == "__main__":
    main()
