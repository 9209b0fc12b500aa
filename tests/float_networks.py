"""Small float networks for calibration, and samples for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]


def convolutions(*, batch: int | str = "N", seed: int = 0) -> onnx.ModelProto:
    """Two Conv with BatchNormalization and Relu, a residual Add, a pool and a Gemm on images of 8x8."""
    rng = np.random.default_rng(seed)
    weights: dict[str, Array] = {}
    nodes = []

    def constant(name: str, *shape: int, scale: float = 1.0) -> str:
        weights[name] = (scale * rng.normal(size=shape)).astype(np.float32)
        return name

    def layer(index: int, source: str, channels: int) -> str:
        conv, norm, relu = f"conv{index}", f"norm{index}", f"relu{index}"
        weight = constant(f"{conv}.weight", 4, channels, 3, 3, scale=(9 * channels) ** -0.5)
        nodes.append(helper.make_node("Conv", [source, weight], [conv], conv, pads=[1, 1, 1, 1]))
        statistics = [constant(f"{norm}.{name}", 4) for name in ("gamma", "beta", "mean", "var")]
        weights[statistics[0]] += 2.0
        weights[statistics[3]] = np.abs(weights[statistics[3]]) + 0.5
        nodes.append(helper.make_node("BatchNormalization", [conv, *statistics], [norm], norm))
        nodes.append(helper.make_node("Relu", [norm], [relu], relu))
        return relu

    first = layer(1, "image", 2)
    second = layer(2, first, 4)
    nodes.append(helper.make_node("Add", [first, second], ["sum"], "add"))
    nodes.append(helper.make_node("GlobalAveragePool", ["sum"], ["mean"], "pool"))
    nodes.append(helper.make_node("Flatten", ["mean"], ["flat"], "flatten"))
    nodes.append(helper.make_node("Gemm", ["flat", constant("gemm.weight", 4, 5)], ["logits"], "gemm"))
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 2, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 5])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def images(count: int, *, seed: int = 1) -> Array:
    """Samples for :func:`convolutions`."""
    return np.random.default_rng(seed).normal(size=(count, 2, 8, 8)).astype(np.float32)
