"""How a node would run as an integer kernel of the target: which tensors it needs grids for."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as oir

from qat2int8.ir import Contract, Model, OpRule, QuantParams, Target
from qat2int8.passes.scale_groups import is_movement

__all__ = ["Kernel", "absorbs", "kernel_of"]


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
        output: the tensor that carries the kernel's result: behind ``activation`` where there is one.
        activation: the Relu or Clip that the output's quantizer absorbs.
    """

    node: oir.Node
    rule: OpRule
    inputs: tuple[oir.Value, ...]
    constants: tuple[oir.Value, ...]
    weight: oir.Value | None
    bias: oir.Value | None
    output: oir.Value
    activation: oir.Node | None


def kernel_of(model: Model, node: oir.Node, target: Target) -> Kernel | None:
    """``node`` as a kernel of ``target``, or None when the target has no integer kernel for its op."""
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
    elif rule.data_inputs == (-1,):
        operands = list(node.inputs)
    else:
        operands = [node.inputs[index] for index in rule.data_inputs]
    present = [value for value in operands if value is not None]
    constants = tuple(value for value in present if model.constant(value) is not None)
    inputs = tuple(value for value in present if model.constant(value) is None)
    activation = absorbed_activation(model, node, rule)
    output = activation.outputs[0] if activation is not None else node.outputs[0]
    return Kernel(node, rule, inputs, constants, weight, bias, output, activation)


def absorbed_activation(model: Model, node: oir.Node, rule: OpRule) -> oir.Node | None:
    """The Relu or Clip behind ``node`` that its output's grid computes by saturating, if there is one.

    A tensor that has no grid yet counts as absorbing: the grid it will get starts where the activation clamps.
    """
    result = node.outputs[0]
    uses = list(result.uses())
    if len(uses) != 1 or result.is_graph_output():
        return None
    activation = uses[0].node
    if activation.op_type not in rule.absorbs or activation.domain != "" or activation.graph is not model.graph:
        return None
    params = model.scales.get(activation.outputs[0])
    return activation if params is None or absorbs(model, params, activation) else None


def absorbs(model: Model, params: QuantParams, activation: oir.Node) -> bool:
    """Whether quantizing to ``params`` clamps at least as much as ``activation`` (Relu or Clip) does.

    Decided on the integers, as onnxruntime does: the bounds must round to the first and last level.
    """
    if params.per_channel:
        return False
    zero, scale = int(params.zero_point), float(params.scale)

    def level(bound: float) -> float:
        return round(bound / scale) + zero

    if activation.op_type == "Relu":
        return level(0.0) <= params.dtype.qmin
    bounds = [
        model.constant(value) if value is not None else None for value in (*activation.inputs, None, None)[1:3]
    ]
    for value, bound in zip((*activation.inputs, None, None)[1:3], bounds, strict=True):
        if value is not None and (bound is None or bound.size != 1):
            return False
    lo, hi = (None if bound is None else float(bound.reshape(())[()]) for bound in bounds)
    return (lo is None or level(lo) <= params.dtype.qmin) and (hi is None or level(hi) >= params.dtype.qmax)
