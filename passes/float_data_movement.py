"""Let data movement between Quantize and Dequantize run on floats, so that the pair stands side by side."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as oir

from qat2int8.ir import Fact, Model
from qat2int8.passes.base import Context, Pass, PassResult
from qat2int8.passes.registry import register


@register
@dataclass(frozen=True)
class FloatDataMovement(Pass):
    """Move a DequantizeLinear up through data movement and MaxPool, to right behind what made its integers.

    ``Q -> Transpose -> DQ`` becomes ``Q -> DQ -> Transpose``, the form in which the pair is recognised as fake
    quant. One scale above 0 and one zero point for the whole tensor commute with every node that only picks, moves
    or repeats elements, and with a maximum. Integers that are read otherwise as well are still moved as integers.

    A constant is not dequantized before it is moved: what looks up one row of a table would need it in float.
    """

    name = "float-data-movement"
    requires = frozenset({Fact.CONSTANTS_LIFTED})

    def run(self, model: Model, ctx: Context) -> PassResult:
        moved = 0
        above: dict[tuple[oir.Value | None, ...], oir.Value] = {}
        stack = [node for node in reversed(list(model.nodes())) if _is_plain(model, node)]
        while stack:
            dequantize = stack.pop()
            movement = _movement(model, dequantize)
            if movement is None:
                continue
            operands = list[oir.Value | None](movement.inputs)
            for index in _operands(movement):
                operands[index], made = _dequantized(model, movement, index, dequantize, above)
                if made is not None:
                    stack.append(made)
            key = tuple(dequantize.inputs)
            result = _replace(model, movement, operands, dequantize)
            if key in above:
                above[key] = result  # one that was made for another, and now moved on itself
            moved += 1
        return PassResult({"dequantizers moved": moved})


def _is_plain(model: Model, node: oir.Node) -> bool:
    """Whether ``node`` is a DequantizeLinear with one constant scale above 0 and one zero point."""
    if node.op_type != "DequantizeLinear" or node.domain not in ("", "com.microsoft") or len(node.inputs) < 2:
        return False
    scale = model.constant(node.inputs[1])
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    if scale is None or scale.size != 1 or not float(scale.item()) > 0:
        return False
    return zero_point is None or model.constant(zero_point) is not None


def _movement(model: Model, dequantize: oir.Node) -> oir.Node | None:
    """The node that moved the integers of ``dequantize``, when it could as well move floats."""
    integers = dequantize.inputs[0]
    node = None if integers is None else integers.producer()
    if node is None or node.domain or node.op_type not in _MOVEMENTS:
        return None
    if any(output.name and (output.uses() or output.is_graph_output()) for output in node.outputs[1:]):
        return None  # the second output of a MaxPool
    operands = [node.inputs[index] for index in _operands(node)]
    if any(value is None or value.is_initializer() for value in operands):
        return None
    return node


def _operands(movement: oir.Node) -> range:
    """The inputs that hold the elements; the others say where they go."""
    return range(len(movement.inputs) if movement.op_type == "Concat" else 1)


def _dequantized(
    model: Model,
    movement: oir.Node,
    index: int,
    like: oir.Node,
    above: dict[tuple[oir.Value | None, ...], oir.Value],
) -> tuple[oir.Value, oir.Node | None]:
    """An operand in float, and the node that makes it so when that is a new one."""
    integers = movement.inputs[index]
    assert integers is not None
    key = (integers, *like.inputs[1:])
    if key in above:
        return above[key], None
    name = model.unique_name(f"{integers.name}_dequantized")
    node = oir.Node(like.domain, like.op_type, [integers, *like.inputs[1:]], name=name)
    # Right behind the integers, in front of every node that may want them in float.
    producer = integers.producer()
    if producer is not None:
        model.graph.insert_after(producer, node)
    else:
        model.graph.insert_before(model.graph[0], node)
    result = node.outputs[0]
    result.name, result.type = name, like.outputs[0].type
    result.shape = None if integers.shape is None else integers.shape.copy()
    above[key] = result
    return result, node


def _replace(
    model: Model, movement: oir.Node, operands: list[oir.Value | None], dequantize: oir.Node
) -> oir.Value:
    """Move floats in the place of ``dequantize``; integers are no longer moved when nobody else reads them.

    Returns the moved floats.
    """
    integers, output = movement.outputs[0], dequantize.outputs[0]
    name = model.unique_name(f"{output.name}_moved")
    node = oir.Node("", movement.op_type, operands, movement.attributes.values(), name=name)
    model.insert_before(dequantize, node)
    model.replace_value(output, node.outputs[0])
    model.remove(dequantize)
    if not integers.uses() and not integers.is_graph_output():
        node.name = movement.name
        model.remove(movement)
    return node.outputs[0]


_MOVEMENTS = frozenset(
    {
        "Concat",
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "MaxPool",
        "Reshape",
        "Slice",
        "SpaceToDepth",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
