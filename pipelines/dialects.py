"""What the ops of a source say about it: whether it was quantized, and whether a runtime knows them."""

from __future__ import annotations

import onnx_ir as oir

from qat2int8.ir import Model
from qat2int8.passes.paddle_ops import is_paddle
from qat2int8.passes.qoperators import QOPERATORS
from qat2int8.passes.read_openvino_fake_quantize import OPENVINO_DOMAIN
from qat2int8.passes.read_qonnx_quant import QONNX_DOMAINS

__all__ = ["has_fake_quant", "is_foreign", "is_readable"]


_ROUNDING = ("QuantizeLinear", "DequantizeLinear", "Round", "Floor")


def has_fake_quant(model: Model) -> bool:
    """Whether any op, those of branches and functions included, puts tensors on integer grids.

    Scales that training recorded as ``out_threshold`` of a node count too, and so do Round and Floor, which fake
    quant spelt in float ops is made of; whether it is there, the pass that reads it finds out.
    """
    functions = (node for function in model.ir.functions.values() for node in function)
    return any(_is_fake_quant(node) for node in (*model.graph.all_nodes(), *functions))


def is_readable(model: Model) -> bool:
    """Whether no :func:`is_foreign` op is left."""
    functions = (node for function in model.ir.functions.values() for node in function)
    return not any(is_foreign(node) for node in (*model.graph.all_nodes(), *functions))


def _is_fake_quant(node: oir.Node) -> bool:
    if node.op_type in _ROUNDING or (node.domain, node.op_type) in QOPERATORS:
        return True
    return is_foreign(node) or "out_threshold" in node.attributes or "out_threshold" in node.metadata_props


def is_foreign(node: oir.Node) -> bool:
    """Whether ``node`` stands for quantization in a dialect of its own, which no runtime loads."""
    if node.domain in QONNX_DOMAINS or is_paddle(node):
        return True
    return (node.domain, node.op_type) == (OPENVINO_DOMAIN, "FakeQuantize")
