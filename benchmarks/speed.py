"""How fast: float, fake quant as exported, onnxruntime's own quantizer and qat2int8, on one thread.

Only ratios within this run mean something; milliseconds are the machine's of the day.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import report

from qat2int8 import convert
from qat2int8.pipelines.benchmarking import bert, networks, peer
from qat2int8.pipelines.benchmarking.fake_quant import images
from qat2int8.pipelines.benchmarking.sketch import Array
from qat2int8.pipelines.benchmarking.stopwatch import Runs, caller, interleave, speedup

FLOAT, EXPORTED, PEER, OURS = "float", "fake quant as exported", "quantize_static", "qat2int8"


@dataclass(frozen=True)
class Network:
    """How to build one network, float or with fake quant, and how to draw inputs for it by count and seed.

    ``calibration`` is how many inputs quantize_static sees; ``options`` are those of passes.
    """

    build: Callable[[bool], onnx.ModelProto]
    samples: Callable[[int, int], Array]
    calibration: int = 8
    options: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


def _pictures(
    build: Callable[..., onnx.ModelProto], *, channels_last: bool = False, **options: Mapping[str, object]
) -> Network:
    def samples(count: int, seed: int) -> Array:
        batch = images(count, 224, seed)
        return np.ascontiguousarray(batch.transpose(0, 2, 3, 1)) if channels_last else batch

    def written(fake_quant: bool) -> onnx.ModelProto:
        return build(fake_quant=fake_quant, bn_folded=not fake_quant)

    return Network(written, samples, options={name.replace("_", "-"): given for name, given in options.items()})


def _encoder(*, dynamic: bool) -> Network:
    return Network(
        lambda fake_quant: bert.bert(fake_quant=fake_quant, dynamic=dynamic),
        lambda count, seed: bert.tokens(count, seed=seed),
        calibration=2,
    )


TFLITE: Callable[..., onnx.ModelProto] = partial(networks.mobilenet_v2, tflite=True)
NETWORKS = {
    "resnet50": _pictures(networks.resnet50),
    "mobilenet_v2": _pictures(networks.mobilenet_v2),
    "mobilenet_v3": _pictures(networks.mobilenet_v3),
    "mobilenet_v2_tflite": _pictures(TFLITE, channels_last=True),
    "mobilenet_v2_tflite_exact": _pictures(TFLITE, channels_last=True, centre_weights={"exact": True}),
    "inception_like": _pictures(lambda **export: networks.inception_like(width=64, size=224, **export)),
    "bert_base": _encoder(dynamic=False),
    "bert_base_dynamic": _encoder(dynamic=True),
}


def measure(name: str, folder: Path, *, rounds: int, repeat: int) -> Runs:
    """Seconds per sample of the four forms of one network."""
    network = NETWORKS[name]
    paths = {form: folder / f"{name}.{form.replace(' ', '_')}.onnx" for form in (FLOAT, EXPORTED, PEER, OURS)}
    onnx.save(network.build(False), paths[FLOAT])
    onnx.save(network.build(True), paths[EXPORTED])
    peer.quantize(paths[FLOAT], paths[PEER], network.samples(network.calibration, 1))
    convert(paths[EXPORTED], target="ort-x86", options=network.options).save(paths[OURS])
    sample = network.samples(1, 2)
    contenders = {form: caller(path, sample) for form, path in paths.items()}
    runs = interleave(contenders, rounds=rounds, repeat=repeat)
    for path in paths.values():
        path.unlink()
    return runs


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
