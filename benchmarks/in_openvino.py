"""What OpenVINO makes of models converted for it: how many layers it runs in integers, how near, how fast.

OpenVINO's executed graph tells the precision of each layer. Answers are compared with the fake-quant model, run
by onnxruntime node by node, on the inputs stored beside a model (``NAME.npz`` with ``input_0``...) or on synthetic
ones.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import openvino
import report

from qat2int8 import convert
from qat2int8.ir import Qat2Int8Error
from qat2int8.pipelines.benchmarking import networks
from qat2int8.pipelines.benchmarking.stopwatch import interleave
from qat2int8.pipelines.fidelity import synthetic_inputs
from qat2int8.pipelines.sessions import Feeds, reference_session, run_session, session

HEAD = (
    "model",
    "layers",
    "integer as exported",
    "integer",
    "SQNR as exported, dB",
    "SQNR, dB",
    "SQNR of ort-x86 in onnxruntime, dB",
    "as exported, ms",
    "ms",
    "ort-x86 in onnxruntime, ms",
)
SAMPLES, REPEAT = 16, 3
_LAYERS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
"""Names OpenVINO's CPU plugin has for what multiplies and accumulates."""
_INTEGER = ("i8", "u8")


class Seen(NamedTuple):
    """A model in OpenVINO: layers, how many of them in integers, the first output for each input."""

    layers: int
    integer: int
    outputs: list[npt.NDArray[Any]]
    run: Callable[[], object]


def compiled(path: Path) -> Any:
    """``path`` on the CPU plugin: one thread, floats as floats where the processor would rather have bfloat16."""
    hints = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(str(path), "CPU", hints)


def precisions(model: Any) -> list[tuple[str, str]]:
    """Kind and precision of every layer of the executed graph."""
    found = []
    for node in model.get_runtime_model().get_ordered_ops():
        facts = node.get_rt_info()
        words = (facts[key] for key in ("layerType", "runtimePrecision"))
        kind, precision = (str(getattr(word, "value", word)) for word in words)
        if kind in _LAYERS:
            found.append((kind, precision))
    return found


def see(path: Path, inputs: Sequence[Feeds]) -> Seen:
    model = compiled(path)
    layers = precisions(model)
    outputs = [np.array(model(list(feeds.values()))[0]) for feeds in inputs]
    first = list(inputs[0].values())
    integer = sum(precision in _INTEGER for _, precision in layers)
    return Seen(len(layers), integer, outputs, lambda: model(first))


def row(path: Path, rounds: int) -> tuple[str, ...]:
    """One model of fake quantization against what is made of it.

    Raises:
        Qat2Int8Error: it is refused.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = {target: Path(folder) / f"{target}.onnx" for target in ("openvino", "ort-x86")}
        for target, file in files.items():
            conversion = convert(path, target=target)
            conversion.save(file)
        inputs = stored_inputs(path) or list(synthetic_inputs(conversion.model, SAMPLES))
        reference = reference_session(path)
        expected = [run_session(reference, feeds)[0] for feeds in inputs]
        here = session(files["ort-x86"], threads=1)
        ours = [run_session(here, feeds)[0] for feeds in inputs]
        exported, placed = see(path, inputs), see(files["openvino"], inputs)
        runs = {"exported": exported.run, "placed": placed.run, "ort": lambda: run_session(here, inputs[0])}
        times = [statistics.median(each) for each in interleave(runs, rounds=rounds, repeat=REPEAT).values()]
        near = [f"{decibels(expected, outputs):.1f}" for outputs in (exported.outputs, placed.outputs, ours)]
    counts = (str(placed.layers), str(exported.integer), str(placed.integer))
    return (path.stem, *counts, *near, *(f"{1000 * t:.2f}" for t in times))


def stored_inputs(path: Path) -> list[Feeds]:
    data = path.with_suffix(".npz")
    if not data.exists():
        return []
    graph = onnx.load(path, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    names = [value.name for value in graph.input if value.name not in constants]
    with np.load(data) as stored:
        return [{name: stored[f"input_{index}"] for index, name in enumerate(names)}]


def decibels(expected: Sequence[npt.NDArray[Any]], actual: Sequence[npt.NDArray[Any]]) -> float:
    """Signal over error; infinite for the same numbers."""
    pairs = list(zip(expected, actual, strict=True))
    error = sum(float(np.square(left.astype(np.float64) - right).sum()) for left, right in pairs)
    signal = sum(float(np.square(left.astype(np.float64)).sum()) for left, _ in pairs)
    return 10 * float(np.log10(signal / error)) if error else float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path, help="with fake quantization; built networks if none")
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for path in options.models or built(Path(folder)):
            try:
                rows.append(row(path, options.rounds))
            except (Qat2Int8Error, RuntimeError) as error:
                print(f"{path.stem}: {str(error).splitlines()[0]}")
    print(report.table(HEAD, rows))
    print("\nThe stored inputs, or synthetic ones of batch 1; one thread, median of interleaved rounds.")
    print(report.circumstances("openvino", "onnxruntime", "qat2int8"))


def built(folder: Path) -> list[Path]:
    paths = []
    for build in (networks.resnet50, networks.mobilenet_v2, networks.inception_like):
        paths.append(folder / f"{build.__name__}.onnx")
        onnx.save(build(), paths[-1])
    return paths


if __name__ == "__main__":
    main()
