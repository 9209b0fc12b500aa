"""How a node would run as an integer kernel of the target: which tensors it needs grids for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import Contract, Model, OpRule, Provenance, Target
from qat2int8.passes.clamp import read_clamp
from qat2int8.passes.scale_groups import is_movement

__all__ = ["Kernel", "absorbs", "kernel_of", "quantized_outputs"]


@dataclass(frozen=True, eq=False)
class Kernel:
    """One node seen as an integer kernel.

    Attributes:
        node: the node.
        rule: what the target says of its op type.
        inputs: activations that need grids.
        constants: constant operands of an elementwise op, to be quantized with the node.
        weight: the constant second input of a Conv, Gemm or MatMul.
        bias: the third input of a Conv or Gemm.
        outputs: the tensors that carry the kernel's results and need grids: behind ``activation`` where there is
            one, and all of them where data is split. None where the target quantizes the inputs of layers only.
        activation: the Relu or Clip that the output's quantizer absorbs.
    """

    node: oir.Node
    rule: OpRule
    inputs: tuple[oir.Value, ...]
    constants: tuple[oir.Value, ...]
    weight: oir.Value | None
    bias: oir.Value | None
    outputs: tuple[oir.Value, ...]
    activation: oir.Node | None

    @property
    def output(self) -> oir.Value | None:
        """The first of :attr:`outputs`, the only one of most ops."""
        return self.outputs[0] if self.outputs else None


def kernel_of(model: Model, node: oir.Node, target: Target) -> Kernel | None:
    """``node`` as a kernel of ``target``, or None when the target has no integer kernel for what it does.

    Arithmetic on shapes and indices, which are integers in the source already, is no kernel either.
    """
    rule = target.ops.get(node.op_type) if node.domain == "" else None
    if rule is None or node.graph is not model.graph:
        return None
    if rule.contract is Contract.MOVEMENT and not is_movement(model, node):
        return None
    weight = bias = None
    if rule.contract is Contract.COMPUTE:
        operands = [node.inputs[0]]
        second = node.inputs[1]
        if model.constant(second) is not None:
            weight = second
        else:
            operands.append(second)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
    elif rule.contract is Contract.RESIDUAL:
        shortcut = _shortcut(model, node)
        if shortcut is None:
            return None
        operands = [shortcut]
    elif rule.data_inputs == (-1,):
        operands = list(node.inputs)
    else:
        operands = [node.inputs[index] for index in rule.data_inputs]
    present = [value for value in operands if value is not None]
    if any(value.dtype is not None and value.dtype.is_integer() for value in present):
        return None
    constants = tuple(value for value in present if model.constant(value) is not None)
    inputs = tuple(value for value in present if model.constant(value) is None)
    if target.placement == "inputs":
        return Kernel(node, rule, inputs, constants, weight, bias, (), None)
    activation = _absorbed_activation(model, node, target)
    outputs = node.outputs[:1] if activation is None else activation.outputs
    if node.op_type == "Split":
        outputs = node.outputs
    return Kernel(node, rule, inputs, constants, weight, bias, tuple(outputs), activation)


def quantized_outputs(model: Model, target: Target) -> list[oir.Value]:
    """Graph outputs that get a quantizer although no layer reads them: those whose grid was trained.

    Only where no kernel's output is quantized otherwise: there callers would see values beyond where training
    saturated.
    """
    if target.placement == "around":
        return []
    trained = (value for value in model.graph.outputs if value.producer() is not None and value in model.scales)
    return [value for value in trained if model.scales[value].source >= Provenance.CALIBRATED]


def _shortcut(model: Model, add: oir.Node) -> oir.Value | None:
    """The input of an Add that a convolution does not compute into it; None where no convolution computes either.

    Between two convolutions the shortcut is the one that reads what something else reads as well: the block's
    input.
    """
    behind = [_convolution(model, value) for value in add.inputs]
    if len(behind) != 2 or add.inputs[0] is add.inputs[1]:
        return None
    first, second = behind
    if first is None and second is None:
        return None
    if first is not None and second is not None:
        shared = [conv.inputs[0] is not None and len(conv.inputs[0].uses()) > 1 for conv in (first, second)]
        return add.inputs[0] if shared == [True, False] else add.inputs[1]
    return add.inputs[0] if first is None else add.inputs[1]


def _convolution(model: Model, value: oir.Value | None) -> oir.Node | None:
    """The convolution that computes ``value`` for one reader alone."""
    node = value.producer() if value is not None else None
    if (
        node is None
        or value is None
        or node.op_type != "Conv"
        or node.domain != ""
        or node.graph is not model.graph
    ):
        return None
    return node if len(value.uses()) == 1 and not value.is_graph_output() else None


def _absorbed_activation(model: Model, node: oir.Node, target: Target) -> oir.Node | None:
    """The Relu or Clip behind ``node`` that its output's grid computes by saturating, if there is one.

    A tensor that has no grid yet counts as absorbing: the grid it will get starts where the activation clamps.
    """
    result = node.outputs[0]
    uses = list(result.uses())
    if len(uses) != 1 or uses[0].idx != 0 or result.is_graph_output():
        return None
    activation = uses[0].node
    if (
        activation.op_type not in target.ops[node.op_type].absorbs
        or activation.domain != ""
        or activation.graph is not model.graph
    ):
        return None
    params = model.scales.get(activation.outputs[0])
    if params is None:
        return activation
    if params.per_channel:
        return None
    params = target.lower(params) or params
    levels = params.dtype.qmin, params.dtype.qmax
    return activation if absorbs(model, activation, params.scale, int(params.zero_point), levels) else None


def absorbs(
    model: Model, activation: oir.Node, scale: npt.NDArray[np.float32], zero: int, levels: tuple[int, int]
) -> bool:
    """Whether quantizing to ``levels`` (lowest, highest) clamps at least as much as ``activation`` does.

    Decided on the integers, as onnxruntime does: the bounds of the Relu or Clip must round to the outermost
    levels or lie beyond them.
    """
    clamp = read_clamp(model, activation)
    if clamp is None:
        return False
    with np.errstate(over="ignore"):
        lowest, highest = (np.rint(np.float32(bound) / scale) + zero for bound in (clamp.span.lo, clamp.span.hi))
    return bool(lowest <= levels[0] and highest >= levels[1])
