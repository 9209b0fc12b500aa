"""What came in: the surface of a model file, and the fake quantization in it in whatever dialect."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as oir

from qat2int8.ir import Code, Diagnostic, Fact, Model, Qat2Int8Error
from qat2int8.ir.io import load_model
from qat2int8.ir.verify import VerifyLevel
from qat2int8.passes import Context, Pass
from qat2int8.passes.fake_quant import FakeQuant, fake_quants
from qat2int8.passes.gather_output_scales import KEY
from qat2int8.passes.paddle_ops import is_paddle
from qat2int8.passes.qoperators import QOPERATORS
from qat2int8.passes.read_openvino_fake_quantize import OPENVINO_DOMAIN
from qat2int8.passes.read_qonnx_quant import QONNX_DOMAINS
from qat2int8.passes.scale_groups import is_movement
from qat2int8.pipelines.dialects import has_fake_quant
from qat2int8.pipelines.exporters import exporter_of
from qat2int8.pipelines.front import gathering_passes, recovering_passes
from qat2int8.pipelines.manager import PipelineRun, run_pipeline
from qat2int8.pipelines.spec import Fixpoint
from qat2int8.pipelines.target_files import DEFAULT_TARGET, load_target

__all__ = ["Form", "Inspection", "LayerCount", "Tensor", "inspect"]

_RECOVERY = "recover-weight-grids"
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_STAND_BETWEEN = ("BatchNormalization", "Relu", "Clip")
"""What fusions or the grid absorb, between a layer and the fake quant of its output."""


@dataclass(frozen=True)
class Tensor:
    """An input or output of the graph; a dimension is a number, a name, or ``?``."""

    name: str
    type: str
    shape: tuple[int | str, ...] | None


@dataclass(frozen=True)
class Form:
    """How ``count`` fake quants of one role look.

    Attributes:
        role: ``weight``, ``activation`` or ``bias``.
        type: the integer grid, such as ``int8 narrow``.
        axis: the channel axis, or None for one step per tensor.
        zero_points: whether 0.0 lies elsewhere than at level 0.
    """

    role: str
    type: str
    bits: int
    signed: bool
    axis: int | None
    zero_points: bool
    count: int


@dataclass(frozen=True)
class LayerCount:
    """Layers of one op type, and how many of them have fake quant on what they read and write."""

    op_type: str
    count: int
    input: int
    weight: int
    bias: int
    output: int


@dataclass(frozen=True)
class Inspection:
    """What a model holds.

    Attributes:
        exporter: the toolkit that quantized it, as far as the file tells; else empty.
        opsets: version by domain; the one of ONNX is called ``ai.onnx``.
        bytes: the file with its external data.
        weights: elements of all initializers.
        ops: op types with counts, those of other domains with the domain in front.
        dialects: how fake quantization is spelt, with the number of nodes (of weights, for those without nodes).
        thresholds: nodes on which training recorded one.
        forms: of the fake quants of the main graph, whatever they were spelt in.
        batch_norms: BatchNormalizations that are not folded.
        scales: the table of trained grids: tensor, grid, range, origin.
        diagnostics: what the passes that read fake quantization had to say.
        problem: why the fake quantization could not be read to the end; empty when it could.
        fake_quant: whether there is any.
    """

    exporter: str
    producer: str
    ir_version: int
    opsets: dict[str, int]
    bytes: int
    weights: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    ops: dict[str, int]
    fake_quant: bool
    dialects: dict[str, int]
    thresholds: int
    forms: tuple[Form, ...]
    layers: tuple[LayerCount, ...]
    batch_norms: int
    scales: tuple[tuple[str, str, str, str], ...]
    diagnostics: tuple[Diagnostic, ...]
    problem: str

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        keys = ("tensor", "grid", "range", "origin")
        return {
            **asdict(self),
            "scales": [dict(zip(keys, row, strict=True)) for row in self.scales],
            "diagnostics": [finding.as_dict() for finding in self.diagnostics],
        }


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Look at the model file ``path``, which is left as it is.

    The surface is that of the file. What is fake quantized is seen after the passes with which the shipped
    pipeline reads every dialect, on the model in memory.

    Raises:
        InvalidModel: not a valid model.
        UnsupportedModel: of an IR version or opset that is not read.
    """
    path = Path(path)
    model = load_model(path)
    initializers = [value for graph in model.ir.graphs() for value in graph.initializers.values()]
    tensors = [value.const_value for value in initializers if value.const_value is not None]
    external = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, oir.ExternalTensor))
    nodes = tuple(_all_nodes(model))
    surface: dict[str, Any] = {
        "exporter": exporter_of(model),
        "producer": " ".join(part for part in (model.ir.producer_name, model.ir.producer_version) if part),
        "ir_version": model.ir.ir_version,
        "opsets": {domain or "ai.onnx": version for domain, version in model.ir.opset_imports.items()},
        "bytes": path.stat().st_size + external,
        "weights": sum(tensor.size for tensor in tensors),
        "inputs": tuple(_tensor(value) for value in model.graph.inputs if not value.is_initializer()),
        "outputs": tuple(_tensor(value) for value in model.graph.outputs),
        "ops": dict(Counter(_op(node) for node in nodes).most_common()),
        "thresholds": sum(KEY in node.attributes or KEY in node.metadata_props for node in nodes),
        "batch_norms": sum(node.op_type == "BatchNormalization" for node in nodes),
    }
    dialects = Counter(spelt for node in nodes if (spelt := _dialect(node)))
    suspected = has_fake_quant(model)
    reading = _Reading(model)
    dialects.update(reading.dialects)
    unread = any(found.code is Code.UNSUPPORTED_FAKE_QUANT for found in reading.diagnostics)
    return Inspection(
        **surface,
        fake_quant=bool(dialects or surface["thresholds"] or unread or (reading.problem and suspected)),
        dialects=dict(dialects.most_common()),
        forms=reading.forms,
        layers=reading.layers,
        scales=reading.scales,
        diagnostics=reading.diagnostics,
        problem=reading.problem,
    )


class _Reading:
    """The fake quantization of a model, read by the front half of the shipped pipeline, which changes it."""

    def __init__(self, model: Model) -> None:
        self.dialects: Counter[str] = Counter()
        self.forms: tuple[Form, ...] = ()
        self.layers: tuple[LayerCount, ...] = ()
        self.scales: tuple[tuple[str, str, str, str], ...] = ()
        self.diagnostics: tuple[Diagnostic, ...] = ()
        self.problem = ""
        self._context = Context(load_target(DEFAULT_TARGET))
        try:
            run = self._run(model, gathering_passes())
            fakes = [fake for fake in fake_quants(model) if isinstance(fake, FakeQuant)]
            self.forms = _forms(fakes)
            self.layers = _layers(model, fakes)
            self.scales = tuple(model.scales.rows())
            # A pass that runs twice says twice what it leaves as it is.
            self.diagnostics = tuple(dict.fromkeys(run.diagnostics))
            counts = run.counts.get("read-primitive-fake-quant", {})
            self._count("float primitives", sum(counts.values()))
            found = self._run(model, recovering_passes(), run.facts).counts.get(_RECOVERY, {})
            self._count("weights on a grid, without nodes", sum(found.values()))
        except Qat2Int8Error as error:
            self.problem = str(error)

    def _run(
        self, model: Model, passes: tuple[Pass | Fixpoint[Pass], ...], facts: frozenset[Fact] | None = None
    ) -> PipelineRun:
        return run_pipeline(model, passes, self._context, verify=VerifyLevel.NONE, facts=facts)

    def _count(self, spelt: str, count: int) -> None:
        if count:
            self.dialects[spelt] = count


def _all_nodes(model: Model) -> Iterator[oir.Node]:
    yield from model.graph.all_nodes()
    for function in model.ir.functions.values():
        yield from function


def _op(node: oir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _dialect(node: oir.Node) -> str:
    """How ``node`` spells fake quantization; empty when it is another op."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.domain in ("", "com.microsoft"):
        return f"{node.domain or 'ONNX'} Quantize/Dequantize"
    if (node.domain, node.op_type) in QOPERATORS:
        return "QOperator"
    if node.domain in QONNX_DOMAINS:
        return "QONNX"
    if (node.domain, node.op_type) == (OPENVINO_DOMAIN, "FakeQuantize"):
        return "OpenVINO FakeQuantize"
    if is_paddle(node):
        return "Paddle fake quant"
    return ""


def _tensor(value: oir.Value) -> Tensor:
    shape = None
    if value.shape is not None:
        shape = tuple(dim if isinstance(dim, int) else str(dim.value or "?") for dim in value.shape)
    return Tensor(value.name or "", str(value.dtype).lower() if value.dtype is not None else "?", shape)


def _forms(fakes: list[FakeQuant]) -> tuple[Form, ...]:
    counts: Counter[Form] = Counter()
    for fake in fakes:
        role = "bias" if fake.is_bias else "weight" if fake.constant else "activation"
        params, dtype = fake.params, fake.params.dtype
        counts[Form(role, str(dtype), dtype.bits, dtype.signed, params.axis, not params.symmetric, 0)] += 1
    return tuple(replace(form, count=count) for form, count in counts.most_common())


def _layers(model: Model, fakes: list[FakeQuant]) -> tuple[LayerCount, ...]:
    on_grid = {fake.output for fake in fakes}
    quantized = {fake.source for fake in fakes}
    rows: dict[str, Counter[str]] = {}
    for node in model.nodes(*_LAYERS):
        counts = rows.setdefault(node.op_type, Counter())
        counts["count"] += 1
        for role, value in zip(("input", "weight", "bias"), node.inputs, strict=False):
            counts[role] += value is not None and _moved_from(model, value) in on_grid
        counts["output"] += _is_quantized(node.outputs[0], quantized)
    fields = ("count", "input", "weight", "bias", "output")
    return tuple(LayerCount(kind, *(counts[field] for field in fields)) for kind, counts in rows.items())


def _moved_from(model: Model, value: oir.Value) -> oir.Value:
    """The tensor whose numbers ``value`` holds: data movement keeps them on their grid."""
    while (maker := value.producer()) is not None and is_movement(model, maker) and maker.inputs[0] is not None:
        value = maker.inputs[0]
    return value


def _is_quantized(value: oir.Value, quantized: set[oir.Value]) -> bool:
    """Whether ``value``, or what BatchNormalization and activations make of it alone, is fake quantized."""
    while value not in quantized:
        uses = list(value.uses())
        if len(uses) != 1 or uses[0].idx != 0 or uses[0].node.op_type not in _STAND_BETWEEN:
            return False
        value = uses[0].node.outputs[0]
    return True
