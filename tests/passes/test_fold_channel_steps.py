from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper, numpy_helper
from support import TARGET, apply, check_pass, run

from qat2int8 import convert
from qat2int8.ir import Model
from qat2int8.passes import Context
from qat2int8.passes.fake_quant import FakeQuant, fake_quants
from qat2int8.passes.fold_channel_steps import FoldChannelSteps

CTX = Context(TARGET)
STEPS = np.array([0.02, 0.005, 0.01], np.float32)
X = np.random.default_rng(0).normal(0, 1.5, (3, 3, 5, 5)).astype(np.float32)


def network(
    *,
    clamp: tuple[float, float] | None = (0.0, 6.0),
    zeros: npt.ArrayLike = (0, 0, 0),
    axis: int = 1,
    group: int = 3,
    weight: str = "per channel",
    multiplier: int = 1,
    also_read: str = "",
    also_output: str = "",
    source: str = "Conv",
    head: bool = False,
) -> Model:
    """``x -> Conv -> clamp -> fake quant per channel -> depthwise Conv -> y``, each with one thing to change."""
    rng = np.random.default_rng(1)
    constants: dict[str, Any] = {
        "w0": rng.normal(size=(3, 3, 1, 1)),
        "s": STEPS,
        "z": np.resize(np.asarray(zeros), 3).astype(np.uint8),
        "xs": np.float32(0.03),
        "xz": np.int8(0),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["x_q"]),
        helper.make_node("DequantizeLinear", ["x_q", "xs", "xz"], ["x_d"]),
        helper.make_node(source, ["x_d", "w0"] if source == "Conv" else ["x_d"], ["c"], name="first"),
    ]
    last = "c"
    if clamp is not None:
        bounds = ["", ""]
        for index, (name, bound) in enumerate(zip(("lo", "hi"), clamp, strict=True)):
            if np.isfinite(bound):
                constants[name], bounds[index] = np.float32(bound), name
        op_type = "Relu" if clamp == (0.0, np.inf) else "Clip"
        nodes.append(helper.make_node(op_type, ["c", *(bounds if op_type == "Clip" else [])], ["r"], name="clamp"))
        last = "r"
    filters = rng.integers(-127, 128, (3 * multiplier, 3 // group, 3, 3))
    w_steps = np.array([0.01, 0.02, 0.03])[:, None].repeat(multiplier, 1).reshape(-1).astype(np.float32)
    if weight == "float":
        constants["w"] = filters * 0.01
        read = "w"
    else:
        per_tensor = weight != "per channel"
        constants["ws"] = np.float32(0.02) if per_tensor else w_steps
        constants["wz"] = np.zeros(() if per_tensor else w_steps.shape, np.int8)
        spread = np.float32(0.02) if per_tensor else w_steps.reshape(-1, 1, 1, 1)
        if weight == "quantized":
            constants["w"] = (filters * spread).astype(np.float32)
            nodes.append(helper.make_node("QuantizeLinear", ["w", "ws", "wz"], ["w_q"], axis=0))
        else:
            constants["w_q"] = filters.astype(np.int8)
        nodes.append(helper.make_node("DequantizeLinear", ["w_q", "ws", "wz"], ["w_d"], axis=0))
        read = "w_d"
    nodes += [
        helper.make_node("QuantizeLinear", [last, "s", "z"], ["q"], axis=axis),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="dq", axis=axis),
        helper.make_node("Conv", ["d", read], ["y"], name="depthwise", group=group, pads=[1, 1, 1, 1]),
    ]
    if head:
        constants |= {"ys": np.float32(0.1), "yz": np.int8(0)}
        nodes[-1].output[0] = "e"
        nodes.append(helper.make_node("QuantizeLinear", ["e", "ys", "yz"], ["y_q"]))
        nodes.append(helper.make_node("DequantizeLinear", ["y_q", "ys", "yz"], ["y"]))
    if also_read:
        nodes.append(helper.make_node("Neg", [also_read], ["v"]))
    graph = helper.make_graph(
        _ordered(nodes, {"x", *constants}),
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, X.shape)],
        [
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            for name in ("y", *(["v"] if also_read else []), *([also_output] if also_output else []))
        ],
        [
            numpy_helper.from_array(
                np.asarray(value, np.float32) if np.asarray(value).dtype.kind == "f" else np.asarray(value), name
            )
            for name, value in constants.items()
        ],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return Model.from_proto(onnx.shape_inference.infer_shapes(proto))


def _ordered(nodes: list[onnx.NodeProto], known: set[str]) -> list[onnx.NodeProto]:
    left, done = list(nodes), list[onnx.NodeProto]()
    while left:
        node = next(each for each in left if all(name in known or not name for name in each.input))
        left.remove(node)
        done.append(node)
        known.update(node.output)
    return done


def fakes(model: Model) -> list[FakeQuant]:
    return [fake for fake in fake_quants(model, per_channel=True) if isinstance(fake, FakeQuant)]


GOLDEN = """<ir_version: 8, opset_import: ["" : 17]>
g (float[1,2,3,3] x) => (float[1,2,3,3] y)
<float[2,2,1,1] v = {1, 2, 3, 4}, float[2] s = {0.5, 0.125}, uint8[2] z = {0, 0},
 int8[2,1,1,1] w = {3, -5}, float[2] ws = {2, 4}, int8[2] wz = {0, 0}> {
  [conv] c = Conv (x, v)
  [relu] r = Relu (c)
  [q] i = QuantizeLinear <axis = 1> (r, s, z)
  [d] t = DequantizeLinear <axis = 1> (i, s, z)
  [dw] u = DequantizeLinear <axis = 0> (w, ws, wz)
  [depthwise] y = Conv <group = 2> (t, u)
}"""
FOLDED = """<ir_version: 8, opset_import: ["" : 17]>
g (float[1,2,3,3] x) => (float[1,2,3,3] y)
<float[2,2,1,1] v = {1, 2, 3, 4}, float[1,2,1,1] c_ratio = {1, 4}, int8[2,1,1,1] u_quantized = {3, -5},
 float[2] u_scale = {2, 1}, int8[2] zero_point = {0, 0}, float r_scale = {0.5}, uint8 zero_point_1 = {0}> {
  [conv] c = Conv (x, v)
  [c_rescaled] c_rescaled = Mul (c, c_ratio)
  [relu] r = Relu (c_rescaled)
  [r_QuantizeLinear] r_quantized = QuantizeLinear (r, r_scale, zero_point_1)
  [r_DequantizeLinear] r_dequantized = DequantizeLinear (r_quantized, r_scale, zero_point_1)
  [u_DequantizeLinear] u_dequantized = DequantizeLinear <axis = 0> (u_quantized, u_scale, zero_point)
  [depthwise] y = Conv <group = 2> (r_dequantized, u_dequantized)
}"""


def test_the_ratios_go_into_the_layers_on_either_side() -> None:
    _, result = check_pass(FoldChannelSteps(), GOLDEN, FOLDED)
    assert result.counts == {"folded": 1}


@pytest.mark.parametrize("clamp", [None, (0.0, np.inf), (0.0, 6.0), (-np.inf, 6.0)])
@pytest.mark.parametrize("zero", [0, 100])
@pytest.mark.parametrize("weight", ["per channel", "per tensor", "quantized", "float"])
@pytest.mark.parametrize("multiplier", [1, 2])
def test_the_numbers_stay(clamp: Any, zero: int, weight: str, multiplier: int) -> None:
    model = network(clamp=clamp, zeros=zero, weight=weight, multiplier=multiplier)
    levels = {fake.source.name: model.constant(fake.source) for fake in fakes(model) if fake.constant}
    expected = run(model, {"x": X})[0]
    result = apply(FoldChannelSteps(), model)
    assert result.counts == {"folded": 1}
    assert all(fake.params.axis is None for fake in fakes(model) if not fake.constant)
    np.testing.assert_allclose(run(model, {"x": X})[0], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    if weight in ("per channel", "per tensor"):
        (fake,) = (fake for fake in fakes(model) if fake.constant)
        np.testing.assert_array_equal(model.constant(fake.source), levels["w_q"])
    assert not {"s", "z", "w", "w_q", "ws"} & set(model.graph.initializers)


NEAR = {
    "another axis": {"axis": 0},
    "the tensor on its grid is an output": {"also_output": "d"},
    "different zero points": {"zeros": (0, 1, 0)},
    "no depthwise layer": {"group": 1},
    "a clamp that ends before the grid": {"clamp": (0.0, 3.0)},
    "a clamp that begins elsewhere": {"clamp": (-1.0, 6.0)},
    "the tensor is read by something else": {"also_read": "d"},
    "the tensor before its grid is read": {"also_read": "r"},
    "the tensor before its clamp is read": {"also_read": "c"},
    "no layer in front": {"source": "Sigmoid"},
}


@pytest.mark.parametrize("name", NEAR)
def test_what_does_not_fit_is_left(name: str) -> None:
    model = network(**NEAR[name])
    assert not FoldChannelSteps().run(model, CTX).modified


def test_with_it_the_depthwise_layer_runs_in_integers() -> None:
    model = network(head=True).to_proto()
    conversion = convert(model)
    assert conversion.certificate.integer_macs_percent == 100
    expected, actual = run(model, {"x": X})[0], run(conversion.model, {"x": X}, optimize=True)[0]
    np.testing.assert_allclose(actual, expected, atol=0.1 * 1.01)


def test_the_levels_are_still_those_of_the_tensor_in_the_source() -> None:
    levels = convert(network().to_proto()).fidelity_on([{"x": X}]).local_levels
    assert levels is not None
    (folded,) = [tensor for tensor in levels.tensors if tensor.tensor == "r"]
    assert folded.same_grid
    # The first layer's weight is rounded here for the first time.
    assert folded.within_one_percent > 95.0
    assert folded.largest <= 4.0
