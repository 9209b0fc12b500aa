"""Which integer layers overflow on x86 processors without VNNI, whose kernels add products in pairs in 16 bits.

onnxruntime multiplies uint8 activations by int8 weights with VPMADDUBSW there (``QgemmU8X8KernelAvx2.S``,
``ConvSymKernelAvx2.S`` of MLAS): two neighbouring products are added in int16, which ends at 32,767, while
``255 * 127 * 2`` is 64,770. What exceeds it is cut off without a word. A convolution with one filter a channel has
a kernel of its own that adds in 32 bits, and so have products of two unsigned operands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as oir

from qat2int8.ir import Model
from qat2int8.ir.ranges import VALUE_PRESERVING
from qat2int8.passes.pattern import maker
from qat2int8.passes.qoperators import CONTRIB_DOMAIN, QOPERATORS, Operand

__all__ = ["Product", "overflowing_products", "products"]

_LIMITS = np.iinfo(np.int16)
_LOWEST_WEIGHT = -128
_PRODUCTS = ("Conv", "Gemm", "MatMul")
_OPERATORS: dict[tuple[str, str], tuple[Operand, Operand]] = {
    **{key: (op.operands[0], op.operands[1]) for key, op in QOPERATORS.items() if op.float_op in _PRODUCTS},
    # No scales: -1 is none of the inputs.
    ("", "MatMulInteger"): (Operand(0, -1, 2), Operand(1, -1, 3)),
    (CONTRIB_DOMAIN, "DynamicQuantizeMatMul"): (Operand(-1, -1, -1), Operand(1, 2, 3)),
}
"""Where operators on integers have their activations and their weight."""


@dataclass(frozen=True, eq=False)
class Product:
    """A layer that multiplies unsigned by signed bytes.

    Attributes:
        layer: the node that multiplies.
        activations: its integer activations; None where they are made inside.
        holder: the node that reads the weight's integers with their zero point: the layer itself, or a Dequantize.
        data, zero_point: which inputs of ``holder`` they are.
    """

    layer: oir.Node
    activations: oir.Value | None
    holder: oir.Node
    data: int
    zero_point: int

    @property
    def weight(self) -> oir.Value:
        """The integers of the second operand."""
        value = self.holder.inputs[self.data]
        assert value is not None
        return value

    @property
    def zero(self) -> oir.Value | None:
        """The zero point of :attr:`weight`; None where it is left out."""
        return _input(self.holder, self.zero_point)


def products(model: Model, *, dequantized: bool = True) -> Iterator[Product]:
    """The layers of the main graph that multiply unsigned by signed bytes, or that the runtime makes such of.

    Args:
        dequantized: whether layers between Dequantize nodes count, which the runtime fuses when it optimizes.
    """
    for node in model.nodes():
        operands = _OPERATORS.get((node.domain, node.op_type))
        if operands is not None:
            first, second = operands
            found = Product(node, _input(node, first.data), node, second.data, second.zero_point)
            unsigned = found.activations is None or found.activations.dtype is not oir.DataType.INT8
        elif dequantized and node.domain == "" and node.op_type in _PRODUCTS:
            readers = [maker(model, _input(node, index), "DequantizeLinear") for index in (0, 1)]
            if readers[0] is None or readers[1] is None:
                continue
            found = Product(node, readers[0].inputs[0], readers[1], 0, 2)
            # The runtime makes signed activations unsigned.
            unsigned = True
        else:
            continue
        if unsigned and _is_signed(model, found):
            yield found


def overflowing_products(model: Model, *, dequantized: bool = True) -> list[Product]:
    """Those of :func:`products` of which some activations would overflow.

    Any two weights of an output channel count as neighbours: which are depends on how the kernel lays them out.
    """
    heights: dict[oir.Value, int] = {}
    return [
        product
        for product in products(model, dequantized=dequantized)
        if _overflows(model, product, _highest_level(model, product.activations, heights))
    ]


def _overflows(model: Model, product: Product, height: int) -> bool:
    array = model.constant(product.weight)
    if array is None:
        return 2 * height * _LOWEST_WEIGHT < int(_LIMITS.min)
    if array.ndim < 2 or _has_own_kernel(product.layer, array):
        return False
    highest, lowest = int(array.max(initial=0)), int(array.min(initial=0))
    if 2 * height * highest <= _LIMITS.max and 2 * height * lowest >= _LIMITS.min:
        return False
    channels = _by_channel(product.layer, array)
    return bool(
        height * _top_two(channels) > _LIMITS.max or height * _top_two(-channels.astype(np.int16)) > -_LIMITS.min
    )


def _has_own_kernel(layer: oir.Node, weight: npt.NDArray[np.generic]) -> bool:
    """Whether it is a convolution with one filter a channel."""
    if not layer.op_type.endswith("Conv"):
        return False
    groups: int = layer.attributes.get_int("group", 1)
    return weight.shape[:2] == (groups, 1)


def _by_channel(layer: oir.Node, weight: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """``weight`` as (output channels, what is added up for each)."""
    if layer.op_type.endswith("Conv"):
        return weight.reshape(weight.shape[0], -1)
    transposed: int = layer.attributes.get_int("transB", 0)
    if layer.op_type.endswith("Gemm") and transposed:
        return weight
    return np.moveaxis(weight, -2, -1).reshape(-1, weight.shape[-2])


def _top_two(channels: npt.NDArray[np.generic]) -> int:
    """The largest sum of two positive weights of one channel."""
    positive = np.maximum(channels, 0)
    if positive.shape[1] > 2:
        positive = np.partition(positive, -2, axis=1)[:, -2:]
    return int(positive.sum(axis=1, dtype=np.int64).max(initial=0))


def _highest_level(model: Model, value: oir.Value | None, known: dict[oir.Value, int]) -> int:
    """The highest level that ``value`` can hold, as unsigned bytes."""
    if value is None:
        return 255
    if value not in known:
        known[value] = _computed_level(model, value, known)
    return known[value]


def _computed_level(model: Model, value: oir.Value, known: dict[oir.Value, int]) -> int:
    if value.dtype is oir.DataType.INT8:
        return 255
    node = value.producer()
    if node is None or node.domain or node.graph is not model.graph:
        return 255
    if node.op_type == "Clip":
        bound = model.constant(_input(node, 2))
        source = _highest_level(model, node.inputs[0], known)
        return min(source, int(bound.item())) if bound is not None and bound.size == 1 else source
    if node.op_type == "Concat":
        return max(_highest_level(model, each, known) for each in node.inputs)
    if node.op_type == "Pad":
        filler = _input(node, 2)
        level = model.constant(filler)
        if filler is not None and (level is None or level.size != 1):
            return 255
        return max(_highest_level(model, node.inputs[0], known), 0 if level is None else int(level.item()))
    return _highest_level(model, node.inputs[0], known) if node.op_type in VALUE_PRESERVING else 255


def _is_signed(model: Model, product: Product) -> bool:
    # What nodes compute has no type until shapes are inferred; a zero point has that of its integers.
    for value in (_input(product.holder, product.data), product.zero):
        if value is not None and value.dtype is not None:
            return value.dtype is oir.DataType.INT8
        array = model.constant(value)
        if array is not None:
            return array.dtype == np.int8
    return False


def _input(node: oir.Node, index: int) -> oir.Value | None:
    return node.inputs[index] if 0 <= index < len(node.inputs) else None
