"""How faithful: the INT8 model beside the fake-quant model it came from, on all 10,000 test images of MNIST.

The reference is the fake-quant model with graph optimisation off; the INT8 model runs as a user runs it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import report
from sketch import Array
from stopwatch import session

from qat2int8 import convert

BATCH, THREADS = 500, 2
SUFFIX = "_qat.onnx"


class Fidelity(NamedTuple):
    """Shares of the test images, and how many Conv and Gemm the runtime still computes in float."""

    reference: float
    converted: float
    same: float
    float_left: int


def answers(path: Path, images: Array, *, optimize: bool) -> Array:
    """The class with the highest score for each image."""
    model = session(path, optimize=optimize, threads=THREADS)
    name = model.get_inputs()[0].name
    batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
    return np.concatenate([model.run(None, {name: batch})[0].argmax(axis=1) for batch in batches])


def takes_digits(path: Path) -> bool:
    """Whether the model's only input is float [N, 1, 28, 28]."""
    inputs = session(path).get_inputs()
    return [(x.type, x.shape[1:]) for x in inputs] == [("tensor(float)", [1, 28, 28])]


def measure(path: Path, images: Array, labels: Array, options: dict[str, dict[str, str]]) -> Fidelity:
    """Convert one model and compare."""
    expected = answers(path, images, optimize=False)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "int8.onnx"
        conversion = convert(path, target="ort-x86", options=options)
        conversion.save(output)
        actual = answers(output, images, optimize=True)
        float_left = len(conversion.certificate.float_compute)
    return Fidelity(
        float((expected == labels).mean()),
        float((actual == labels).mean()),
        float((expected == actual).mean()),
        float_left,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "models", nargs="*", metavar="NAME", help=f"models without '{SUFFIX}'; default: all that take MNIST"
    )
    parser.add_argument(
        "--models", dest="folder", type=Path, required=True, help="folder with mnist.npz beside them"
    )
    parser.add_argument("--relu-encoding", choices=("refine", "same-grid", "exact"))
    parser.add_argument("--write", action="store_true", help="put the table into docs/fidelity.md")
    arguments = parser.parse_args()
    paths = sorted(path for path in arguments.folder.glob(f"*{SUFFIX}") if takes_digits(path))
    names = arguments.models or [path.name.removesuffix(SUFFIX) for path in paths]
    if not names:
        parser.error(f"no *{SUFFIX} in {arguments.folder}")
    options: dict[str, dict[str, str]] = {}
    if arguments.relu_encoding:
        options["update-relu-output-scales"] = {"encoding": arguments.relu_encoding}
    data = np.load(arguments.folder / "mnist.npz")
    images, labels = (data["x_test"][:, None] / 255).astype(np.float32), data["y_test"]
    rows = []
    for name in names:
        found = measure(arguments.folder / f"{name}{SUFFIX}", images, labels, options)
        drift = 100 * (found.converted - found.reference)
        rows.append(
            [
                name,
                f"{found.reference:.2%}",
                f"{found.converted:.2%}",
                f"{drift:+.2f}",
                f"{found.same:.2%}",
                str(found.float_left),
            ]
        )
    head = ["model", "fake quant top-1", "INT8 top-1", "difference, points", "same answer", "float Conv/Gemm left"]
    text = (
        f"{report.table(head, rows)}\n\n"
        f"{len(images):,} test images of MNIST; encoding after Relu: {arguments.relu_encoding or 'the default'}.\n"
        f"{report.circumstances('onnxruntime', 'qat2int8')}"
    )
    print(text)
    if arguments.write:
        report.write(report.DOCS / "fidelity.md", "fidelity", text)


if __name__ == "__main__":
    main()
