"""How faithful: the INT8 model beside the fake-quant model it came from, on all 10,000 test images of MNIST.

The reference is the fake-quant model with graph optimisation off; the INT8 model runs as a user runs it. A second
table compares the three encodings of tensors behind a Relu, from which the default was chosen.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import report

from qat2int8 import convert
from qat2int8.pipelines.benchmarking.sketch import Array
from qat2int8.pipelines.benchmarking.stopwatch import caller, interleave, session, speedup

BATCH, THREADS = 500, 2
SUFFIX = "_qat.onnx"


ENCODINGS = ("exact", "refine", "same-grid")
DEFAULT = ENCODINGS[0]


class Fidelity(NamedTuple):
    """Shares of the test images, and how many Conv and Gemm the runtime still computes in float."""

    reference: float
    converted: float
    same: float
    sqnr: float
    float_left: int


def logits(path: Path, images: Array, *, optimize: bool) -> Array:
    """The scores of each image."""
    model = session(path, optimize=optimize, threads=THREADS)
    name = model.get_inputs()[0].name
    batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
    return np.concatenate([model.run(None, {name: batch})[0] for batch in batches])


def takes_digits(path: Path) -> bool:
    """Whether the model's only input is float [N, 1, 28, 28]."""
    inputs = session(path).get_inputs()
    return [(x.type, x.shape[1:]) for x in inputs] == [("tensor(float)", [1, 28, 28])]


def measure(path: Path, expected: Array, images: Array, labels: Array, encoding: str, output: Path) -> Fidelity:
    """Convert one model to ``output`` and compare its scores with ``expected``, those of the source."""
    conversion = convert(path, options={"update-relu-output-scales": {"encoding": encoding}})
    conversion.save(output)
    actual = logits(output, images, optimize=True)
    answer, trained = actual.argmax(axis=1), expected.argmax(axis=1)
    noise = np.square(expected - actual).mean()
    return Fidelity(
        float((trained == labels).mean()),
        float((answer == labels).mean()),
        float((trained == answer).mean()),
        float(10 * np.log10(np.square(expected).mean() / noise)) if noise else float("inf"),
        len(conversion.certificate.float_compute),
    )


def row(name: str, found: Fidelity) -> list[str]:
    """What the main table says of one model."""
    drift = 100 * (found.converted - found.reference)
    shares = [f"{found.reference:.2%}", f"{found.converted:.2%}", f"{drift:+.2f}", f"{found.same:.2%}"]
    return [name, *shares, str(found.float_left)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "models", nargs="*", metavar="NAME", help=f"models without '{SUFFIX}'; default: all that take MNIST"
    )
    parser.add_argument(
        "--models", dest="folder", type=Path, required=True, help="folder with mnist.npz beside them"
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/fidelity.md")
    arguments = parser.parse_args()
    paths = sorted(path for path in arguments.folder.glob(f"*{SUFFIX}") if takes_digits(path))
    names = arguments.models or [path.name.removesuffix(SUFFIX) for path in paths]
    if not names:
        parser.error(f"no *{SUFFIX} in {arguments.folder}")
    data = np.load(arguments.folder / "mnist.npz")
    images, labels = (data["x_test"][:, None] / 255).astype(np.float32), data["y_test"]
    rows, encodings = [], []
    for name in names:
        source = arguments.folder / f"{name}{SUFFIX}"
        expected = logits(source, images, optimize=False)
        with tempfile.TemporaryDirectory() as folder:
            outputs = {encoding: Path(folder) / f"{encoding}.onnx" for encoding in ENCODINGS}
            found = {
                encoding: measure(source, expected, images, labels, encoding, output)
                for encoding, output in outputs.items()
            }
            contenders = {encoding: caller(path, images[:100]) for encoding, path in outputs.items()}
            runs = interleave(contenders, rounds=15, repeat=3)
        rows.append(row(name, found[DEFAULT]))
        encodings.append([name])
        for encoding, one in found.items():
            speed = speedup(runs, encoding, DEFAULT)
            encodings[-1].append(f"{one.same:.2%}, {one.sqnr:.1f} dB, {speed:.2f}x")
    circumstances = report.circumstances("onnxruntime", "qat2int8")
    head = ["model", "fake quant top-1", "INT8 top-1", "difference, points", "same answer", "float Conv/Gemm left"]
    text = f"{report.table(head, rows)}\n\n{len(images):,} test images of MNIST.\n{circumstances}"
    compared = (
        f"{report.table(['model', *ENCODINGS], encodings)}\n\nSame answer as the fake-quant model, SQNR of the "
        f"scores, speed against {DEFAULT} (batch 100, one thread, interleaved).\n{circumstances}"
    )
    print(f"{text}\n\n{compared}")
    if arguments.write:
        report.write(report.DOCS / "fidelity.md", "fidelity", text)
        report.write(report.README, "fidelity", text)
        report.write(report.DOCS / "fidelity.md", "encodings", compared)


if __name__ == "__main__":
    main()
