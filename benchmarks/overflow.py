"""What the lack of VNNI costs: numbers that overflow, and the speed of weights that do not.

Runs on a processor whose products of bytes overflow, and nowhere else.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import onnx
import report
from fidelity import SUFFIX, logits, takes_digits
from speed import NETWORKS

from qat2int8 import convert
from qat2int8.ir.io import load_model, save_model
from qat2int8.passes.avoid_overflow import unsign
from qat2int8.passes.overflow import overflowing_products, products
from qat2int8.pipelines.benchmarking.stopwatch import caller, interleave, speedup
from qat2int8.pipelines.exact_products import products_overflow

TIMED = ("resnet50", "mobilenet_v2", "mobilenet_v3", "inception_like", "bert_base")
FLOAT, SIGNED, UNSIGNED, CHOSEN = "float", "ort-x86", "all weights uint8", "ort-x86-avx2"


def timed(name: str, folder: Path, *, rounds: int) -> list[str]:
    """How fast one network is with weights that overflow, with no such weight, and with none where it matters."""
    network = NETWORKS[name]
    paths = {form: folder / f"{form.replace(' ', '-')}.onnx" for form in (FLOAT, SIGNED, UNSIGNED, CHOSEN)}
    exported = folder / "exported.onnx"
    onnx.save(network.build(False), paths[FLOAT])
    onnx.save(network.build(True), exported)
    for target in (SIGNED, CHOSEN):
        convert(exported, target=target, options=network.options).save(paths[target])
    model = load_model(paths[SIGNED])
    layers, overflowing = list(products(model)), len(overflowing_products(model))
    unsign(model, layers)
    save_model(model, paths[UNSIGNED])
    sample = network.samples(1, 2)
    runs = interleave({form: caller(path, sample) for form, path in paths.items()}, rounds=rounds, repeat=3)
    ratios = [f"{speedup(runs, form, FLOAT):.2f}x" for form in (SIGNED, UNSIGNED, CHOSEN)]
    return [name, f"{1000 * statistics.median(runs[FLOAT]):.1f}", f"{overflowing} of {len(layers)}", *ratios]


def trained(path: Path, data: Path, folder: Path) -> list[str]:
    """Top-1 of a trained model, as trained and as the runtime runs it here."""
    with np.load(data) as digits:
        images, labels = (digits["x_test"][:, None] / 255).astype(np.float32), digits["y_test"]

    def top1(file: Path, *, optimize: bool) -> str:
        return f"{(logits(file, images, optimize=optimize).argmax(axis=1) == labels).mean():.2%}"

    shares = [top1(path, optimize=False)]
    for target in (SIGNED, CHOSEN):
        output = folder / f"{target}.onnx"
        convert(path, target=target).save(output)
        shares.append(top1(output, optimize=True))
    return [path.name.removesuffix(SUFFIX), *shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True, help=f"folder with *{SUFFIX} and mnist.npz")
    parser.add_argument("--rounds", type=int, default=13)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    options = parser.parse_args()
    if not products_overflow():
        parser.error("products of bytes do not overflow on this processor")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        speeds = [timed(name, folder, rounds=options.rounds) for name in TIMED]
        paths = sorted(path for path in options.models.glob(f"*{SUFFIX}") if takes_digits(path))
        shares = [trained(path, options.models / "mnist.npz", folder) for path in paths]
    text = (
        f"{report.table(['network', 'float ms', 'overflowing layers', SIGNED, UNSIGNED, CHOSEN], speeds)}\n\n"
        f"Speed against the float network, batch 1, one thread, median of {options.rounds} interleaved rounds.\n\n"
        f"{report.table(['model', 'fake quant top-1', SIGNED, CHOSEN], shares)}\n\n"
        f"10,000 test images of MNIST.\n{report.circumstances('onnxruntime', 'qat2int8')}"
    )
    print(text)
    if options.write:
        report.write(report.DOCS / "benchmarks.md", "overflow", text)


if __name__ == "__main__":
    main()
