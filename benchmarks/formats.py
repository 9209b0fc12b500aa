"""Q/DQ beside operators on integers: the same kernels run; what differs is size and the time until they do."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import onnx
import report
from speed import NETWORKS

from qat2int8 import convert
from qat2int8.ir import Format
from qat2int8.pipelines.benchmarking.stopwatch import caller, interleave, session, speedup


def row(name: str, folder: Path, *, rounds: int, repeat: int) -> list[str]:
    """Milliseconds of the Q/DQ form, to run and to open, and what becomes of both in the other form."""
    source = folder / f"{name}.onnx"
    network = NETWORKS[name]
    onnx.save(network.build(True), source)
    paths = {format_: folder / f"{name}.{format_}.onnx" for format_ in Format}
    for format_, path in paths.items():
        convert(source, format=format_, options=network.options).save(path)
    sample = network.samples(1, 2)
    runs = interleave(
        {format_: caller(path, sample) for format_, path in paths.items()}, rounds=rounds, repeat=repeat
    )
    # A session is made once and not warmed up: `interleave` makes one that is not timed.
    opened = interleave(
        {format_: partial(session, path) for format_, path in paths.items()}, rounds=rounds, repeat=1
    )
    sizes = {format_: path.stat().st_size for format_, path in paths.items()}
    return [
        name,
        f"{1000 * statistics.median(runs[Format.QDQ]):.1f}",
        f"{speedup(runs, Format.QOPERATOR, Format.QDQ):.2f}x",
        f"{1000 * statistics.median(opened[Format.QDQ]):.0f}",
        f"{speedup(opened, Format.QOPERATOR, Format.QDQ):.2f}x",
        f"{sizes[Format.QOPERATOR] / sizes[Format.QDQ]:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="NETWORK", help=", ".join(NETWORKS))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--repeat", type=int, default=3, help="timed calls per round")
    options = parser.parse_args()
    if unknown := set(options.networks) - set(NETWORKS):
        parser.error(f"no network is called {', '.join(sorted(unknown))}; there are {', '.join(NETWORKS)}")
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(name, Path(folder), rounds=options.rounds, repeat=options.repeat) for name in options.networks]
    head = ["network", "qdq: run, ms", "qoperator", "qdq: open, ms", "qoperator", "size of qoperator"]
    print(report.table(head, rows))
    print(f"\nBatch 1, one thread, median of {options.rounds} interleaved rounds; size against qdq.")
    print(report.circumstances("onnxruntime", "onnx", "qat2int8"))


if __name__ == "__main__":
    main()
