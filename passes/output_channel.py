"""Along which axis of a weight a layer's output channels lie."""

from __future__ import annotations

import onnx_ir as oir

__all__ = ["output_channel_axis"]


def output_channel_axis(node: oir.Node, rank: int) -> int | None:
    """The output-channel axis of the constant weight, of ``rank`` axes, of a Conv, ConvTranspose, Gemm or MatMul.

    None for a MatMul with anything but a matrix: a vector has no output channel, and a stack of matrices none that
    they share.
    """
    match node.op_type:
        case "Conv":
            return 0
        case "ConvTranspose":
            return 1
        case "Gemm":
            return 0 if node.attributes.get_int("transB", 0) else 1
    return 1 if rank == 2 else None
