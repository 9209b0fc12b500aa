"""How faithful, for models as training frameworks export them: one row a model, into docs/fidelity.md.

Answers are compared with the framework's own fake-quant outputs, stored beside each model; integer tensors with
the file as exported, run with graph optimisation off. The INT8 model runs as a user runs it.
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

from qat2int8 import convert
from qat2int8.ir import Code, Provenance
from qat2int8.ir.errors import Qat2Int8Error
from qat2int8.passes.paddle_ops import is_paddle
from qat2int8.passes.qoperators import QOPERATORS
from qat2int8.passes.read_openvino_fake_quantize import OPENVINO_DOMAIN
from qat2int8.passes.read_qonnx_quant import QONNX_DOMAINS
from qat2int8.pipelines.benchmarking.sketch import Array
from qat2int8.pipelines.benchmarking.stopwatch import session
from qat2int8.pipelines.convert import Conversion
from qat2int8.pipelines.levels import Levels

HEAD = (
    "model",
    "dialect",
    "integer MACs",
    "framework top-1",
    "INT8 top-1",
    "same answer",
    "SQNR, dB",
    "within 1 LSB",
    "largest, LSB",
    "layer by layer",
    "largest, LSB",
    "derived",
    "dropped",
)
CLOSE = 0.3
"""Percentage points: one image of 360 is 0.28."""
FAITHFUL = 99.9
"""Per cent of integer positions within 1 LSB."""
LEVEL_SAMPLES = 64
"""Images that integer tensors are compared on; elements are many more."""


class Outcome(NamedTuple):
    """One converted model; ``top1`` (framework, INT8) and ``same`` only where labels are stored."""

    name: str
    dialect: str
    coverage: float
    top1: tuple[float, float] | None
    same: float | None
    sqnr: float
    end_to_end: Levels | None
    local: Levels | None
    derived: int
    dropped: int

    @property
    def close(self) -> bool:
        return self.top1 is not None and 100 * abs(self.top1[1] - self.top1[0]) <= CLOSE

    @property
    def trained_throughout(self) -> bool:
        """Whether every integer tensor lies on a grid that training gave."""
        return self.end_to_end is not None and not self.derived

    def cells(self) -> list[str]:
        top1 = [f"{share:.2%}" for share in self.top1] if self.top1 else ["", ""]
        same = "" if self.same is None else f"{self.same:.2%}"
        levels = [cell for one in (self.end_to_end, self.local) for cell in level_cells(one)]
        counts = [str(count) if count else "" for count in (self.derived, self.dropped)]
        return [self.name, self.dialect, down(self.coverage, 1), *top1, same, f"{self.sqnr:.1f}", *levels, *counts]


class Refusal(NamedTuple):
    """One model that is not converted, and why."""

    name: str
    dialect: str
    reason: str


def down(share: float, digits: int) -> str:
    """Rounded down, so that 100 says that nothing is left."""
    factor = 10**digits
    return f"{np.floor(factor * share + 1e-9) / factor:.{digits}f}%"


def level_cells(levels: Levels | None) -> list[str]:
    return ["", ""] if levels is None else [down(levels.within_one_percent, 2), f"{levels.largest:.0f}"]


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


def derived_grids(conversion: Conversion) -> int:
    """Integer tensors on grids that nobody trained."""
    model = conversion.model
    grids = (model.scales.get(node.inputs[0]) for node in model.nodes("QuantizeLinear"))
    return sum(grid is not None and grid.source < Provenance.TRAINED for grid in grids)


def dropped_grids(conversion: Conversion) -> int:
    """Trained grids that no integer tensor of the result lies on."""
    codes = (Code.FAKE_QUANT_DROPPED, Code.SCALE_CONFLICT)
    return sum(finding.code in codes for finding in conversion.diagnostics)


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
    any_batch = all(not isinstance(value.shape[0], int) for value in model.get_inputs())
    some = {name: array[:LEVEL_SAMPLES] for name, array in feeds.items()} if any_batch else feeds
    fidelity = conversion.fidelity_on([some])
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
        sqnr(expected, actual),
        fidelity.levels,
        fidelity.local_levels,
        derived_grids(conversion),
        dropped_grids(conversion),
    )


def sqnr(expected: Array, actual: Array) -> float:
    """In decibels, over all elements."""
    noise = float(np.square(expected - actual).mean())
    return float(10 * np.log10(np.square(expected).mean() / noise)) if noise else float("inf")


def summary(converted: list[Outcome], refused: list[Refusal]) -> str:
    """The whole table in a few lines."""
    labelled = [one for one in converted if one.top1]
    close = sum(one.close for one in labelled)
    coverage = statistics.median(one.coverage for one in converted)
    whole = [one for one in converted if one.trained_throughout]
    parts = []
    for label, levels in (("end to end", end_to_end_share), ("layer by layer", local_share)):
        below = sorted((one for one in whole if levels(one) < FAITHFUL), key=lambda one: levels(one))
        names = ", ".join(f"{one.name} ({down(levels(one), 1)})" for one in below)
        parts.append(f"{label} {len(whole) - len(below)}" + (f", not {names}" if below else ""))
    return (
        f"{len(converted)} converted, {len(refused)} refused; median of integer MACs {coverage:.1f}%; "
        f"top-1 within {CLOSE} points for {close} of {len(labelled)} with labels.\n\n"
        f"{FAITHFUL}% of the integers within 1 LSB, of {len(whole)} models without derived grids:\n\n- "
        + ";\n- ".join(parts)
        + "."
    )


def end_to_end_share(one: Outcome) -> float:
    return one.end_to_end.within_one_percent if one.end_to_end is not None else 100.0


def local_share(one: Outcome) -> float:
    return one.local.within_one_percent if one.local is not None else 100.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models without '.onnx'; default: all")
    parser.add_argument("--models", type=Path, required=True, help="folder with NAME.onnx and NAME.npz beside it")
    parser.add_argument("--write", action="store_true", help="put the table into docs/fidelity.md")
    arguments = parser.parse_args()
    wanted = set(arguments.names)
    paths = sorted(path for path in arguments.models.glob("*.onnx") if not wanted or path.stem in wanted)
    if not paths:
        parser.error(f"no such *.onnx in {arguments.models}")
    with tempfile.TemporaryDirectory() as folder:
        found = [measure(path, Path(folder)) for path in paths]
    converted = [one for one in found if isinstance(one, Outcome)]
    refused = [one for one in found if isinstance(one, Refusal)]
    if not converted:
        parser.error(f"no model of {arguments.models} is converted")
    parts = [report.table(HEAD, [one.cells() for one in converted])]
    if refused:
        parts.append(report.table(("refused", "dialect", "error"), [[*one] for one in refused]))
    parts.append(f"{summary(converted, refused)}\n\n{report.circumstances('onnxruntime', 'qat2int8')}")
    text = "\n\n".join(parts)
    print(text)
    if arguments.write:
        report.write(report.DOCS / "fidelity.md", "exporters", text)


if __name__ == "__main__":
    main()
