"""Layers that no target computes in integers keep their trained weights as plain floats, and say why."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from support import run

from qat2int8 import convert
from qat2int8.ir import Code

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("axis", [0, 1], ids=["per input channel", "per output channel"])
@pytest.mark.parametrize("stored", [False, True], ids=["quantized", "stored as integers"])
def test_a_deconvolution_reads_its_weight_without_dequantizing_it_each_time(axis: int, stored: bool) -> None:
    levels = RNG.integers(-127, 128, (3, 4, 2, 2)).astype(np.int8)
    steps = RNG.uniform(0.01, 0.02, levels.shape[axis]).astype(np.float32)
    spread = steps.reshape([-1 if index == axis else 1 for index in range(4)])
    constants = {
        "s": np.float32(0.05),
        "z": np.int8(0),
        "ws": steps,
        "wz": np.zeros(steps.shape, np.int8),
        "v": RNG.normal(size=(3, 3, 1, 1)).astype(np.float32),
        "w": levels if stored else (levels * spread).astype(np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Conv", ["d", "v"], ["c"], name="conv"),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["r"]),
        helper.make_node("DequantizeLinear", ["r", "s", "z"], ["e"]),
    ]
    if not stored:
        nodes.append(helper.make_node("QuantizeLinear", ["w", "ws", "wz"], ["wq"], axis=axis))
    nodes += [
        helper.make_node("DequantizeLinear", ["w" if stored else "wq", "ws", "wz"], ["wd"], axis=axis),
        helper.make_node("ConvTranspose", ["e", "wd"], ["y"], name="deconv", strides=[2, 2]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (1, 3, 4, 4))],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (1, 4, 8, 8))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    conversion = convert(model)
    assert {record.node: record.integer for record in conversion.certificate.compute} == {
        "conv": True,
        "deconv": False,
    }
    (deconvolution,) = conversion.model.nodes("ConvTranspose")
    weight = conversion.model.constant(deconvolution.inputs[1])
    assert weight is not None
    np.testing.assert_allclose(weight, levels * spread, rtol=1e-6)
    (reason,) = [finding for finding in conversion.diagnostics if finding.node == "deconv"]
    assert reason.code is Code.UNSUPPORTED_OP
    assert "no integer kernel for ConvTranspose" in reason.reason
    x = RNG.normal(0, 1.5, (1, 3, 4, 4)).astype(np.float32)
    expected, actual = run(model, {"x": x})[0], run(conversion.model, {"x": x}, optimize=True)[0]
    assert np.mean(np.abs(actual - expected)) < 0.02 * np.abs(expected).max()
