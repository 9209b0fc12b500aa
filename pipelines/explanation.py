"""Why a converted model is what it is, from the file alone: what it was made from, what runs in float and why."""

from __future__ import annotations

import difflib
import json
import os
from collections import deque
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir

from qat2int8.ir import (
    INT32,
    Code,
    Contract,
    DataError,
    Diagnostic,
    InvalidModel,
    Model,
    QuantDType,
    QuantParams,
    Severity,
    Target,
)
from qat2int8.ir.io import load_model
from qat2int8.passes.fake_quant import FakeQuant, recognise
from qat2int8.passes.kernels import kernel_of
from qat2int8.passes.qdq_step import reader_of
from qat2int8.passes.qoperators import QOperator, qoperator_of
from qat2int8.pipelines.certificate import Certificate, NodeRecord, certify, layer_of
from qat2int8.pipelines.made_with import target_of
from qat2int8.pipelines.target_files import DEFAULT_TARGET, load_target

__all__ = ["Cause", "Explanation", "FloatGroup", "NodeExplanation", "Origin", "TensorGrid", "explain"]

_FLOAT_CODES = frozenset(
    {
        Code.KEPT_FLOAT,
        Code.OUTPUT_KEPT_FLOAT,
        Code.NODE_SKIPPED,
        Code.UNSUPPORTED_OP,
        Code.ACTIVATION_NOT_ABSORBED,
    }
)
"""The findings that say of a node that it stays in float."""

_PREFIX = "qat2int8."
_DIAGNOSTICS = f"{_PREFIX}diagnostics"
_BOUNDARY = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Origin:
    """What a model was made from and for, as ``convert`` wrote it into the file."""

    version: str
    target: str
    pipeline: str
    source_sha256: str


@dataclass(frozen=True)
class FloatGroup:
    """Nodes that run in float for one reason; ``code`` is empty when the reason is read from the graph."""

    code: str
    reason: str
    remedy: str
    nodes: tuple[NodeRecord, ...]


@dataclass(frozen=True)
class TensorGrid:
    """One tensor of a node; ``grid`` and ``range`` are empty for a float tensor that lies on none."""

    role: str
    tensor: str
    grid: str
    range: str


@dataclass(frozen=True)
class Cause:
    """One tensor without a grid on the way up from a float node, and what became of the node that computes it."""

    tensor: str
    node: str
    op_type: str
    reason: str


@dataclass(frozen=True)
class NodeExplanation:
    """Everything known about one node.

    Attributes:
        integer: whether it computes on integers.
        kernel: the integer kernel of the runtime it became; its own op type where that moves integers as it is.
        diagnostics: the findings about it and about the tensors it reads and writes.
        tensors: what it reads and writes, with grids.
        chain: for a float node, nearest first, the tensors without a grid up to the nearest causes.
    """

    name: str
    op_type: str
    integer: bool
    kernel: str
    diagnostics: tuple[Diagnostic, ...]
    tensors: tuple[TensorGrid, ...]
    chain: tuple[Cause, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        findings = [finding.as_dict() for finding in self.diagnostics]
        return {**asdict(self), "diagnostics": findings}


@dataclass(eq=False)
class Explanation:
    """A model file and what it says about itself.

    Attributes:
        origin: None for a model that was not made by this tool.
        diagnostics: the findings of the conversion; none without an origin.
    """

    model: Model
    path: Path
    origin: Origin | None
    target: Target
    diagnostics: tuple[Diagnostic, ...]
    certificate: Certificate

    @cached_property
    def left_float(self) -> tuple[FloatGroup, ...]:
        """Every node that runs in float though its kind can be integer, by reason, in graph order.

        Those are Conv, ConvTranspose, Gemm and MatMul; of a model with an origin also the other ops the target
        computes, and those the conversion explained.
        """
        records = iter(self.certificate.compute)
        groups: dict[tuple[str, str, str], list[NodeRecord]] = {}
        for node in self.model.graph.all_nodes():
            if layer_of(node) is not None:
                record = next(records)
            elif self.origin is not None and self._could_be_integer(node):
                record = NodeRecord(_name(node), node.op_type, 0, bool(self.kernel(node)))
            else:
                continue
            if not record.integer:
                groups.setdefault(self._why(node), []).append(record)
        return tuple(FloatGroup(*why, tuple(nodes)) for why, nodes in groups.items())

    def node(self, name: str) -> NodeExplanation:
        """What is known about the node called ``name``.

        Raises:
            DataError: there is none; the message names the nearest one.
        """
        nodes = {_name(node): node for node in reversed(list(self.model.graph.all_nodes()))}
        node = nodes.get(name)
        if node is None:
            near = difflib.get_close_matches(name, nodes, n=1, cutoff=0.3)
            raise DataError(
                f"no node is called '{name}'",
                where=str(self.path),
                remedy=f"did you mean '{near[0]}'?" if near else "",
            )
        tensors = tuple(self._tensors(node))
        names = {tensor.tensor for tensor in tensors}
        told = (*self.diagnostics, *self.certificate.broken_rules)
        about = tuple(found for found in told if found.node == name or found.value in names - {""})
        kernel = self.kernel(node)
        chain = () if kernel or node.op_type in _BOUNDARY else tuple(self._chain(node))
        return NodeExplanation(name, node.op_type, bool(kernel), kernel, about, tensors, chain)

    @cached_property
    def _reasons(self) -> dict[str, Diagnostic]:
        """Why a node is in float, by its name; the last word counts, for it is that of the placement."""
        return {found.node: found for found in self.diagnostics if found.node and found.code in _FLOAT_CODES}

    def _could_be_integer(self, node: oir.Node) -> bool:
        return kernel_of(self.model, node, self.target) is not None or _name(node) in self._reasons

    def kernel(self, node: oir.Node) -> str:
        """The integer kernel ``node`` of :attr:`model` became; empty when it runs in float."""
        if node.op_type in _BOUNDARY:
            return ""
        kernel = self.certificate.kernel_of(node)
        if kernel is not None:
            return kernel
        data = node.inputs[0] if node.inputs else None
        return node.op_type if _is_on_integers(data) or _moves_integers(self.model, node, self.target) else ""

    def _why(self, node: oir.Node) -> tuple[str, str, str]:
        """Code, reason and remedy."""
        found = self._reasons.get(_name(node))
        if found is not None:
            # "Conv stays in float: " is what the reader knows already.
            return found.code, found.reason.split(" stays in float: ", 1)[-1], found.remedy
        if self.origin is None:
            return "", "unknown: the model was not made by qat2int8", ""
        data = [value for value in node.inputs if value is not None and self.model.constant(value) is None]
        if all(_dequantizer(value) is not None for value in data):
            return "", "the runtime did not fuse it", ""
        return "", "no integer kernel computes its input", ""

    def _tensors(self, node: oir.Node) -> list[TensorGrid]:
        operator = qoperator_of(node)
        if operator is not None:
            return self._tensors_of_operator(node, operator)
        roles = ("input", "weight", "bias") if layer_of(node) is not None else ()
        shown = []
        # A quantizer's scale and zero point, and the shapes and indices of data movement, are no tensors on grids.
        inputs = node.inputs[:1] if node.op_type in _BOUNDARY else node.inputs
        for index, value in enumerate(inputs):
            if value is None or value.dtype is oir.DataType.INT64:
                continue
            role = roles[index] if index < len(roles) else "input"
            dequantize = _dequantizer(value)
            if role == "weight" and self.model.constant(_source(value)) is None:
                role = "input"
            if _is_on_integers(value):
                shown.append(_on_grid(role, value, self._grid_above(value)))
            else:
                grid = None if dequantize is None else self._grid(dequantize)
                shown.append(_on_grid(role, _source(value), grid))
        for value in node.outputs:
            if _is_on_integers(value):
                shown.append(_on_grid("output", value, self._grid_above(value)))
                continue
            quantize = _quantizer(value)
            shown.append(_on_grid("output", value, None if quantize is None else self._grid_behind(quantize)))
        return shown

    def _tensors_of_operator(self, node: oir.Node, operator: QOperator) -> list[TensorGrid]:
        shown, grids = [], []
        for index, place in enumerate(operator.operands_of(node)):
            value = node.inputs[place.data]
            if value is None:
                continue
            axis = operator.weight_axis(node) if index == 1 else None
            weight = axis is not None and self.model.constant(value) is not None
            params = self._params(node, place.scale, place.zero_point, value.dtype, axis or 0)
            grids.append(_cut(self.model, params, value.producer()))
            shown.append(_on_grid("weight" if weight else "input", value, grids[-1]))
        slot = operator.bias if operator.bias is not None else operator.float_bias
        bias = node.inputs[slot] if slot is not None and slot < len(node.inputs) else None
        if bias is not None:
            shown.append(_on_grid("bias", bias, None if operator.bias is None else _product(grids)))
        result = node.outputs[0]
        return [*shown, _on_grid("output", result, self._written(node, operator))]

    def _written(self, node: oir.Node, operator: QOperator) -> QuantParams | None:
        """The grid of what an operator writes; None for floats."""
        if operator.result is None:
            return None
        params = self._params(node, *operator.result, node.outputs[0].dtype, 0)
        reader = reader_of(self.model, node.outputs[0])
        return params if reader is None else _cut(self.model, params, reader[0])

    def _grid_above(self, value: oir.Value) -> QuantParams | None:
        """The grid of 8-bit levels: that of the node they come from, however they were moved since."""
        maker = value.producer()
        while maker is not None:
            operator = qoperator_of(maker)
            if operator is not None:
                return self._written(maker, operator)
            if maker.op_type == "QuantizeLinear":
                return self._grid(maker)
            above = maker.inputs[0] if maker.inputs else None
            maker = above.producer() if above is not None else None
        return None

    def _grid_behind(self, quantize: oir.Node) -> QuantParams | None:
        """The grid of a quantizer, as narrow as its reader sees it."""
        value = quantize.outputs[0]
        while True:
            readers = [use.node for use in value.uses()]
            for reader in readers:
                if reader.op_type == "DequantizeLinear":
                    return self._grid(reader)
            clips = [reader for reader in readers if reader.op_type == "Clip"]
            if not clips:
                return self._grid(quantize)
            value = clips[0].outputs[0]

    def _grid(self, node: oir.Node) -> QuantParams | None:
        """The grid of a QuantizeLinear or DequantizeLinear; None when it is computed while the model runs."""
        if node.op_type == "DequantizeLinear":
            fake = recognise(self.model, node, constant=True)
            if isinstance(fake, FakeQuant):
                return fake.params
        return self._params(node, 1, 2, _stored(node), node.attributes.get_int("axis", 1))

    def _params(
        self, node: oir.Node, scale_at: int, zero_at: int, stored: oir.DataType | None, axis: int
    ) -> QuantParams | None:
        """The grid that two inputs of ``node`` say; None when they are computed while the model runs."""
        inputs = (*node.inputs, *(None,) * (max(scale_at, zero_at) + 1))
        scale = self.model.constant(inputs[scale_at])
        zero = np.int32(0) if inputs[zero_at] is None else self.model.constant(inputs[zero_at])
        dtype = None if stored is None else QuantDType.of_storage(stored)
        if scale is None or zero is None or dtype is None:
            return None
        try:
            return QuantParams.make(scale, zero, dtype, axis=axis)
        except InvalidModel:  # one scale per block, which the runtime can do
            return None

    def _chain(self, node: oir.Node) -> list[Cause]:
        """Breadth first, so that the nearest come first; a branch ends at a grid or at a node with a reason.

        Where the finding about ``node`` names one of its tensors, that one alone led there.
        """
        found = self._reasons.get(_name(node))
        blamed = found.value if found is not None else ""
        written = next((value for value in node.outputs if value.name and value.name == blamed), None)
        if written is not None:
            return [Cause(blamed, _name(node), node.op_type, self._missing(written))]
        reads = [value for value in node.inputs if value is not None]
        waiting = deque([value for value in reads if value.name == blamed] or reads)
        chain: list[Cause] = []
        seen: set[oir.Value] = set()
        while waiting:
            value = waiting.popleft()
            maker = value.producer()
            if value in seen or self.model.constant(value) is not None or _dequantizer(value) is not None:
                continue
            seen.add(value)
            if maker is None:
                chain.append(Cause(value.name or "", "", "", "it is an input of the graph"))
                continue
            chain.append(Cause(value.name or "", _name(maker), maker.op_type, self._fate(maker)))
            if _name(maker) not in self._reasons:
                waiting.extend(above for above in maker.inputs if above is not None)
        if not chain:
            result = node.outputs[0]
            if _quantizer(result) is None:
                chain.append(Cause(result.name or "", _name(node), node.op_type, self._missing(result)))
        return chain

    def _missing(self, value: oir.Value) -> str:
        """Why ``value``, which a float node computes, has no grid."""
        missing = (found for found in self.diagnostics if found.code is Code.SCALE_MISSING)
        return next((found.reason for found in missing if found.value == value.name), "no quantizer reads it")

    def _fate(self, node: oir.Node) -> str:
        """One sentence on a node that computes a tensor without a grid."""
        if self.kernel(node):
            return "runs in integers and ends in float"
        if _name(node) in self._reasons or kernel_of(self.model, node, self.target) is not None:
            return self._why(node)[1]
        return f"{self.target.name} has no integer kernel for it"


def explain(path: str | os.PathLike[str]) -> Explanation:
    """Read what the model file ``path`` says about itself, and ask onnxruntime how it runs it.

    Raises:
        InvalidModel: not a valid model, or its record of the conversion is damaged.
        UnsupportedModel: onnxruntime refuses it.
    """
    path = Path(path)
    model = load_model(path)
    for node in model.graph.all_nodes():
        node.name = _name(node)
    origin, diagnostics = _recorded(model, path)
    # A target file of one's own is not in the model, so the default stands in for it.
    target = target_of(model) or load_target(DEFAULT_TARGET)
    return Explanation(model, path, origin, target, diagnostics, certify(model, path, target))


def _recorded(model: Model, path: Path) -> tuple[Origin | None, tuple[Diagnostic, ...]]:
    props = model.ir.metadata_props
    if f"{_PREFIX}pipeline" not in props:
        return None, ()
    keys = ("version", "target", "pipeline", "source_sha256")
    origin = Origin(*(props.get(f"{_PREFIX}{key}", "") for key in keys))
    try:
        entries = json.loads(props.get(_DIAGNOSTICS, "[]"))
        return origin, tuple(_finding(entry) for entry in entries)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidModel(
            f"its record '{_DIAGNOSTICS}' cannot be read",
            where=str(path),
            remedy=f"convert the source again; this was written by version {origin.version or 'unknown'}",
        ) from error


def _finding(entry: dict[str, str]) -> Diagnostic:
    """The inverse of :meth:`Diagnostic.as_dict`; ValueError, TypeError, KeyError or AttributeError for others."""
    if not all(isinstance(text, str) for text in entry.values()):
        raise TypeError("a finding holds strings only")
    rest = {key: text for key, text in entry.items() if key not in ("code", "severity")}
    return Diagnostic(Code(entry["code"]), Severity(entry["severity"]), **rest)


def _name(node: oir.Node) -> str:
    """Its name, or that of what it writes."""
    return node.name or next((value.name for value in node.outputs if value.name), "")


def _dequantizer(value: oir.Value) -> oir.Node | None:
    maker = value.producer()
    return maker if maker is not None and maker.op_type == "DequantizeLinear" else None


def _quantizer(value: oir.Value) -> oir.Node | None:
    """What puts ``value`` on a grid, directly or behind the activation that the grid absorbs."""
    readers = [use.node for use in value.uses() if use.idx == 0]
    for reader in readers:
        if reader.op_type == "QuantizeLinear":
            return reader
    if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
        return next(
            (use.node for use in readers[0].outputs[0].uses() if use.node.op_type == "QuantizeLinear"), None
        )
    return None


def _stored(node: oir.Node) -> oir.DataType | None:
    """The integer type that a QuantizeLinear writes or a DequantizeLinear reads."""
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return node.inputs[2].dtype
    if node.op_type == "QuantizeLinear":
        return oir.DataType(node.attributes.get_int("output_dtype", 0) or oir.DataType.UINT8)
    return node.inputs[0].dtype if node.inputs[0] is not None else None


def _source(value: oir.Value) -> oir.Value:
    """The tensor in front of the quantizers of ``value``: the one the findings name, or the stored integers."""
    while (maker := value.producer()) is not None and maker.op_type in (*_BOUNDARY, "Clip"):
        above = maker.inputs[0]
        if above is None or (maker.op_type == "Clip" and not _is_on_integers(above)):
            break
        value = above
    return value


def _is_on_integers(value: oir.Value | None) -> bool:
    """Whether ``value`` holds 8-bit levels and not floats."""
    if value is None:
        return False
    maker = value.producer()
    stored = _stored(maker) if maker is not None and maker.op_type == "QuantizeLinear" else value.dtype
    return stored in (oir.DataType.INT8, oir.DataType.UINT8)


def _moves_integers(model: Model, node: oir.Node, target: Target) -> bool:
    """Whether the runtime drops the Dequantize and Quantize around data movement (its DropQDQNodesRules)."""
    kernel = kernel_of(model, node, target)
    if kernel is None or kernel.rule.contract is not Contract.MOVEMENT or not kernel.inputs:
        return False
    if _dequantizer(kernel.inputs[0]) is None:
        return False
    readers = [use.node.op_type for value in node.outputs for use in value.uses()]
    return bool(readers) and set(readers) == {"QuantizeLinear"}


def _cut(model: Model, params: QuantParams | None, node: oir.Node | None) -> QuantParams | None:
    """``params`` as narrow as ``node`` leaves it, in whole bits, where that is a Clip of the integers."""
    if params is None or params.per_channel or node is None or node.op_type != "Clip":
        return params
    bounds = [model.constant(bound) for bound in (*node.inputs, None, None)[1:3]]
    low, high = (
        end if bound is None else int(bound.item())
        for end, bound in zip((params.dtype.qmin, params.dtype.qmax), bounds, strict=True)
    )
    dtype = QuantDType(high.bit_length() + (low < 0), signed=low < 0, narrow_range=low < 0 and low == -high)
    fits = (dtype.qmin, dtype.qmax) == (low, high) and low <= int(params.zero_point.item()) <= high
    return params.with_(dtype=dtype) if fits else params


def _product(grids: list[QuantParams | None]) -> QuantParams | None:
    """The grid of an int32 bias: its step is the product of those of input and weight."""
    data, weight = grids
    if data is None or weight is None:
        return None
    return QuantParams.make(data.scale * weight.scale, 0, INT32, axis=0)


def _on_grid(role: str, value: oir.Value, params: QuantParams | None) -> TensorGrid:
    if params is None:
        return TensorGrid(role, value.name or "", "", "")
    # Who said so, which a grid's text ends with, cannot be read from the nodes.
    return TensorGrid(role, value.name or "", str(params).rpartition(" (")[0], str(params.interval))
