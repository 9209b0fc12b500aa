"""Compute what one node of a graph computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as oir
from onnx.reference import ReferenceEvaluator

__all__ = ["evaluate"]


def evaluate(node: oir.Node, arrays: dict[str, npt.NDArray[Any]], opset: int) -> list[npt.NDArray[Any]] | None:
    """The outputs of ``node`` by ONNX's reference implementation; None where that cannot compute it.

    Args:
        arrays: its inputs, by name.
        opset: the version of the default domain.
    """
    graph = onnx.helper.make_graph(
        [oir.to_proto(node)],
        "one_node",
        [
            onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in arrays.items()
        ],
        [onnx.helper.make_empty_tensor_value_info(out.name or "") for out in node.outputs],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    try:
        results = ReferenceEvaluator(proto).run(None, arrays)
    except Exception:  # the reference implementation lacks some ops and types: such a node is left as it is
        return None
    return (
        [np.asarray(result) for result in results]
        if all(isinstance(r, np.ndarray | np.generic) for r in results)
        else None
    )
