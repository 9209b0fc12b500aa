from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as oir
import pytest
from onnx import helper, numpy_helper
from support import TARGET, apply, check_pass, parse, run

from qat2int8.ir import Code, Model, Severity
from qat2int8.passes import Context
from qat2int8.passes.fake_quant import FakeQuant, fake_quants
from qat2int8.passes.narrow_wide_grids import NarrowWideGrids

CTX = Context(TARGET)
NARROW = NarrowWideGrids(requantize=True)
HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
X = np.linspace(-9, 9, 40, dtype=np.float32).reshape(4, 10)


def activation(scale: float, zero: int, dtype: Any, *, relu: bool = False, opset: int = 21) -> Model:
    """``x -> [Relu] -> Quantize -> Dequantize -> y``; before opset 21 in the domain of onnxruntime."""
    domain = "" if opset >= 21 else "com.microsoft"
    source = "r" if relu else "x"
    nodes = [helper.make_node("Relu", ["x"], ["r"])] if relu else []
    nodes.append(helper.make_node("QuantizeLinear", [source, "s", "z"], ["q"], domain=domain))
    nodes.append(helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], domain=domain, name="dq"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (4, 10))],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (4, 10))],
        [
            numpy_helper.from_array(np.asarray(scale, np.float32), "s"),
            numpy_helper.from_array(np.asarray(zero, dtype), "z"),
        ],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return Model.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=10))


def grids(model: Model) -> list[FakeQuant]:
    return [fake for fake in fake_quants(model) if isinstance(fake, FakeQuant)]


BEFORE = f"""{HEADER} g (float[2] x) => (float[2] y) <float s = {{0.001}}, int16 z = {{0}}> {{
  [q] i = QuantizeLinear (x, s, z)
  [d] y = DequantizeLinear (i, s, z)
}}"""


def test_a_pair_is_replaced() -> None:
    after = f"""{HEADER} g (float[2] x) => (float[2] y)
    <float x_scale = {{0.258007873}}, int8 x_zero_point = {{0}}> {{
      [x_QuantizeLinear] x_narrow = QuantizeLinear (x, x_scale, x_zero_point)
      [x_narrow_DequantizeLinear] y = DequantizeLinear (x_narrow, x_scale, x_zero_point)
    }}"""
    _, result = check_pass(NARROW, BEFORE, after)
    assert result.counts == {"narrowed": 1}
    (note,) = result.diagnostics
    assert (note.code, note.severity, note.value) == (Code.GRID_REQUANTIZED, Severity.NOTE, "x")
    assert "int16" in note.reason


def test_nothing_is_narrowed_unless_asked() -> None:
    check_pass(NarrowWideGrids(), BEFORE, BEFORE)


@pytest.mark.parametrize(
    ("scale", "zero", "dtype", "relu", "low", "high", "levels"),
    [
        (2.0**-12, 0, np.int16, False, -8.0, 8.0, 254),
        (2.0**-12, 0, np.int16, True, 0.0, 8.0, 255),
        (2.0**-13, 0, np.uint16, False, 0.0, 8.0, 255),
        (2.0**-13, 32768, np.uint16, False, -4.0, 4.0, 255),
        (2.0**-13, 20000, np.uint16, False, -2.44, 5.56, 255),
        (2.0**-13, 20000, np.uint16, True, 0.0, 5.56, 255),
        (2.0**-13, 1000, np.int16, False, -4.12, 3.88, 255),
    ],
)
def test_the_grid_ends_where_it_did(
    scale: float, zero: int, dtype: Any, relu: bool, low: float, high: float, levels: int
) -> None:
    for opset in (17, 21):
        model = activation(scale, zero, dtype, relu=relu, opset=opset)
        before = run(model, {"x": X})[0]
        apply(NARROW, model)
        (fake,) = grids(model)
        step = (high - low) / levels
        assert float(fake.params.scale) == pytest.approx(step, rel=2e-3)
        after = run(model, {"x": X})[0]
        signed = (low, high) == (-8.0, 8.0)
        assert int(fake.params.zero_point) == (0 if signed else round(-low / step))
        within = (low < X) & (high > X)
        assert np.abs(after - before)[within].max() <= 0.51 * step
        # A symmetric grid has one level more below than above.
        assert (after.min(), after.max()) == pytest.approx((before.min(), before.max()), abs=1.01 * step)


def weight_model(weight: npt.NDArray[Any], scale: npt.ArrayLike) -> Model:
    steps = np.asarray(scale, np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], axis=1),
            helper.make_node("MatMul", ["x", "d"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (4, 10))],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (4, weight.shape[1]))],
        [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(steps, "s"),
            numpy_helper.from_array(np.zeros(steps.shape, weight.dtype), "z"),
        ],
    )
    return Model.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def test_integers_of_a_weight_are_rounded_again_per_channel() -> None:
    levels = np.random.default_rng(0).integers(-32767, 32768, (10, 3)).astype(np.int16)
    steps = np.array([1e-5, 2e-5, 3e-5], np.float32)
    model = weight_model(levels, steps)
    apply(NARROW, model)
    (fake,) = grids(model)
    narrow = model.constant(fake.source)
    assert narrow is not None
    assert narrow.dtype == np.int8
    np.testing.assert_allclose(fake.params.scale, steps * 32767 / 127, rtol=1e-6)
    error = np.abs(fake.params.dequantize(narrow) - levels * steps)
    assert (error <= steps * 32767 / 127 * 0.501).all()
    assert not {"w", "s", "z"} & set(model.graph.initializers)


@pytest.mark.parametrize("dtype", [np.int8, np.int32])
def test_other_widths_are_left(dtype: Any) -> None:
    model = weight_model(np.ones((10, 3), dtype), [1e-3, 1e-3, 1e-3])
    assert not NARROW.run(model, CTX).modified


def test_one_tensor_is_reported_once() -> None:
    text = f"""{HEADER} g (float[2] x) => (float[2] y, float[2] v) <float s = {{0.001}}, int16 z = {{0}}> {{
      i = QuantizeLinear (x, s, z)
      y = DequantizeLinear (i, s, z)
      d = DequantizeLinear (i, s, z)
      v = Neg (d)
    }}"""
    model = parse(text)
    result = apply(NARROW, model)
    assert result.counts == {"narrowed": 2}
    assert len(result.diagnostics) == 1


def test_shapes_behind_quantizers_of_onnxruntime_are_known_afterwards() -> None:
    model = activation(0.001, 0, np.int16, opset=17)
    quantized = model.graph[0].outputs[0]
    assert quantized.shape is None
    negated = oir.node("Neg", [model.graph.outputs[0]], name="n")
    model.graph.append(negated)
    negated.outputs[0].name = "v"
    NARROW.run(model, CTX)
    assert negated.outputs[0].shape == (4, 10)
