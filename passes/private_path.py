"""How integers that nobody else reads come from a Quantize to a Dequantize."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as oir

from qat2int8.ir import Model
from qat2int8.passes.pattern import maker
from qat2int8.passes.sole_consumer import sole_consumer

__all__ = ["private_path"]

_MOVES = ("Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


def private_path(model: Model, dequantize: oir.Node) -> Iterator[oir.Node]:
    """The nodes that move the integers of ``dequantize``, from it up to the Quantize and that one included.

    It ends early at what somebody else reads, or at what anything else computes.
    """
    reader = dequantize
    while reader.op_type != "QuantizeLinear":
        value = reader.inputs[0]
        node = maker(model, value, "QuantizeLinear", *_MOVES)
        if value is None or node is None or sole_consumer(model, value) is not reader:
            return
        yield node
        reader = node
