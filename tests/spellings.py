"""One small network with fake quantization, written in every spelling a file may come in.

Steps are powers of two, so that no spelling differs from another by float rounding of its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]

IR_VERSIONS = {10: 5, 11: 6, 12: 7, 13: 7, 17: 8, 19: 9, 21: 10, 23: 11, 25: 13}


@dataclass(frozen=True)
class Grid:
    """The grid of an activation; ``low`` and ``high`` are its outermost levels."""

    scale: float
    zero: int
    dtype: type = np.uint8
    low: int = 0
    high: int = 255


@dataclass
class Spelling:
    """How one file is written; the defaults are the plain form, and each subclass changes one thing."""

    opset: int = 17
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    count: int = 0

    imports: ClassVar[tuple[tuple[str, int], ...]] = ()
    domain: ClassVar[str] = ""

    # What subclasses change

    def activation(self, tensor: str, grid: Grid) -> str:
        """``tensor`` on ``grid``."""
        return self.dequantize(self.between(self.quantize(tensor, grid), grid, tensor), grid)

    def between(self, integers: str, grid: Grid, tensor: str) -> str:
        """What stands between Quantize and Dequantize."""
        if (grid.low, grid.high) == (np.iinfo(grid.dtype).min, np.iinfo(grid.dtype).max):
            return integers
        bounds = [self.constant(np.asarray(level, grid.dtype)) for level in (grid.low, grid.high)]
        return self.add("Clip", [integers, *bounds])

    def parameter(self, array: Array) -> str:
        """A scale or zero point."""
        return self.constant(array)

    def shaped(self, array: Array) -> Array:
        """The form of a parameter that is one number."""
        return array

    def zero_point(self, array: Array) -> list[str]:
        return [self.parameter(self.shaped(array))]

    def attributes(self, axis: int | None, rank: int) -> dict[str, int]:
        return {} if axis is None or self.opset < 13 else {"axis": axis}

    def weight(self, levels: Array, steps: Array, axis: int) -> str:
        """A weight of int8 levels with one step per channel."""
        zeros = self.zero_point(np.zeros(steps.shape, np.int8))
        return self.add(
            "DequantizeLinear",
            [self.constant(levels.astype(np.int8)), self.parameter(steps), *zeros],
            domain=self.domain,
            **self.attributes(axis, levels.ndim),
        )

    def linear(self, tensor: str, levels: Array, steps: Array, bias: Array) -> str:
        """A Gemm with the weight ``levels`` of shape (out, in)."""
        return self.add("Gemm", [tensor, self.weight(levels, steps, 0), self.constant(bias)], transB=1)

    def convolution(self, tensor: str, levels: Array, steps: Array, bias: Array) -> str:
        """A 3x3 Conv that keeps the size of the image."""
        weight = self.weight(levels, steps, 0)
        return self.add("Conv", [tensor, weight, self.constant(bias)], pads=[1, 1, 1, 1], kernel_shape=[3, 3])

    def again(self, tensor: str, grid: Grid) -> str:
        """Behind data movement, where some exporters quantize once more."""
        return tensor

    def read(self, tensor: str, grid: Grid, raw: str) -> str:
        """A second consumer of an activation."""
        return tensor

    # The pieces

    def quantize(self, tensor: str, grid: Grid) -> str:
        scale, zeros = self.scale(grid), self.zero_point(np.asarray(grid.zero, grid.dtype))
        inputs = [tensor, scale, *zeros]
        return self.add("QuantizeLinear", inputs, domain=self.domain, **self.attributes(None, 4))

    def dequantize(self, integers: str, grid: Grid) -> str:
        scale, zeros = self.scale(grid), self.zero_point(np.asarray(grid.zero, grid.dtype))
        inputs = [integers, scale, *zeros]
        return self.add("DequantizeLinear", inputs, domain=self.domain, **self.attributes(None, 4))

    def scale(self, grid: Grid) -> str:
        return self.parameter(self.shaped(np.asarray(grid.scale, np.float32)))

    def add(self, op_type: str, inputs: Sequence[str], domain: str = "", **attributes: Any) -> str:
        name = self.name(op_type)
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=name, domain=domain, **attributes))
        return name

    def constant(self, array: Array) -> str:
        name = self.name("c")
        self.constants[name] = np.asarray(array)
        return name

    def name(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"


U8 = {
    "in": Grid(2.0**-5, 113),
    "hidden": Grid(2.0**-5, 0),
    "branch": Grid(2.0**-4, 120),
    "sum": Grid(2.0**-4, 0),
    "out": Grid(2.0**-3, 128),
}
"""uint8, zero points that are not the middle."""

U8_ZERO = {name: Grid(grid.scale * 2, 0) for name, grid in U8.items()}
"""uint8 with zero point 0 throughout."""

S8 = {name: Grid(grid.scale, 0, np.int8, -128, 127) for name, grid in U8.items()}
"""int8 around 0."""

S8_NARROW = {name: Grid(grid.scale, 0, np.int8, -127, 127) for name, grid in U8.items()}
"""The same without the lowest level."""

U7 = {name: Grid(grid.scale * 2, grid.zero // 2, np.uint8, 0, 127) for name, grid in U8.items()}
"""Seven bits in uint8."""


U4 = {name: Grid(grid.scale * 16, grid.zero // 16, np.uint8, 0, 15) for name, grid in U8.items()}
"""Four bits in uint8."""


def build(
    spelling: Spelling, grids: dict[str, Grid] = U8, *, per_tensor: bool = False, highest: int = 127
) -> onnx.ModelProto:
    """A convolution, a residual one and a head, written as ``spelling`` does.

    Args:
        per_tensor: one step for each weight, as before opset 13.
        highest: the largest level of a weight.
    """
    rng = np.random.default_rng(7)

    def steps(count: int) -> Array:
        chosen = np.full(count, 2.0**-7) if per_tensor else 2.0 ** -rng.integers(6, 9, count)
        chosen = chosen * (128 // (highest + 1))
        return np.asarray(chosen[0] if per_tensor else chosen, np.float32)

    def levels(*shape: int) -> Array:
        drawn = np.clip(np.rint(rng.normal(0, highest / 3, shape)), -highest, highest)
        drawn.reshape(shape[0], -1)[:, 0] = highest  # so that every channel spans its grid
        return drawn

    def bias(count: int) -> Array:
        return (rng.integers(-40, 40, count) / 64).astype(np.float32)

    first = spelling.activation("x", grids["in"])
    conv = spelling.add("Relu", [spelling.convolution(first, levels(4, 2, 3, 3), steps(4), bias(4))])
    hidden = spelling.activation(conv, grids["hidden"])
    branch = spelling.convolution(hidden, levels(4, 4, 3, 3), steps(4), bias(4))
    branch = spelling.activation(branch, grids["branch"])
    total = spelling.add("Relu", [spelling.add("Add", [branch, spelling.read(hidden, grids["hidden"], conv)])])
    total = spelling.activation(total, grids["sum"])
    pooled = spelling.add("MaxPool", [total], kernel_shape=[2, 2], strides=[2, 2])
    pooled = spelling.again(pooled, grids["sum"])
    flat = spelling.again(spelling.add("Flatten", [pooled]), grids["sum"])
    head = spelling.linear(flat, levels(5, 64), steps(5), bias(5))
    result = spelling.activation(head, grids["out"])
    spelling.nodes[-1].output[0] = "y"
    del result
    return finished(spelling)


def finished(spelling: Spelling) -> onnx.ModelProto:
    """The file."""
    tensors = [numpy_helper.from_array(array, name) for name, array in spelling.constants.items()]
    extra = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in spelling.constants.items()
        if name in spelling.inputs
    ]
    graph = helper.make_graph(
        spelling.nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 2, 8, 8)), *extra],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 5))],
        tensors,
    )
    imports = [helper.make_opsetid("", spelling.opset), *(helper.make_opsetid(*each) for each in spelling.imports)]
    return helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSIONS[spelling.opset])


# -- parameters ---------------------------------------------------------------------------------------------------


class OneElement(Spelling):
    """Scales and zero points of shape (1,)."""

    def shaped(self, array: Array) -> Array:
        return array.reshape(-1)


class OneElementZeroPoints(Spelling):
    """Scalar scales with zero points of shape (1,)."""

    def zero_point(self, array: Array) -> list[str]:
        return [self.parameter(array.reshape(-1))]


class ConstantNodes(Spelling):
    def constant(self, array: Array) -> str:
        return self.add("Constant", [], value=numpy_helper.from_array(np.asarray(array)))


class BehindIdentity(Spelling):
    def parameter(self, array: Array) -> str:
        return self.add("Identity", [self.add("Identity", [self.constant(array)])])


class BehindCast(Spelling):
    """Parameters in a wider type, cast."""

    def parameter(self, array: Array) -> str:
        wide = array.astype(np.float64 if array.dtype == np.float32 else np.int32)
        return self.add("Cast", [self.constant(wide)], to=helper.np_dtype_to_tensor_dtype(array.dtype))


class Computed(Spelling):
    """Zero points from ConstantOfShape and Cast, scales from Div."""

    def parameter(self, array: Array) -> str:
        if array.dtype == np.float32:
            numerator = self.constant(np.ones_like(array))
            return self.add("Div", [numerator, self.constant((1 / array).astype(np.float32))])
        if not array.ndim or array.any():
            return self.constant(array)
        shape = self.constant(np.asarray(array.shape, np.int64))
        zeros = self.add("ConstantOfShape", [shape])
        return self.add("Cast", [zeros], to=helper.np_dtype_to_tensor_dtype(array.dtype))


class NoZeroPoint(Spelling):
    """Left out where it is 0: uint8 by default."""

    def zero_point(self, array: Array) -> list[str]:
        return [] if not array.any() else super().zero_point(array)


class NegativeAxis(Spelling):
    def attributes(self, axis: int | None, rank: int) -> dict[str, int]:
        return {"axis": (1 if axis is None else axis) - rank}


class MeaninglessAxis(Spelling):
    """An axis on quantizers of one step, as tf2onnx and Paddle write it."""

    def attributes(self, axis: int | None, rank: int) -> dict[str, int]:
        return {"axis": 1 if axis is None else axis}


class Contrib(Spelling):
    domain = "com.microsoft"
    imports = (("com.microsoft", 1),)


class OutputType(Spelling):
    """The type from an attribute, no zero point (opset 21)."""

    def quantize(self, tensor: str, grid: Grid) -> str:
        to = helper.np_dtype_to_tensor_dtype(np.dtype(grid.dtype))
        return self.add("QuantizeLinear", [tensor, self.scale(grid)], output_dtype=to)

    def dequantize(self, integers: str, grid: Grid) -> str:
        return self.add("DequantizeLinear", [integers, self.scale(grid)])


# -- between Quantize and Dequantize ------------------------------------------------------------------------------


class UselessClip(Spelling):
    def between(self, integers: str, grid: Grid, tensor: str) -> str:
        limits = np.iinfo(grid.dtype)
        bounds = [self.constant(np.asarray(level, grid.dtype)) for level in (limits.min, limits.max)]
        return self.add("Clip", [integers, *bounds])


class ClipFromOneSide(Spelling):
    """A Clip with an empty lower bound, as torch.ao writes it."""

    def between(self, integers: str, grid: Grid, tensor: str) -> str:
        return self.add("Clip", [integers, "", self.constant(np.asarray(grid.high, grid.dtype))])


class SameCast(Spelling):
    def between(self, integers: str, grid: Grid, tensor: str) -> str:
        return self.add("Cast", [integers], to=helper.np_dtype_to_tensor_dtype(np.dtype(grid.dtype)))


class ThereAndBackCast(Spelling):
    def between(self, integers: str, grid: Grid, tensor: str) -> str:
        wide = self.add("Identity", [self.add("Cast", [integers], to=TensorProto.INT32)])
        return self.add("Cast", [wide], to=helper.np_dtype_to_tensor_dtype(np.dtype(grid.dtype)))


class Moved(Spelling):
    """Reshape and Transpose on the integers, undone behind them."""

    def between(self, integers: str, grid: Grid, tensor: str) -> str:
        if tensor.startswith("Gemm"):
            return self.add("Reshape", [integers, self.constant(np.asarray([-1, 5], np.int64))])
        there = self.add("Transpose", [integers], perm=[0, 2, 3, 1])
        return self.add("Transpose", [there], perm=[0, 3, 1, 2])


# -- repeats ------------------------------------------------------------------------------------------------------


class OnePerConsumer(Spelling):
    """A Quantize and a Dequantize of its own for each reader."""

    def read(self, tensor: str, grid: Grid, raw: str) -> str:
        return self.activation(raw, grid)


class OneDequantizePerConsumer(Spelling):
    def read(self, tensor: str, grid: Grid, raw: str) -> str:
        integers = next(node.input[0] for node in self.nodes if node.output[0] == tensor)
        return self.dequantize(integers, grid)


class Repeats(Spelling):
    """The same grid again behind pool and reshape, as shared observers make it."""

    def again(self, tensor: str, grid: Grid) -> str:
        return self.activation(tensor, grid)


# -- weights ------------------------------------------------------------------------------------------------------


class FloatWeights(Spelling):
    """Float initializers behind a Quantize and a Dequantize."""

    def weight(self, levels: Array, steps: Array, axis: int) -> str:
        spread = steps.reshape([-1 if index == axis else 1 for index in range(levels.ndim)])
        # A little off the grid: the quantizer has something to do.
        floats = (levels + 0.3 * np.sign(levels) * (np.abs(levels) < 127)) * spread
        parameters = [self.parameter(steps), *self.zero_point(np.zeros(steps.shape, np.int8))]
        attributes = self.attributes(axis, levels.ndim)
        inputs = [self.constant(floats.astype(np.float32)), *parameters]
        quantized = self.add("QuantizeLinear", inputs, domain=self.domain, **attributes)
        return self.add("DequantizeLinear", [quantized, *parameters], domain=self.domain, **attributes)


class FoldedWeights(Spelling):
    """Fake quantized before the export: floats on a grid, no node."""

    def weight(self, levels: Array, steps: Array, axis: int) -> str:
        spread = steps.reshape([-1 if index == axis else 1 for index in range(levels.ndim)])
        return self.constant((levels * spread).astype(np.float32))


class UnsignedWeights(Spelling):
    """uint8 with zero point 128."""

    def weight(self, levels: Array, steps: Array, axis: int) -> str:
        zeros = self.parameter(np.full(steps.shape, 128, np.uint8))
        integers = self.constant((levels + 128).astype(np.uint8))
        return self.add("DequantizeLinear", [integers, self.parameter(steps), zeros], axis=axis)


class NarrowTypes(Spelling):
    """Weights of four or two bits in a type of their own (opset 21, 25)."""

    storage: ClassVar[Any] = ml_dtypes.int4
    quantized: ClassVar[bool] = False

    def weight(self, levels: Array, steps: Array, axis: int) -> str:
        zeros = self.parameter(np.zeros(steps.shape, self.storage))
        if self.quantized:
            spread = steps.reshape([-1 if index == axis else 1 for index in range(levels.ndim)])
            weight = self.constant((levels * spread).astype(np.float32))
            integers = self.add("QuantizeLinear", [weight, self.parameter(steps), zeros], axis=axis)
        else:
            integers = self.constant(levels.astype(self.storage))
        return self.add("DequantizeLinear", [integers, self.parameter(steps), zeros], axis=axis)


class QuantizedNarrowTypes(NarrowTypes):
    """Float weights that are quantized to four bits."""

    quantized = True


class TwoBits(NarrowTypes):
    storage = ml_dtypes.int2


class Uint4(Spelling):
    """Activations of four bits in a type of their own (opset 21)."""

    def zero_point(self, array: Array) -> list[str]:
        return super().zero_point(array if array.dtype == np.int8 else array.astype(ml_dtypes.uint4))

    def between(self, integers: str, grid: Grid, tensor: str) -> str:
        return integers


class ClippedWeights(Spelling):
    """int8 behind a narrow Clip, as Brevitas writes it."""

    def weight(self, levels: Array, steps: Array, axis: int) -> str:
        bounds = [self.constant(np.asarray(level, np.int8)) for level in (-127, 127)]
        clipped = self.add("Clip", [self.constant(levels.astype(np.int8)), *bounds])
        zeros = self.parameter(np.zeros(steps.shape, np.int8))
        return self.add("DequantizeLinear", [clipped, self.parameter(steps), zeros], axis=axis)


class CastWeights(Spelling):
    """int8 -> Cast -> Mul."""

    def weight(self, levels: Array, steps: Array, axis: int) -> str:
        spread = steps.reshape([-1 if index == axis else 1 for index in range(levels.ndim)])
        floats = self.add("Cast", [self.constant(levels.astype(np.int8))], to=TensorProto.FLOAT)
        return self.add("Mul", [floats, self.constant(spread)])


class WeightsAsInputs(Spelling):
    """Every initializer is a graph input too."""

    def constant(self, array: Array) -> str:
        self.inputs.append(super().constant(array))
        return self.inputs[-1]


class TransposedWeights(Spelling):
    """The weight of the head as (out, in) behind a Transpose, and no transB."""

    def linear(self, tensor: str, levels: Array, steps: Array, bias: Array) -> str:
        weight = self.add("Transpose", [self.weight(levels, steps, 0)], perm=[1, 0])
        return self.add("Gemm", [tensor, weight, self.constant(bias)])


class MatMulAndAdd(Spelling):
    """The head as MatMul and Add, its weight (in, out) with steps on axis 1."""

    def linear(self, tensor: str, levels: Array, steps: Array, bias: Array) -> str:
        weight = self.weight(np.ascontiguousarray(levels.T), steps, 1)
        return self.add("Add", [self.add("MatMul", [tensor, weight]), self.constant(bias)])


class ContribMatMul(MatMulAndAdd, Contrib):
    """Behind com.microsoft nothing tells the shape that the fusion of MatMul and Add asks for."""


class BiasAfterwards(Spelling):
    """The bias of a convolution as an Add behind it."""

    def convolution(self, tensor: str, levels: Array, steps: Array, bias: Array) -> str:
        weight = self.weight(levels, steps, 0)
        conv = self.add("Conv", [tensor, weight], pads=[1, 1, 1, 1], kernel_shape=[3, 3])
        return self.add("Add", [conv, self.constant(bias.reshape(-1, 1, 1))])


class IntegerBias(Spelling):
    """The bias of the head as int32 behind a Dequantize."""

    def linear(self, tensor: str, levels: Array, steps: Array, bias: Array) -> str:
        step = (steps * np.float32(2.0**-4)).astype(np.float32)
        integers = self.constant(np.rint(bias / step).astype(np.int32))
        quantized = self.add("DequantizeLinear", [integers, self.constant(step)], axis=0)
        return self.add("Gemm", [tensor, self.weight(levels, steps, 0), quantized], transB=1)


# -- other dialects -----------------------------------------------------------------------------------------------


class Function(Spelling):
    """Quantize and Dequantize in a function of the model."""

    imports = (("my.functions", 1),)

    def activation(self, tensor: str, grid: Grid) -> str:
        inputs = [tensor, self.scale(grid), *self.zero_point(np.asarray(grid.zero, grid.dtype))]
        return self.add("FakeQuant", inputs, domain="my.functions")


def with_function(model: onnx.ModelProto) -> onnx.ModelProto:
    """The function that :class:`Function` calls."""
    body = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    imports = [helper.make_opsetid("", 17)]
    model.functions.append(
        helper.make_function("my.functions", "FakeQuant", ["x", "scale", "zero"], ["y"], body, imports)
    )
    return model


class Primitives(Spelling):
    """Div, Round, Add, Clip, Sub, Mul in float."""

    def activation(self, tensor: str, grid: Grid) -> str:
        scale, zero = self.constant(np.float32(grid.scale)), self.constant(np.float32(grid.zero))
        shifted = self.add("Add", [self.add("Round", [self.add("Div", [tensor, scale])]), zero])
        bounds = [self.constant(np.float32(level)) for level in (grid.low, grid.high)]
        levels = self.add("Sub", [self.add("Clip", [shifted, *bounds]), zero])
        return self.add("Mul", [levels, scale])


class Qonnx(Spelling):
    imports = (("qonnx.custom_op.general", 1),)

    def activation(self, tensor: str, grid: Grid) -> str:
        parameters = [self.constant(np.float32(number)) for number in (grid.scale, grid.zero, 8)]
        return self.quant([tensor, *parameters], signed=int(grid.dtype is np.int8), narrow=int(grid.low == -127))

    def weight(self, levels: Array, steps: Array, axis: int) -> str:
        spread = steps.reshape([-1 if index == axis else 1 for index in range(levels.ndim)])
        parameters = [self.constant(np.asarray(each, np.float32)) for each in (spread, 0, 8)]
        return self.quant([self.constant((levels * spread).astype(np.float32)), *parameters], signed=1, narrow=1)

    def quant(self, inputs: Sequence[str], **attributes: int) -> str:
        return self.add("Quant", inputs, domain="qonnx.custom_op.general", rounding_mode="ROUND", **attributes)


class Openvino(Spelling):
    imports = (("org.openvinotoolkit", 1),)

    def activation(self, tensor: str, grid: Grid) -> str:
        ends = [np.float32((level - grid.zero) * grid.scale) for level in (grid.low, grid.high)]
        return self.fake_quantize(tensor, ends[0], ends[1], grid.high - grid.low + 1)

    def weight(self, levels: Array, steps: Array, axis: int) -> str:
        spread = steps.reshape([-1 if index == axis else 1 for index in range(levels.ndim)])
        weight = self.constant((levels * spread).astype(np.float32))
        return self.fake_quantize(weight, -127 * spread, 127 * spread, 255)

    def fake_quantize(self, tensor: str, low: Array, high: Array, levels: int) -> str:
        ends = [self.constant(np.asarray(end, np.float32)) for end in (low, high, low, high)]
        return self.add("FakeQuantize", [tensor, *ends], domain="org.openvinotoolkit", levels=levels)


class Paddle(Spelling):
    """Paddle's training graph: quantizer and dequantizer on activations and weights."""

    imports = (("paddle", 1),)

    def activation(self, tensor: str, grid: Grid) -> str:
        threshold = self.constant(np.asarray([grid.scale * 127], np.float32))
        quantized = self.op("fake_quantize_moving_average_abs_max", [tensor, threshold])
        return self.op("fake_dequantize_max_abs", [quantized, threshold], max_range=127.0)

    def weight(self, levels: Array, steps: Array, axis: int) -> str:
        spread = steps.reshape([-1 if index == axis else 1 for index in range(levels.ndim)])
        weight = self.constant((levels * spread).astype(np.float32))
        return self.op("fake_channel_wise_quantize_dequantize_abs_max", [weight], quant_axis=axis)

    def op(self, op_type: str, inputs: Sequence[str], **attributes: Any) -> str:
        return self.add(op_type, inputs, domain="paddle", **attributes)


class PaddleLinear(Paddle):
    """Paddle's newer format."""

    def activation(self, tensor: str, grid: Grid) -> str:
        threshold = np.asarray(grid.scale * 127, np.float32)
        parameters = [self.constant(threshold), self.constant(np.zeros((), np.int32))]
        attributes = {"bit_length": 8, "quant_axis": -1, "round_type": 1}
        quantized = self.op("quantize_linear", [tensor, *parameters], **attributes)
        return self.op("dequantize_linear", [quantized, *parameters], **attributes)

    def weight(self, levels: Array, steps: Array, axis: int) -> str:
        zeros = self.constant(np.zeros(steps.shape, np.int32))
        parameters = [self.constant((steps * 127).astype(np.float32)), zeros]
        integers = self.constant(levels.astype(np.int8))
        return self.op("dequantize_linear", [integers, *parameters], quant_axis=axis, bit_length=8)


class PaddleFrozen(Paddle):
    """Paddle's frozen graph: layers compute in whole numbers, one dequantizer behind each."""

    def activation(self, tensor: str, grid: Grid) -> str:
        threshold = self.constant(np.asarray([grid.scale * 127], np.float32))
        return self.op("fake_quantize_dequantize_moving_average_abs_max", [tensor, threshold])

    def frozen(self, tensor: str) -> tuple[str, str]:
        """The levels that are behind ``tensor``, and their threshold."""
        maker = next(node for node in self.nodes if node.output[0] == tensor)
        if maker.op_type in ("MaxPool", "Flatten"):
            moved, threshold = self.frozen(maker.input[0])
            again = self.name(maker.op_type)
            copy = helper.make_node(maker.op_type, [moved], [again], name=again)
            copy.attribute.extend(maker.attribute)
            self.nodes.append(copy)
            return again, threshold
        return self.op("fake_quantize_moving_average_abs_max", maker.input), maker.input[1]

    def dequantized(self, tensor: str, steps: Array, threshold: str) -> str:
        weights = self.constant((steps * 127).astype(np.float32))
        return self.op("fake_channel_wise_dequantize_max_abs", [tensor, weights, threshold], quant_bits=[8, 8])

    def convolution(self, tensor: str, levels: Array, steps: Array, bias: Array) -> str:
        integers, threshold = self.frozen(tensor)
        weight = self.constant(levels.astype(np.float32))
        conv = self.add("Conv", [integers, weight], pads=[1, 1, 1, 1], kernel_shape=[3, 3])
        return self.add("Add", [self.dequantized(conv, steps, threshold), self.constant(bias.reshape(-1, 1, 1))])

    def linear(self, tensor: str, levels: Array, steps: Array, bias: Array) -> str:
        integers, threshold = self.frozen(tensor)
        product = self.add("MatMul", [integers, self.constant(levels.T.astype(np.float32))])
        return self.add("Add", [self.dequantized(product, steps, threshold), self.constant(bias)])


Family = dict[str, Grid]

ALL: dict[str, tuple[Callable[[], Spelling], Family]] = {
    "one_element": (OneElement, U8),
    "one_element_zero_points": (OneElementZeroPoints, U8),
    "constant_nodes": (ConstantNodes, U8),
    "behind_identity": (BehindIdentity, U8),
    "behind_cast": (BehindCast, U8),
    "computed": (Computed, U8),
    "no_zero_point": (NoZeroPoint, U8_ZERO),
    "negative_axis": (NegativeAxis, U8),
    "meaningless_axis": (MeaninglessAxis, U8),
    **{f"opset_{opset}": (lambda opset=opset: Spelling(opset), U8) for opset in (13, 19, 21, 23, 25)},  # type: ignore[misc]
    "output_type": (lambda: OutputType(21), S8),
    "contrib": (Contrib, U8),
    "contrib_signed": (Contrib, S8),
    "contrib_matmul": (ContribMatMul, U8),
    "function": (Function, U8),
    "useless_clip": (UselessClip, U8),
    "clip": (Spelling, U7),
    "clip_from_one_side": (ClipFromOneSide, U7),
    "same_cast": (SameCast, U8),
    "there_and_back_cast": (ThereAndBackCast, U8),
    "moved": (Moved, U8),
    "one_per_consumer": (OnePerConsumer, U8),
    "one_dequantize_per_consumer": (OneDequantizePerConsumer, U8),
    "repeats": (Repeats, U8),
    "float_weights": (FloatWeights, U8),
    "folded_weights": (FoldedWeights, U8),
    "unsigned_weights": (UnsignedWeights, U8),
    "clipped_weights": (ClippedWeights, U8),
    "cast_weights": (CastWeights, U8),
    "weights_as_inputs": (WeightsAsInputs, U8),
    "transposed_weights": (TransposedWeights, U8),
    "matmul_and_add": (MatMulAndAdd, U8),
    "bias_afterwards": (BiasAfterwards, U8),
    "integer_bias": (IntegerBias, U8),
    "primitives": (Primitives, U8),
    "primitives_narrow": (Primitives, S8_NARROW),
    "qonnx": (Qonnx, U8),
    "qonnx_narrow": (Qonnx, S8_NARROW),
    "openvino": (Openvino, U8),
    "openvino_narrow": (Openvino, S8_NARROW),
    "paddle": (Paddle, S8_NARROW),
    "paddle_linear": (PaddleLinear, S8_NARROW),
    "paddle_frozen": (PaddleFrozen, S8_NARROW),
}
"""By name: the spelling, and the grids that it can express."""
