"""Write Quantize and Dequantize nodes, integer weights and int32 biases into a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import INT8, Model, QuantParams

__all__ = ["BIAS_LIMIT", "QdqWriter", "symmetric_int8"]

BIAS_LIMIT = 1 << 30
"""Largest int32 bias written: half of int32 is left to the accumulator, which wraps silently in onnxruntime."""


class QdqWriter:
    """Puts quantization nodes into one model; equal scales and zero points share one initializer.

    onnxruntime compares the scales of neighbouring quantizers bit by bit, and drops a pair around data
    movement only when they are equal, so sharing is more than tidiness.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._parameters: dict[tuple[object, ...], oir.Value] = {}
        self._constants: dict[tuple[object, ...], oir.Value] = {}

    def quantizer(
        self,
        tensor: oir.Value,
        params: QuantParams,
        reads: Callable[[oir.Node, int], bool] | None = None,
        *,
        integer_clip: bool = True,
    ) -> oir.Value:
        """Put ``Quantize -> [Clip] -> Dequantize`` behind ``tensor``; returns the dequantized value.

        The Clip cuts off levels that the grid does not have.

        Args:
            tensor: a float activation.
            params: a per-tensor grid on the target's activation type.
            reads: which of the tensor's uses read the dequantized value from now on; None for all of them, and
                then a graph output is the dequantized value under its old name.
            integer_clip: whether the Clip may work on the integers; else it stands in front and works on floats.
        """
        model, name = self.model, tensor.name or "tensor"
        uses = [use for use in tensor.uses() if reads is None or reads(use.node, use.idx)]
        scale, zero_point = self._scale(params, name), self._zero_point(params)
        storage = params.dtype.storage
        limits = np.iinfo(storage.numpy())
        cut = params.dtype.qmax < limits.max or params.dtype.qmin > limits.min
        nodes, source = [], tensor
        if cut and not integer_clip:
            ends = [self._parameter(np.asarray(end, np.float32), "bound") for end in _ends(params)]
            nodes.append(self._node("Clip", [tensor, *ends], f"{name}_Clip"))
            source = nodes[-1].outputs[0]
            self._describe(source, f"{name}_clipped", oir.DataType.FLOAT, tensor.shape)
        nodes.append(self._node("QuantizeLinear", [source, scale, zero_point], f"{name}_QuantizeLinear"))
        integers = nodes[-1].outputs[0]
        self._describe(integers, f"{name}_quantized", storage, tensor.shape)
        if cut and integer_clip:
            bounds = [self._level(level, params) for level in (params.dtype.qmin, params.dtype.qmax)]
            nodes.append(self._node("Clip", [integers, *bounds], f"{name}_Clip"))
            integers = nodes[-1].outputs[0]
            self._describe(integers, f"{name}_clipped", storage, tensor.shape)
        model.scales.move_trace(tensor, integers)
        nodes.append(self._node("DequantizeLinear", [integers, scale, zero_point], f"{name}_DequantizeLinear"))
        result = nodes[-1].outputs[0]
        self._describe(result, f"{name}_dequantized", oir.DataType.FLOAT, tensor.shape)
        producer = tensor.producer()
        if producer is not None:
            model.graph.insert_after(producer, nodes)
        else:
            model.graph.insert_before(model.graph[0], nodes)
        for use in uses:
            use.node.replace_input_with(use.idx, result)
        if reads is None and tensor.is_graph_output():
            self._take_over_output(tensor, result)
        return result

    def constant(
        self,
        constant: oir.Value,
        levels: npt.NDArray[Any],
        params: QuantParams,
        before: oir.Node,
    ) -> oir.Value:
        """A constant of the graph as ``levels`` behind a Dequantize; one for all consumers that want the same.

        Args:
            constant: what is replaced; it keeps its other consumers.
            levels: its integers, of the storage type of ``params``.
            before: the consumer, or the first one in the order of the graph.
        """
        key = (constant, *_key(params.scale), *_key(params.zero_point), params.dtype, params.axis)
        if key not in self._constants:
            name = constant.name or "constant"
            self._constants[key] = self.dequantized(levels, params, name, before)
        return self._constants[key]

    def dequantized(self, levels: npt.NDArray[Any], params: QuantParams, name: str, before: oir.Node) -> oir.Value:
        """``levels`` as an initializer behind a Dequantize."""
        integers = self.model.add_initializer(f"{name}_quantized", levels)
        node = self._node(
            "DequantizeLinear",
            [integers, self._scale(params, name), self._zero_point(params)],
            f"{name}_DequantizeLinear",
            {} if params.axis is None else {"axis": params.axis},
        )
        self.model.graph.insert_before(before, node)
        self._describe(node.outputs[0], f"{name}_dequantized", oir.DataType.FLOAT, integers.shape)
        return node.outputs[0]

    def quantized_at_load(self, constant: oir.Value, params: QuantParams, before: oir.Node) -> oir.Value:
        """A float constant as it is, behind Quantize and Dequantize; one for all consumers on the same grid."""
        key = (constant, *_key(params.scale), *_key(params.zero_point), params.dtype, params.axis)
        if key not in self._constants:
            name = constant.name or "constant"
            attributes = {} if params.axis is None else {"axis": params.axis}
            grid = [self._scale(params, name), self._zero_point(params)]
            quantize = self._node("QuantizeLinear", [constant, *grid], f"{name}_QuantizeLinear", attributes)
            integers = quantize.outputs[0]
            self._describe(integers, f"{name}_quantized", params.dtype.storage, constant.shape)
            dequantize = self._node("DequantizeLinear", [integers, *grid], f"{name}_DequantizeLinear", attributes)
            self.model.graph.insert_before(before, [quantize, dequantize])
            self._describe(dequantize.outputs[0], f"{name}_dequantized", oir.DataType.FLOAT, constant.shape)
            self._constants[key] = dequantize.outputs[0]
        return self._constants[key]

    def _take_over_output(self, tensor: oir.Value, result: oir.Value) -> None:
        outputs = self.model.graph.outputs
        name = tensor.name
        tensor.name = self.model.unique_name(f"{name}_float")
        for index in [index for index, output in enumerate(outputs) if output is tensor]:
            outputs[index] = result
        result.name = name

    def _scale(self, params: QuantParams, name: str) -> oir.Value:
        return self._parameter(params.scale, f"{name}_scale")

    def _zero_point(self, params: QuantParams) -> oir.Value:
        return self._parameter(params.zero_point.astype(params.dtype.numpy), "zero_point")

    def _level(self, level: int, params: QuantParams) -> oir.Value:
        return self._parameter(np.asarray(level, params.dtype.numpy), "level")

    def _parameter(self, array: npt.NDArray[Any], name: str) -> oir.Value:
        key = _key(array)
        if key not in self._parameters:
            self._parameters[key] = self.model.add_initializer(name, array)
        return self._parameters[key]

    def _node(
        self, op_type: str, inputs: Sequence[oir.Value], name: str, attributes: dict[str, int] | None = None
    ) -> oir.Node:
        return oir.node(op_type, inputs, attributes, name=self.model.unique_name(name))

    def _describe(self, value: oir.Value, name: str, dtype: oir.DataType, shape: oir.Shape | None) -> None:
        value.name = self.model.unique_name(name)
        value.type = oir.TensorType(dtype)
        value.shape = None if shape is None else shape.copy()


def _ends(params: QuantParams) -> tuple[np.float32, np.float32]:
    """The values of the lowest and highest level; an end that the integer type cuts off anyway is left open."""
    limits = np.iinfo(params.dtype.numpy)
    lo, hi = ((level - int(params.zero_point)) * params.scale for level in (params.dtype.qmin, params.dtype.qmax))
    return (
        np.float32(lo if params.dtype.qmin > limits.min else np.finfo(np.float32).min),
        np.float32(hi if params.dtype.qmax < limits.max else np.finfo(np.float32).max),
    )


def _key(array: npt.NDArray[Any]) -> tuple[object, ...]:
    return array.dtype.str, array.shape, array.tobytes()


def symmetric_int8(params: QuantParams, array: npt.NDArray[Any], axis: int | None) -> QuantParams:
    """A grid on int8 with zero point 0 that holds the levels of a weight.

    The steps stay what they are wherever the levels that occur fit, as they do in all but a few channels of
    weights trained on uint8; elsewhere they are widened by as little as it takes, at most by two.

    Args:
        params: the grid the weight was trained on, of up to 8 bits.
        array: the weight.
        axis: the axis that may have a step per channel; None when there must be one step.
    """
    # A step of one turns the grid into its levels, counted from the zero point.
    counted = params.with_(scale=np.ones_like(params.scale))
    levels = counted.dequantize(params.quantize(array))
    channels = params.axis if params.per_channel else axis
    others = tuple(index for index in range(levels.ndim) if index != channels)
    if not levels.size or (levels.min() >= INT8.qmin and levels.max() <= INT8.qmax):
        return params.with_(dtype=INT8, zero_point=np.zeros_like(params.zero_point))
    fits = (levels.min(axis=others) >= INT8.qmin) & (levels.max(axis=others) <= INT8.qmax)
    factors = np.where(fits, 1.0, np.abs(levels).max(axis=others) / INT8.qmax)
    steps = (params.scale * factors).astype(np.float32)
    return params.with_(
        scale=steps, dtype=INT8, zero_point=np.zeros(steps.shape, np.int32), axis=channels if steps.ndim else None
    )
