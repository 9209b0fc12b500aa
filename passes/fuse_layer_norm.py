"""Recognise a LayerNormalization that is written in primitives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from qat2int8.ir import Model
from qat2int8.passes.base import Context, Numerics, Pass, PassResult
from qat2int8.passes.pattern import is_private, maker, replace_by, scalar, with_scalar
from qat2int8.passes.registry import register
from qat2int8.passes.sole_consumer import sole_consumer


@register
@dataclass(frozen=True)
class FuseLayerNorm(Pass):
    """``(x - mean) / sqrt(mean((x - mean)^2) + epsilon) * gamma + beta`` over the last axes: LayerNormalization.

    One op instead of nine passes over the tensor. onnxruntime knows the chain too, but not any more once x or the
    result is dequantized for each of its readers. Centring once or twice, squares by Pow or Mul, a quotient or the
    product with a reciprocal, and a missing gamma or beta are all recognised. A chain in which a tensor has a
    trained grid, or is read by others, stays as it is, and so do statistics over other axes than the last ones.
    LayerNormalization exists from opset 17. The formula is that of Ba et al., "Layer Normalization", 2016.
    """

    name = "fuse-layer-norm"
    numerics = Numerics.CLOSE

    def run(self, model: Model, ctx: Context) -> PassResult:
        fused = 0
        if model.opset < _OPSET_OF_LAYER_NORM:
            return PassResult({"fused": fused})
        for root in model.nodes("Sqrt", "Pow"):
            norm = _match(model, root)
            if norm is not None and is_private(model, norm.nodes, norm.result):
                _write(model, norm)
                fused += 1
        return PassResult({"fused": fused})


_OPSET_OF_LAYER_NORM = 17


@dataclass(eq=False)
class _Norm:
    """What was recognised: ``source`` normalized over ``dims``, its last axes, by ``nodes``."""

    source: oir.Value
    dims: tuple[int, ...]
    epsilon: float
    nodes: list[oir.Node]
    gamma: oir.Value | None = None
    beta: oir.Value | None = None

    @property
    def result(self) -> oir.Value:
        return self.nodes[-1].outputs[0]


def _match(model: Model, root: oir.Node) -> _Norm | None:
    """The normalization around ``root``, which takes the square root of the variance, or its reciprocal."""
    power = 0.5 if root.op_type == "Sqrt" else scalar(model, root.inputs[1])
    plus = maker(model, root.inputs[0], "Add")
    stabilised = None if plus is None else with_scalar(model, plus)
    if power not in (0.5, -0.5) or plus is None or stabilised is None or not stabilised[1] > 0.0:
        return None
    variance = maker(model, stabilised[0], "ReduceMean")
    square = None if variance is None else maker(model, variance.inputs[0], "Pow", "Mul")
    if variance is None or square is None:
        return None
    centring = maker(model, square.inputs[0], "Sub")
    if centring is None or not _is_square(model, square):
        return None
    source, centre = centring.inputs[0], maker(model, centring.inputs[1], "ReduceMean")
    if source is None or centre is None or centre.inputs[0] is not source:
        return None
    if source.dtype is not oir.DataType.FLOAT:
        return None
    dims = _last_dims(model, centre, source)
    if dims is None or dims != _last_dims(model, variance, source):
        return None
    norm = _Norm(source, dims, stabilised[1], [centre, centring, square, variance, plus, root])
    return _scaled(model, norm) if _normalized(model, norm, inverse=power < 0.0) else None


def _is_square(model: Model, node: oir.Node) -> bool:
    if node.op_type == "Mul":
        return node.inputs[0] is node.inputs[1]
    return scalar(model, node.inputs[1]) == 2.0


def _last_dims(model: Model, mean: oir.Node, source: oir.Value) -> tuple[int, ...] | None:
    """The sizes of the axes a ReduceMean averages over and keeps, where they are the last ones of ``source``."""
    if source.shape is None or not mean.attributes.get_int("keepdims", 1):
        return None
    axes = list(mean.attributes.get_ints("axes", ()))
    if len(mean.inputs) > 1 and mean.inputs[1] is not None:
        constant = model.constant(mean.inputs[1])
        if constant is None:
            return None
        axes = [int(axis) for axis in constant.reshape(-1)]
    rank = source.shape.rank()
    # No axes are all axes, or none at all with noop_with_empty_axes: neither is a normalization of rows.
    if not axes or sorted(axis % rank for axis in axes) != list(range(rank - len(axes), rank)):
        return None
    dims = [dim for dim in source.shape[rank - len(axes) :] if isinstance(dim, int)]
    return tuple(dims) if len(dims) == len(axes) else None


def _normalized(model: Model, norm: _Norm, *, inverse: bool) -> bool:
    """Append to ``norm`` the nodes that divide the centred tensor by the root, which is the last node so far."""
    centre, centring, root = norm.nodes[0], norm.nodes[1], norm.nodes[-1]
    divisor = root.outputs[0]
    node = sole_consumer(model, divisor)
    if node is not None and not node.domain and not inverse:
        reciprocal = node.op_type == "Reciprocal"
        if node.op_type == "Div" and node.inputs[1] is divisor:
            reciprocal = scalar(model, node.inputs[0]) == 1.0
        if reciprocal:
            norm.nodes.append(node)
            divisor, inverse = node.outputs[0], True
            node = sole_consumer(model, divisor)
    if node is None or node.domain or node.op_type != ("Mul" if inverse else "Div"):
        return False
    position = 1 if node.inputs[1] is divisor else 0
    if not inverse and position != 1:
        return False
    dividend = node.inputs[1 - position]
    if dividend is not centring.outputs[0]:
        # Some exporters centre twice, once for the variance and once for the quotient.
        twin = maker(model, dividend, "Sub")
        if twin is None or twin.inputs[0] is not norm.source or twin.inputs[1] is None:
            return False
        again = maker(model, twin.inputs[1], "ReduceMean")
        if again is None or again.inputs[0] is not norm.source:
            return False
        if again is not centre and _last_dims(model, again, norm.source) != norm.dims:
            return False
        norm.nodes += [again, twin]
    norm.nodes.append(node)
    return True


def _scaled(model: Model, norm: _Norm) -> _Norm:
    """``norm`` with the factors and offsets behind it."""
    for role, op_type in (("gamma", "Mul"), ("beta", "Add")):
        value = norm.result
        node = sole_consumer(model, value)
        if node is None or node.domain or node.op_type != op_type or model.scales.get(value) is not None:
            continue
        operand = node.inputs[1 if node.inputs[0] is value else 0]
        if _is_parameter(model, operand, norm):
            setattr(norm, role, operand)
            norm.nodes.append(node)
    return norm


def _is_parameter(model: Model, operand: oir.Value | None, norm: _Norm) -> bool:
    """Whether ``operand`` is a float constant with one number per element of the normalized axes."""
    array, shape = model.constant(operand), norm.source.shape
    if array is None or array.dtype != np.float32 or shape is None or array.ndim > shape.rank():
        return False
    leading = array.ndim - len(norm.dims)
    return leading >= 0 and array.shape[leading:] == norm.dims and array.size == int(np.prod(norm.dims))


def _write(model: Model, norm: _Norm) -> None:
    gamma, beta = norm.gamma, norm.beta
    name = norm.nodes[-1].name or norm.result.name or ""
    inputs = [norm.source, _parameter(model, gamma, norm.dims) if gamma is not None else None]
    if inputs[1] is None:
        inputs[1] = model.add_initializer(f"{name}.ones", np.ones(norm.dims, np.float32))
    if beta is not None:
        inputs.append(_parameter(model, beta, norm.dims))
    attributes = {"axis": -len(norm.dims), "epsilon": norm.epsilon}
    replace_by(model, oir.node("LayerNormalization", inputs, attributes, name=name), norm.nodes, norm.result)


def _parameter(model: Model, value: oir.Value, dims: tuple[int, ...]) -> oir.Value:
    """``value`` itself, or a copy of it without leading axes of size one."""
    array = model.constant(value)
    assert array is not None
    if array.shape == dims and value.is_initializer():
        return value
    copy = model.add_initializer(f"{value.name}.flat", array.reshape(dims))
    grid = model.scales.get(value)
    if grid is not None and not grid.per_channel:
        model.scales.set(copy, grid)
    return copy
