"""What becomes of models as training frameworks export them, one row a model: coverage, answers, error.

The reference is the framework itself: its own fake-quant outputs, stored beside each model. The INT8 model runs as
a user runs it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import report
from sketch import Array
from stopwatch import session

from qat2int8 import convert
from qat2int8.ir.errors import Qat2Int8Error
from qat2int8.passes.paddle_ops import is_paddle
from qat2int8.passes.qoperators import QOPERATORS
from qat2int8.passes.read_openvino_fake_quantize import OPENVINO_DOMAIN
from qat2int8.passes.read_qonnx_quant import QONNX_DOMAINS
from qat2int8.pipelines.convert import Conversion

HEAD = (
    "model",
    "dialect",
    "integer MACs",
    "framework top-1",
    "INT8 top-1",
    "same answer",
    "largest error, LSB",
    "SQNR, dB",
)
CLOSE = 0.3
"""Percentage points: one image of 360 is 0.28."""
LEVELS = 255
"""Steps in the range of an output that has no grid of its own."""


class Outcome(NamedTuple):
    """One converted model; ``top1`` (framework, INT8) and ``same`` only where labels are stored."""

    name: str
    dialect: str
    coverage: float
    top1: tuple[float, float] | None
    same: float | None
    error: float
    on_grid: bool
    sqnr: float

    @property
    def close(self) -> bool:
        return self.top1 is not None and 100 * abs(self.top1[1] - self.top1[0]) <= CLOSE

    def cells(self) -> list[str]:
        top1 = [f"{share:.2%}" for share in self.top1] if self.top1 else ["", ""]
        same = "" if self.same is None else f"{self.same:.2%}"
        error = f"{self.error:.1f}{'' if self.on_grid else '*'}"
        # Down, so that 100 says that nothing is left.
        coverage = f"{np.floor(10 * self.coverage) / 10:.1f}%"
        return [self.name, self.dialect, coverage, *top1, same, error, f"{self.sqnr:.1f}"]


class Refusal(NamedTuple):
    """One model that is not converted, and why."""

    name: str
    dialect: str
    reason: str


def dialect(path: Path) -> str:
    """How the model spells its grids, the most particular spelling first."""
    model = onnx.load(path)
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    ops = {node.op_type for node in nodes}
    if any(node.domain in QONNX_DOMAINS for node in nodes):
        return "QONNX"
    if (OPENVINO_DOMAIN, "FakeQuantize") in {(node.domain, node.op_type) for node in nodes}:
        return "OpenVINO"
    if any(is_paddle(node) for node in nodes):
        return "Paddle"
    if any((node.domain, node.op_type) in QOPERATORS for node in nodes):
        return "QOperator"
    if ops & {"QuantizeLinear", "DequantizeLinear"}:
        return "QCDQ" if clips_integers(nodes) else "QDQ"
    return "float ops" if ops & {"Round", "Floor"} else "none"


def clips_integers(nodes: Iterable[onnx.NodeProto]) -> bool:
    """Whether a Clip stands behind a QuantizeLinear, narrowing its grid."""
    quantized: set[str] = set()
    for node in nodes:
        if node.op_type == "QuantizeLinear":
            quantized.update(node.output)
        elif node.op_type == "Clip" and node.input[0] in quantized:
            return True
    return False


def step(conversion: Conversion, expected: Array) -> tuple[float, bool]:
    """What one LSB of the first output is, and whether a grid says so; else the range in 255 parts."""
    model, output = conversion.model, conversion.model.graph.outputs[0]
    grid = model.scales.get(output)
    if grid is not None:
        return float(grid.scale.max()), True
    writer = output.producer()
    if writer is not None and writer.op_type == "DequantizeLinear":
        scale = model.constant(writer.inputs[1])
        if scale is not None:
            return float(scale.max()), True
    return float(np.ptp(expected)) / LEVELS, False


def measure(path: Path, folder: Path) -> Outcome | Refusal:
    """Convert one model and run it on the inputs stored beside it; ``folder`` takes the result.

    Raises:
        SystemExit: there are no inputs and outputs beside the model.
    """
    beside = path.with_suffix(".npz")
    if not beside.exists():
        raise SystemExit(f"{path}: no {beside.name} beside it")
    spelling = dialect(path)
    try:
        conversion = convert(path)
        coverage = conversion.certificate.integer_macs_percent
    except Qat2Int8Error as error:
        return Refusal(path.stem, spelling, f"{error.what} ({error.remedy})" if error.remedy else error.what)
    output = folder / path.name
    conversion.save(output)
    model = session(output)
    with np.load(beside) as data:
        stored = {key: data[key] for key in data.files}
    feeds = {value.name: stored[f"input_{index}"] for index, value in enumerate(model.get_inputs())}
    expected, actual = stored["output_0"], model.run(None, feeds)[0]
    lsb, on_grid = step(conversion, expected)
    noise = float(np.square(expected - actual).mean())
    top1, same = None, None
    if "labels" in stored:
        trained, answer = expected.argmax(axis=-1), actual.argmax(axis=-1)
        top1 = float((trained == stored["labels"]).mean()), float((answer == stored["labels"]).mean())
        same = float((trained == answer).mean())
    return Outcome(
        path.stem,
        spelling,
        coverage,
        top1,
        same,
        float(np.abs(expected - actual).max()) / lsb,
        on_grid,
        float(10 * np.log10(np.square(expected).mean() / noise)) if noise else float("inf"),
    )


def summary(converted: list[Outcome], refused: list[Refusal]) -> str:
    """The whole table in one line."""
    labelled = [one for one in converted if one.top1]
    close = sum(one.close for one in labelled)
    coverage = statistics.median(one.coverage for one in converted)
    return (
        f"{len(converted)} converted, {len(refused)} refused; median of integer MACs {coverage:.1f}%; "
        f"top-1 within {CLOSE} points for {close} of {len(labelled)} with labels."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True, help="folder with NAME.onnx and NAME.npz beside it")
    parser.add_argument("--write", action="store_true", help="put the table into docs/exporters.md")
    arguments = parser.parse_args()
    paths = sorted(arguments.models.glob("*.onnx"))
    if not paths:
        parser.error(f"no *.onnx in {arguments.models}")
    with tempfile.TemporaryDirectory() as folder:
        found = [measure(path, Path(folder)) for path in paths]
    converted = [one for one in found if isinstance(one, Outcome)]
    refused = [one for one in found if isinstance(one, Refusal)]
    if not converted:
        parser.error(f"no model of {arguments.models} is converted")
    parts = [report.table(HEAD, [one.cells() for one in converted])]
    parts.append("\\* no grid on the output: one LSB is 1/255 of its range.")
    if refused:
        reasons = "\n".join(f"- {one.name} ({one.dialect}): {one.reason}" for one in refused)
        parts.append(f"Refused:\n\n{reasons}")
    parts.append(f"{summary(converted, refused)}\n{report.circumstances('onnxruntime', 'qat2int8')}")
    text = "\n\n".join(parts)
    print(text)
    if arguments.write:
        report.write(report.DOCS / "exporters.md", "exporters", text)


if __name__ == "__main__":
    main()
