"""Place Quantize and Dequantize so that the target runs integer kernels."""

from __future__ import annotations

import difflib
import enum
import fnmatch
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import (
    INT8,
    INT32,
    Code,
    Contract,
    Diagnostic,
    Fact,
    Interval,
    Model,
    PassFailed,
    Provenance,
    QuantDType,
    QuantParams,
    Severity,
)
from qat2int8.ir.quant import FloatArray
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.kernels import Kernel, kernel_of, quantized_outputs
from qat2int8.passes.output_channel import output_channel_axis
from qat2int8.passes.qdq_writer import BIAS_LIMIT, QdqWriter, symmetric_int8
from qat2int8.passes.registry import register
from qat2int8.passes.scale_groups import is_movement


class OnMissingScale(enum.StrEnum):
    """What to do with a node whose op was asked for by name and whose scales are missing."""

    ERROR = "error"
    FLOAT = "float"


@register
@dataclass(frozen=True)
class InsertQuantizeDequantize(Pass):
    """Give every node that the target can run in integers its Q/DQ contract, and explain the others.

    Each tensor gets one quantizer that all its integer consumers share; when an integer kernel computes the
    tensor, everyone reads it dequantized. Activations are lowered to the target's type (int8 around 0 becomes
    uint8 around 128: bit exact), weights become int8 with zero point 0 (int8 weights keep theirs where the
    target's kernels take one), biases int32 with step ``input_scale * weight_scale`` where the target wants that;
    one that does not fit widens its channel's weight step and says so.
    Elementwise ops and data movement join where an integer kernel computes one of their inputs; an elementwise
    op asked for by name joins wherever it has grids.

    Options:
        quantize_ops: op types to quantize; empty means every op the target supports.
        skip_nodes: names or ``*`` patterns of nodes to leave in float.
        on_missing_scale: ``error`` (default) or ``float``, for ops named in ``quantize_ops``.
        skip_first_conv: whether the first Conv stays in float, as PaddlePaddle's Calibrator leaves it.
        float_weights: whether weights stay float32 in the file, behind a Quantize that the runtime computes once,
            on loading. Passes that rearrange integer weights (stems) leave such layers alone.

    Raises:
        PassFailed: an unknown op, a pattern that fits no node, or a missing scale of an op asked for by name.
    """

    name = "insert-quantize-dequantize"
    requires = frozenset({Fact.NO_FAKE_QUANT, Fact.FLOAT_WEIGHTS, Fact.WEIGHT_SCALES})
    provides = frozenset({Fact.QDQ_PLACED})
    invalidates = frozenset({Fact.FLOAT_WEIGHTS, Fact.NO_FAKE_QUANT})
    numerics = Numerics.QUANTIZING

    quantize_ops: tuple[str, ...] = ()
    skip_nodes: tuple[str, ...] = ()
    on_missing_scale: OnMissingScale = OnMissingScale.ERROR
    skip_first_conv: bool = False
    float_weights: bool = False

    def run(self, model: Model, ctx: Context) -> PassResult:
        unknown = [op for op in self.quantize_ops if op not in ctx.target.ops]
        if unknown:
            raise PassFailed(
                f"{ctx.target.name} has no integer kernel for op '{unknown[0]}'",
                remedy=f"supported: {', '.join(sorted(ctx.target.ops))}",
            )
        placement = _Placement(self, model, ctx)
        placement.note_weights_only()
        placement.choose()
        placement.note_dropped()
        placement.write()
        return PassResult(placement.counts, tuple(placement.diagnostics))


class _Placement:
    def __init__(self, owner: InsertQuantizeDequantize, model: Model, ctx: Context) -> None:
        self.owner = owner
        self.model = model
        self.target = ctx.target
        self.skipped = self._match_skipped()
        self.chosen: dict[oir.Node, Kernel] = {}
        self.computed: set[oir.Value] = set()
        """Tensors that a chosen kernel computes."""
        self.weights: dict[oir.Node, QuantParams] = {}
        """int8 grids of the weights of the chosen kernels."""
        given = [value.is_initializer() for value in model.scales]
        self.weights_only = bool(given) and all(given)
        """Whether no activation has a grid, and weights have."""
        self.diagnostics: list[Diagnostic] = []
        self.counts: dict[str, int] = {}
        self.tensors: dict[oir.Value, QuantParams] = {}
        """Activations that get a quantizer."""

    def choose(self) -> None:
        """Decide which nodes become integer kernels."""
        for node in self.model.graph.all_nodes():
            kernel = kernel_of(self.model, node, self.target)
            if kernel is None:
                self._explain_unsupported(node)
                continue
            if _is_placed(kernel):
                continue
            reason = self._obstacle(kernel)
            if reason is None:
                self.chosen[node] = kernel
                self.counts[node.op_type] = self.counts.get(node.op_type, 0) + 1
                self._claim(kernel)
                self._note_activation(kernel)
            elif kernel.rule.contract is not Contract.MOVEMENT or node in self.skipped or self._is_fed(kernel):
                self.diagnostics.append(reason)
        for value in quantized_outputs(self.model, self.target) if self.chosen else ():
            if self._lowered(value) is not None:
                self.tensors.setdefault(value, self._grid(value))
                self.computed.add(value)

    def _claim(self, kernel: Kernel) -> None:
        for value in kernel.inputs:
            self.tensors.setdefault(value, self._grid(value))
        if self._quantizes_output(kernel):
            for value in kernel.outputs:
                self.tensors.setdefault(value, self._grid(value))
                self.computed.add(value)

    def _note_activation(self, kernel: Kernel) -> None:
        """A Relu or Clip whose grid does not do its clamping runs in float between two quantizers."""
        result = kernel.node.outputs[0]
        readers = [use.node for use in result.uses()]
        if kernel.activation is not None or len(readers) != 1 or result.is_graph_output():
            return
        activation = readers[0]
        params = (
            self.model.scales.get(activation.outputs[0]) if activation.op_type in kernel.rule.absorbs else None
        )
        if params is not None:
            self.diagnostics.append(
                self.owner.note(
                    Code.ACTIVATION_NOT_ABSORBED,
                    f"{activation.op_type} runs in float: its output's grid {params} does not clamp where it does",
                    node=activation.name or "",
                    value=activation.outputs[0].name or "",
                    severity=Severity.NOTE,
                    remedy="train its output on a grid that begins at zero and ends within the clamp",
                )
            )

    def write(self) -> None:
        """Put the nodes in."""
        writer = QdqWriter(self.model)
        for node, kernel in self.chosen.items():
            if kernel.weight is not None:
                self._write_weight_and_bias(writer, kernel)
            for value in set(kernel.constants):
                self._write_constant(writer, node, value)
        for value, params in self.tensors.items():
            reads = None if value in self.computed else self._reads_integers
            writer.quantizer(value, params, reads, integer_clip=self.target.integer_clip)

    def note_weights_only(self) -> None:
        """Say once, instead of at every layer, that nothing but weights was fake quantized."""
        if self.weights_only:
            self.diagnostics.append(
                self.owner.note(
                    Code.SCALE_MISSING,
                    "only weights were fake quantized: no activation has a grid, so every layer stays in float",
                    remedy=_CALIBRATE,
                )
            )

    def note_dropped(self) -> None:
        """Say which trained grids take part in nothing: their tensors are read more finely than in training."""
        for value, params in self.model.scales.items():
            unread = value in self.tensors or value.is_initializer() or params.source < Provenance.TRAINED
            if unread or self._is_looked_up(value, params):
                continue
            if any(use.node.op_type == "QuantizeLinear" for use in value.uses()):
                continue
            producer = value.producer()
            if producer is not None and producer.op_type == "DequantizeLinear":
                continue  # a caller hands it in on its grid
            reason = (
                f"no integer kernel touches it, so it is not put on {params} from {params.origin}"
                if self.target.placement == "around"
                else f"{self.target.name} quantizes the inputs of layers, so it is not put on {params} from "
                f"{params.origin}"
            )
            self.diagnostics.append(
                self.owner.note(
                    Code.FAKE_QUANT_DROPPED,
                    reason,
                    severity=Severity.NOTE,
                    value=value.name or "",
                )
            )

    def _is_looked_up(self, value: oir.Value, params: QuantParams) -> bool:
        """Whether ``value`` lies on its grid as it is, because it consists of elements of a constant that does."""
        node = value.producer()
        table = node.inputs[0] if node is not None and is_movement(self.model, node) else None
        if table is None or self.model.constant(table) is None:
            return False
        grid = self.model.scales.get(table)
        return grid is not None and grid.same_grid(params)

    def _reads_integers(self, node: oir.Node, index: int) -> bool:
        kernel = self.chosen.get(node)
        return kernel is not None and node.inputs[index] in kernel.inputs

    # Which nodes can be integer kernels

    def _obstacle(self, kernel: Kernel) -> Diagnostic | None:
        """Why ``kernel`` stays in float, or None when it can be placed."""
        node = kernel.node
        if node in self.skipped:
            return self._kept(kernel, "left in float as asked", code=Code.NODE_SKIPPED, severity=Severity.NOTE)
        if self.owner.quantize_ops and node.op_type not in self.owner.quantize_ops:
            return self._kept(
                kernel,
                f"{node.op_type} is not among the ops to quantize",
                code=Code.NODE_SKIPPED,
                severity=Severity.NOTE,
            )
        for value in (*kernel.inputs, *kernel.constants):
            if value.dtype not in (None, oir.DataType.FLOAT):
                return self._kept(kernel, f"it computes in {value.dtype}, kernels start from FLOAT", value=value)
        for value in kernel.constants:
            array = self.model.constant(value)
            if array is None or not array.size or not np.all(np.isfinite(array)):
                return self._kept(kernel, "no grid holds its constant operand", value=value)
        if kernel.rule.contract is Contract.COMPUTE:
            return self._compute_obstacle(kernel)
        if kernel.rule.contract is Contract.MOVEMENT:
            return self._movement_obstacle(kernel)
        if self.target.placement == "inputs":
            return self._inputs_obstacle(kernel)
        return self._elementwise_obstacle(kernel)

    def _inputs_obstacle(self, kernel: Kernel) -> Diagnostic | None:
        """Why no quantizer is put on the inputs of an op that is no layer."""
        residual = kernel.rule.contract is Contract.RESIDUAL
        fused = [value for value in kernel.node.inputs if value is not None and value not in kernel.inputs]
        if residual and not any(value.producer() in self.chosen for value in fused):
            return self._kept(kernel, "no integer kernel computes its inputs", severity=Severity.NOTE)
        for value in kernel.inputs:
            params = self.model.scales.get(value)
            if not residual and (params is None or params.source < Provenance.CALIBRATED):
                reason = "training put no fake quant on what it reads"
                return self._kept(kernel, reason, value=value, severity=Severity.NOTE)
            if self._lowered(value) is None:
                return self._missing(kernel, value)
        return None

    def _movement_obstacle(self, kernel: Kernel) -> Diagnostic | None:
        if not self._is_fed(kernel):
            return self._kept(kernel, "no integer kernel computes its input", severity=Severity.NOTE)
        for value in (*kernel.inputs, *kernel.outputs):
            if self._lowered(value) is None:
                return self._missing(kernel, value)
        for value in kernel.outputs:
            # A MaxPool takes the second grid, to which optimize-int8 brings its input.
            other = not self._grid(kernel.inputs[0]).same_grid(self._grid(value))
            if other and kernel.node.op_type != "MaxPool":
                return self._kept(kernel, "its input and output lie on different grids", value=value)
        return None

    def _elementwise_obstacle(self, kernel: Kernel) -> Diagnostic | None:
        asked = kernel.node.op_type in self.owner.quantize_ops and bool(kernel.inputs)
        if not asked and not self._is_fed(kernel):
            return self._kept(kernel, "no integer kernel computes its inputs", severity=Severity.NOTE)
        for value in (*kernel.inputs, *kernel.outputs):
            if self._lowered(value) is None:
                return self._missing(kernel, value)
        if not self._output_has_grid(kernel):
            return self._output_kept(kernel)
        return None

    def _is_fed(self, kernel: Kernel) -> bool:
        """Whether an integer kernel computes an input of ``kernel``."""
        return any(value in self.computed for value in kernel.inputs)

    def _compute_obstacle(self, kernel: Kernel) -> Diagnostic | None:
        node = kernel.node
        attributes = node.attributes
        if node.op_type == "Gemm" and (
            attributes.get_float("alpha", 1.0) != 1.0
            or (kernel.bias is not None and attributes.get_float("beta", 1.0) != 1.0)
            or attributes.get_int("transA", False)
        ):
            return self._kept(
                kernel, "the integer Gemm takes neither alpha nor beta nor transA", remedy="fold them"
            )
        if not kernel.inputs:
            return self._kept(kernel, "it reads constants only", remedy="fold constants before")
        for value in kernel.inputs:
            if self._lowered(value) is None:
                return self._missing(kernel, value)
        if kernel.weight is not None:
            obstacle = self._weight_obstacle(kernel)
            if obstacle is not None:
                return obstacle
        if kernel.bias is not None and self.target.int32_bias:
            bias = self._bias_array(kernel)
            if bias is None or not np.all(np.isfinite(bias)):
                reason = "its bias is not one finite constant per channel of a constant weight"
                return self._kept(kernel, reason, value=kernel.bias)
        output = kernel.output
        if output is None or self._output_has_grid(kernel) or kernel.rule.float_output:
            return None
        return self._output_kept(kernel) if output.is_graph_output() else self._missing(kernel, output)

    def _weight_obstacle(self, kernel: Kernel) -> Diagnostic | None:
        weight = kernel.weight
        assert weight is not None
        params = self.model.scales.get(weight)
        if params is None:
            return self._missing(kernel, weight)
        if params.dtype.bits > INT8.bits:
            return self._kept(kernel, f"its weight grid {params} does not fit int8", value=weight)
        axis = self._weight_axis(kernel)
        array = self.model.constant(weight)
        assert array is not None
        lowered = params
        if params.dtype not in _INT8_TYPES or self.target.weight_zero_point != "any":
            lowered = symmetric_int8(params, array, axis if self.target.per_channel_weights else None)
        if lowered.per_channel and (lowered.axis != axis or not self.target.per_channel_weights):
            return self._kept(
                kernel,
                f"its weight has a step per channel of axis {lowered.axis}, the kernel takes axis {axis}",
                value=weight,
                remedy="quantize the weight per output channel",
            )
        self.weights[kernel.node] = lowered
        return None

    def _weight_axis(self, kernel: Kernel) -> int | None:
        """Output-channel axis of the constant weight; None where it may only have one step."""
        weight = self.model.constant(kernel.weight)
        if weight is None or kernel.rule.weight_axis is None:
            return None
        return output_channel_axis(kernel.node, weight.ndim)

    def _output_has_grid(self, kernel: Kernel) -> bool:
        output = kernel.output
        if output is None or self._lowered(output) is None:
            return False
        return not output.is_graph_output() or self.model.scales[output].source >= Provenance.CALIBRATED

    def _quantizes_output(self, kernel: Kernel) -> bool:
        output = kernel.output
        if output is None or not self._output_has_grid(kernel):
            return False
        trained = self.model.scales[output].source >= Provenance.CALIBRATED
        return trained or not kernel.rule.float_output

    def _lowered(self, value: oir.Value) -> QuantParams | None:
        params = self.model.scales.get(value)
        return None if params is None else self.target.lower(params)

    def _grid(self, value: oir.Value) -> QuantParams:
        lowered = self._lowered(value)
        assert lowered is not None
        return lowered

    # Constants

    def _write_weight_and_bias(self, writer: QdqWriter, kernel: Kernel) -> None:
        node, params = kernel.node, self.weights[kernel.node]
        assert kernel.weight is not None
        self._report_requantized(kernel, params)
        bias = self._bias_array(kernel) if self.target.int32_bias else None
        if bias is not None:
            input_step = self._grid(kernel.inputs[0]).scale
            params = self._fit_bias(kernel, params, bias, input_step)
            step = np.asarray(input_step * params.scale, np.float32)
            levels = np.rint(bias.astype(np.float64) / step.astype(np.float64)).astype(np.int32)
            name = (kernel.bias.name if kernel.bias is not None else None) or f"{node.name}_bias"
            grid = QuantParams.make(step, 0, INT32, axis=0, source=params.source, origin=params.origin)
            node.replace_input_with(2, writer.dequantized(levels, grid, name, node))
        array = self.model.constant(kernel.weight)
        assert array is not None
        if self.owner.float_weights and array.dtype == np.float32:
            node.replace_input_with(1, writer.quantized_at_load(kernel.weight, params, node))
            return
        node.replace_input_with(
            1,
            writer.constant(
                kernel.weight, _requantized(array, self.model.scales[kernel.weight], params), params, node
            ),
        )

    def _report_requantized(self, kernel: Kernel, params: QuantParams) -> None:
        assert kernel.weight is not None
        trained = self.model.scales[kernel.weight]
        steps = np.broadcast_to(trained.scale, params.scale.shape)
        widened = int(np.count_nonzero(params.scale != steps))
        if widened:
            self.diagnostics.append(
                self.owner.note(
                    Code.WEIGHT_REQUANTIZED,
                    f"the weight lies off centre: {widened} of {params.scale.size} steps were widened to fit int8 "
                    "with zero point 0",
                    node=kernel.node.name or "",
                    value=kernel.weight.name or "",
                    remedy="train with a symmetric weight grid",
                )
            )

    def _bias_array(self, kernel: Kernel) -> FloatArray | None:
        """The constant bias as shape (C,), or None when there is none or it is not one number a channel."""
        array = self.model.constant(kernel.bias)
        weight = self.model.constant(kernel.weight)
        if array is None or weight is None:
            return None
        channels = weight.shape[self._weight_axis(kernel) or 0]
        if array.size == 1:
            return np.full(channels, array.reshape(-1)[0], np.float32)
        if array.size != channels or array.shape[-1] != channels:
            return None
        return array.reshape(-1).astype(np.float32)

    def _fit_bias(
        self,
        kernel: Kernel,
        params: QuantParams,
        bias: FloatArray,
        input_step: FloatArray,
    ) -> QuantParams:
        """``params``, its steps widened where ``bias`` or the step of the bias would leave their number type."""
        limit = np.maximum(np.abs(bias.astype(np.float64)) / BIAS_LIMIT, _SMALLEST_STEP)
        needed = limit * (1.0 + 1e-6) / float(input_step)
        steps = np.broadcast_to(params.scale, bias.shape).astype(np.float64)
        short = int(np.count_nonzero(needed > steps))
        if not short:
            return params
        self.diagnostics.append(
            self.owner.note(
                Code.BIAS_OVERFLOW,
                f"the bias of {short} channels does not fit int32, their weight steps were widened",
                node=kernel.node.name or "",
                value=kernel.bias.name or "" if kernel.bias is not None else "",
                remedy="train with a smaller bias, or with a coarser grid for weight or input",
            )
        )
        widened = np.maximum(steps, needed).astype(np.float32)
        axis = self._weight_axis(kernel)
        if not self.target.per_channel_weights or axis is None:
            return params.with_(scale=widened.max(), zero_point=params.zero_point, axis=None)
        zeros = np.broadcast_to(params.zero_point, widened.shape)
        return params.with_(scale=widened, zero_point=zeros, axis=axis)

    def _write_constant(self, writer: QdqWriter, node: oir.Node, value: oir.Value) -> None:
        array = self.model.constant(value)
        assert array is not None
        trained, params = self.model.scales.get(value), self._lowered(value)
        if trained is None or params is None:
            span = Interval(float(array.min()), float(array.max()))
            params = trained = self.target.grid_for(span, source=Provenance.COMPUTED, origin="constant")
        quantized = writer.constant(value, _requantized(array, trained, params), params, node)
        for index, operand in enumerate(node.inputs):
            if operand is value:
                node.replace_input_with(index, quantized)

    # What to say

    def _missing(self, kernel: Kernel, value: oir.Value) -> Diagnostic:
        node = kernel.node
        asked = node.op_type in self.owner.quantize_ops
        if asked and self.owner.on_missing_scale is OnMissingScale.ERROR:
            raise PassFailed(
                f"{node.op_type} was asked for, but tensor '{value.name}' has no scale",
                where=f"node '{node.name}'",
                remedy="skip the node, or say --on-missing-scale float",
            )
        params = self.model.scales.get(value)
        if params is not None:
            return self._kept(kernel, f"{self.target.name} cannot hold its grid {params}", value=value)
        role = "weight" if value is kernel.weight else "output" if value is kernel.output else "input"
        if self.weights_only:
            reason = f"its {role} has no grid, as only weights were fake quantized"
            return self._kept(kernel, reason, value=value, severity=Severity.NOTE, remedy=_CALIBRATE)
        return self._kept(
            kernel, f"its {role} has no grid", value=value, remedy="train with a fake quant on it, or give data"
        )

    def _output_kept(self, kernel: Kernel) -> Diagnostic:
        return self._kept(
            kernel,
            "it computes a graph output that no fake quant gave a grid",
            value=kernel.output,
            code=Code.OUTPUT_KEPT_FLOAT,
            remedy="train with a fake quant on the output",
        )

    def _kept(
        self,
        kernel: Kernel,
        reason: str,
        *,
        value: oir.Value | None = None,
        code: Code = Code.KEPT_FLOAT,
        severity: Severity = Severity.WARNING,
        remedy: str = "",
    ) -> Diagnostic:
        return self.owner.note(
            code,
            f"{kernel.node.op_type} stays in float: {reason}",
            node=kernel.node.name or "",
            value=value.name or "" if value is not None else "",
            severity=severity,
            remedy=remedy,
        )

    def _explain_unsupported(self, node: oir.Node) -> None:
        rule = self.target.ops.get(node.op_type) if node.domain == "" else None
        if rule is None and node.domain == "" and node.op_type in _HEAVY_WITHOUT_KERNEL:
            code, reason = Code.UNSUPPORTED_OP, f"{self.target.name} has no integer kernel for {node.op_type}"
        elif rule is not None and rule.contract is Contract.COMPUTE and node.graph is not self.model.graph:
            code = Code.KEPT_FLOAT
            reason = f"{node.op_type} stays in float: it stands in the body of a control flow node"
        else:
            return
        self.diagnostics.append(self.owner.note(code, reason, node=node.name or ""))

    def _match_skipped(self) -> set[oir.Node]:
        skipped = set(itertools.islice(self.model.nodes("Conv"), self.owner.skip_first_conv))
        names = {node.name or "": node for node in self.model.nodes()}
        for pattern in self.owner.skip_nodes:
            found = [names[pattern]] if pattern in names else _matching(names, pattern)
            if not found:
                near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3)
                raise PassFailed(
                    f"no node is called '{pattern}'", remedy=f"did you mean '{near[0]}'?" if near else ""
                )
            skipped.update(found)
        return skipped


_INT8_TYPES = (INT8, QuantDType(8, signed=True, narrow_range=True))

_CALIBRATE = "train with fake quant on activations too, or find their ranges on data"

_SMALLEST_STEP = float(np.finfo(np.float32).tiny)
"""The step of a bias is a product of two steps and must not vanish."""

_HEAVY_WITHOUT_KERNEL = frozenset({"ConvTranspose", "Einsum", "GRU", "LSTM", "RNN"})


def _matching(names: dict[str, oir.Node], pattern: str) -> list[oir.Node]:
    return [names[name] for name in fnmatch.filter(names, pattern)]


def _is_placed(kernel: Kernel) -> bool:
    """Whether the node has its contract already: everything it computes with comes dequantized."""
    if kernel.weight is not None or kernel.constants or not kernel.inputs:
        return False
    producers = [value.producer() for value in kernel.inputs]
    return all(producer is not None and producer.op_type == "DequantizeLinear" for producer in producers)


def _requantized(array: npt.NDArray[Any], trained: QuantParams, written: QuantParams) -> npt.NDArray[Any]:
    """``array`` as levels of ``written``, after the saturation of the grid it was trained on.

    Where both have the same steps these are the trained integers themselves.
    """
    return written.quantize(trained.dequantize(trained.quantize(array)))
