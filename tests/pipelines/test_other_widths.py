"""Grids that no kernel computes beside grids that one does: nothing is requantized behind a person's back."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from support import run

from qat2int8 import UnsupportedModel, convert

RNG = np.random.default_rng(0)
X = RNG.normal(size=(1, 4, 6, 6)).astype(np.float32)


def network(middle: Any, *, bn: bool = False, blocked: bool = False, opset: int = 21) -> onnx.ModelProto:
    """Two convolutions and a head; ``middle`` is the type of the grid between the convolutions."""
    constants: dict[str, Any] = {"s": np.float32(0.03), "z": np.int8(0)}
    nodes = []

    def add(op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op_type, inputs, [output], name=output, **attributes))
        return output

    def faked(tensor: str, output: str, dtype: Any = np.int8) -> str:
        wide = np.dtype(dtype).itemsize > 1
        constants[f"{output}_s"] = np.float32(0.0001 if wide else 0.03)
        constants[f"{output}_z"] = np.zeros((), dtype)
        add("QuantizeLinear", [tensor, f"{output}_s", f"{output}_z"], f"{output}_q")
        return add("DequantizeLinear", [f"{output}_q", f"{output}_s", f"{output}_z"], output)

    def weight(name: str, *shape: int) -> str:
        constants[f"{name}_i"] = RNG.integers(-127, 128, shape).astype(np.int8)
        return add("DequantizeLinear", [f"{name}_i", "s", "z"], name)

    first = add("Conv", [faked("x", "a"), weight("v", 4, 4, 1, 1)], "c")
    if bn:
        for name, value in (("g", 1.0), ("b", 0.1), ("m", 0.0), ("w", 2.0)):
            constants[name] = np.full(4, value, np.float32)
        first = add("BatchNormalization", [first, "g", "b", "m", "w"], "n")
    second = add("Conv", [faked(first, "d", middle), weight("u", 4, 4, 3, 3)], "e")
    flat = add("Flatten", [faked(second, "f")], "h")
    if blocked:
        constants["k_i"] = RNG.integers(-7, 8, (64, 5)).astype(ml_dtypes.int4)
        constants["k_s"] = np.abs(RNG.normal(size=(4, 5))).astype(np.float32)
        add("DequantizeLinear", ["k_i", "k_s"], "k", axis=0, block_size=16)
    else:
        weight("k", 64, 5)
    add("MatMul", [flat, "k"], "y")
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, X.shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (1, 5))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def integer(conversion: Any) -> dict[str, bool]:
    return {record.node: record.integer for record in conversion.certificate.compute}


@pytest.mark.parametrize("bn", [False, True])
@pytest.mark.parametrize("dtype", [np.int16, np.uint16])
def test_a_16_bit_tensor_stays_on_16_bits_and_what_is_around_it_becomes_integer(dtype: Any, bn: bool) -> None:
    model = network(dtype, bn=bn)
    conversion = convert(model)
    found = {np.dtype(dtype).name for finding in conversion.diagnostics if np.dtype(dtype).name in finding.reason}
    assert found
    # The layers on either side of it lack an 8-bit grid; the head has all it needs.
    assert integer(conversion) == {"c": False, "e": False, "y": True}
    wide = [node for node in conversion.model.graph if node.name.startswith("d_q") or node.name == "d"]
    assert [node.op_type for node in wide] == ["QuantizeLinear", "DequantizeLinear"]
    expected, actual = run(model, {"x": X})[0], run(conversion.model, {"x": X}, optimize=True)[0]
    # The input of a layer in float is not put on its grid.
    np.testing.assert_allclose(actual, expected, atol=0.05 * np.abs(expected).max())


def test_asked_for_everything_becomes_integer() -> None:
    model = network(np.int16)
    conversion = convert(model, narrow_16_bit=True)
    assert all(integer(conversion).values())
    (note,) = [finding for finding in conversion.diagnostics if "as asked" in finding.reason]
    assert note.value == "c"
    expected, actual = run(model, {"x": X})[0], run(conversion.model, {"x": X}, optimize=True)[0]
    np.testing.assert_allclose(actual, expected, atol=0.1 * np.abs(expected).max())


def test_steps_per_block_keep_their_layer_in_float_and_no_other() -> None:
    model = network(np.int8, blocked=True)
    conversion = convert(model)
    assert integer(conversion) == {"c": True, "e": True, "y": False}
    assert any("one scale per block" in finding.reason for finding in conversion.diagnostics)
    expected, actual = run(model, {"x": X})[0], run(conversion.model, {"x": X}, optimize=True)[0]
    np.testing.assert_allclose(actual, expected, atol=0.02 * np.abs(expected).max())


def test_16_bits_alone_are_refused_with_the_option_that_helps() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="d"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (2,))],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (2,))],
        [numpy_helper.from_array(np.float32(0.01), "s"), numpy_helper.from_array(np.int16(0), "z")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    with pytest.raises(UnsupportedModel, match=r"its grid is int16, .*--narrow-16-bit"):
        convert(model)
