"""Whether integer kernels overflow on this processor, and models that compute the same numbers without."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as oir
from onnx import TensorProto, helper, numpy_helper

from qat2int8.ir import Model
from qat2int8.passes.avoid_overflow import unsign
from qat2int8.passes.overflow import overflowing_products

__all__ = ["exact_products", "overflow_warning", "products_overflow"]


@functools.cache
def products_overflow() -> bool:
    """Whether onnxruntime's kernels here cut sums of two products of bytes off at 16 bits.

    Asked of the runtime, with the largest products there are: which kernel it takes depends on more than the flags
    of the processor.
    """
    # Names of targets are looked up by commands that run no model, and the runtime takes long to load.
    import onnxruntime as ort

    levels, weight = np.full((1, 64), 255, np.uint8), np.full((64, 16), 127, np.int8)
    constants = [
        numpy_helper.from_array(array, name)
        for name, array in (
            ("weight", weight),
            ("zero_x", np.zeros((), np.uint8)),
            ("zero_w", np.zeros((), np.int8)),
        )
    ]
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "weight", "zero_x", "zero_w"], ["y"])],
        "largest_products",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, levels.shape)],
        [helper.make_tensor_value_info("y", TensorProto.INT32, (1, 16))],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    running = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return bool(np.any(running.run(None, {"x": levels})[0] != levels.astype(np.int32) @ weight.astype(np.int32)))


@contextmanager
def exact_products(model: Path | bytes, *, dequantized: bool = True) -> Iterator[Path | bytes]:
    """``model``, or where its products overflow on this processor one that computes the same without.

    Args:
        model: a model on disk or serialised, which is left as it is.
        dequantized: whether layers between Dequantize nodes will be fused, and so can overflow.
    """
    if not products_overflow():
        yield model
        return
    graph = _read(model)
    found = [] if graph is None else overflowing_products(graph, dequantized=dequantized)
    if graph is None or not found:
        yield model
        return
    unsign(graph, found)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "exact.onnx"
        oir.save(graph.ir, path, external_data="exact.data")
        yield path


def overflow_warning(path: Path) -> str | None:
    """What to say of a model whose answers are wrong on this processor; None of one whose answers are right."""
    graph = _read(path) if products_overflow() else None
    layers = 0 if graph is None else len(overflowing_products(graph))
    if not layers:
        return None
    return (
        f"{path}: {layers} {'layer overflows' if layers == 1 else 'layers overflow'} on this processor, which has "
        "no VNNI; its answers are better elsewhere, and here after converting with --target ort-x86-avx2"
    )


def _read(model: Path | bytes) -> Model | None:
    """Without the checks of a user's file: models made for a measurement lack types here and there.

    None for what is no model, which is for the runtime to refuse.
    """
    try:
        return Model(oir.from_proto(onnx.load_from_string(model)) if isinstance(model, bytes) else oir.load(model))
    except Exception:  # protobuf's DecodeError, whose module differs between its implementations, and the system's
        return None
