import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as oir
import pytest
from support import TARGET, apply, check_pass, parse, run

from qat2int8.ir import Code, InvalidModel, Model
from qat2int8.passes import Context
from qat2int8.passes.canonicalize import Canonicalize
from qat2int8.passes.fake_quant import FakeQuant, fake_quants
from qat2int8.passes.float_data_movement import FloatDataMovement
from qat2int8.passes.fold_constants import FoldConstants
from qat2int8.passes.raise_qoperators import RaiseQoperators

CTX = Context(TARGET)
HEADER = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>'
RNG = np.random.default_rng(0)
PARAMETERS: dict[str, npt.NDArray[Any]] = {
    "s": np.float32(0.05),
    "t": np.float32(0.03),
    "o": np.float32(0.11),
    "one": np.float32([0.05]),
    "tiny": np.float32(1 / 256),
    "w22": np.full((2, 2), 0.5, np.float32),
    "k0": np.uint8(0),
    "w4": np.float32([0.01, 0.02, 0.03, 0.04]),
    "z": np.uint8(120),
    "k": np.uint8(7),
    "zone": np.uint8([120]),
    "i": np.int8(-3),
    "j": np.int8(5),
    "i0": np.int8(0),
    "i4": np.int8([0, 1, -2, 3]),
    "kernel": RNG.integers(-128, 128, (4, 2, 3, 3)).astype(np.int8),
    "ukernel": RNG.integers(0, 256, (4, 2, 3, 3)).astype(np.uint8),
    "grouped": RNG.integers(-128, 128, (4, 1, 3, 3)).astype(np.int8),
    "m3": RNG.integers(-128, 128, (3, 4)).astype(np.int8),
    "b4": RNG.integers(-2000, 2000, 4).astype(np.int32),
    "b1": np.array([100], np.int32),
    "b0": np.array(100, np.int32),
    "f4": RNG.normal(size=4).astype(np.float32),
    "m": RNG.integers(-128, 128, (6, 4)).astype(np.int8),
    "mt": RNG.integers(-128, 128, (4, 6)).astype(np.int8),
    "c": RNG.integers(0, 256, (1, 2, 6, 6)).astype(np.uint8),
}
FEEDS = {
    "x": RNG.integers(0, 256, (1, 2, 6, 6)).astype(np.uint8),
    "v": RNG.integers(0, 256, (1, 2, 6, 6)).astype(np.uint8),
    "n": RNG.integers(-128, 128, (1, 2, 6, 6)).astype(np.int8),
    "a": RNG.integers(0, 256, (3, 6)).astype(np.uint8),
    "r": np.array(0.05, np.float32),
    "mask": RNG.integers(0, 2, (1, 1, 6, 6)).astype(bool),
}


def node(text: str, outputs: list[str] | None = None, **attributes: Any) -> onnx.NodeProto:
    """An operator as ``Name input input ...``, a dot for an input that is not there."""
    op_type, *inputs = text.split()
    domain = "" if op_type in ("QLinearConv", "QLinearMatMul") else "com.microsoft"
    names = ["" if name == "." else name for name in inputs]
    return onnx.helper.make_node(op_type, names, outputs or ["y"], name="op", domain=domain, **attributes)


def model_of(*nodes: onnx.NodeProto, output: int = onnx.TensorProto.UINT8, rank: int = 4) -> Model:
    for index, made in enumerate(nodes[1:]):
        made.name = "abc"[index]
    used = {name for made in nodes for name in made.input}
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [
            onnx.helper.make_tensor_value_info(
                name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
            )
            for name, array in FEEDS.items()
        ],
        [onnx.helper.make_tensor_value_info("y", output, [None] * rank)],
        [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in PARAMETERS.items() if k in used],
    )
    imports = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    return Model.from_proto(onnx.helper.make_model(graph, opset_imports=imports, ir_version=8))


def op_types(model: Model) -> list[str]:
    return [made.op_type for made in model.graph]


def check_numbers(model: Model, *, lsb: int = 1) -> None:
    """Raise the model, and compare with what the operators computed before."""
    before = model.to_proto()
    result = apply(RaiseQoperators(), model)
    assert not result.diagnostics
    assert result.modified
    assert not {made.domain for made in model.graph} - {""}
    for expected, actual in zip(run(before, FEEDS), run(model, FEEDS), strict=True):
        assert expected.dtype == actual.dtype
        assert expected.shape == actual.shape
        if expected.dtype.kind == "f":
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
        else:
            assert np.ptp(expected.astype(int)) > 20
            assert np.abs(expected.astype(int) - actual.astype(int)).max() <= lsb


def test_a_convolution_is_raised() -> None:
    check_pass(
        RaiseQoperators(),
        """g (uint8[1,1,2,2] x) => (uint8[1,2,2,2] y)
        <float xs = {0.5}, uint8 xz = {7}, int8[2,1,1,1] w = {1, 2}, float[2] ws = {0.5, 0.25},
         int8[2] wz = {0, 0}, float ys = {0.125}, uint8 yz = {9}, int32[2] b = {100, -100}> {
          [conv] y = QLinearConv <kernel_shape = [1, 1]> (x, xs, xz, w, ws, wz, ys, yz, b)
        }""",
        """g (uint8[1,1,2,2] x) => (uint8[1,2,2,2] y)
        <int8[2,1,1,1] w = {1, 2}, float ys = {0.125}, uint8 yz = {9}, int32[2] b = {100, -100},
         float x_scale = {0.5}, uint8 x_zero_point = {7},
         float[2] w_scale = {0.5, 0.25}, int8[2] w_zero_point = {0, 0}, float[2] b_scale = {0.25, 0.125}> {
          [x_dequantized] x_dequantized = DequantizeLinear (x, x_scale, x_zero_point)
          [w_dequantized] w_dequantized = DequantizeLinear <axis = 0> (w, w_scale, w_zero_point)
          [b_dequantized] b_dequantized = DequantizeLinear <axis = 0> (b, b_scale)
          [conv] y_float = Conv <kernel_shape = [1, 1]> (x_dequantized, w_dequantized, b_dequantized)
          [y_quantized] y = QuantizeLinear (y_float, ys, yz)
        }""",
    )


CONV = {"pads": [1, 1, 1, 1], "strides": [2, 2]}


@pytest.mark.parametrize(
    ("text", "attributes"),
    [
        ("QLinearConv x s z kernel t i0 o k b4", CONV),
        ("QLinearConv x s z kernel w4 i0 o k b4", CONV),
        ("QLinearConv x s z kernel w4 i4 o k", {"dilations": [2, 2]}),
        ("QLinearConv x s z kernel t i0 o k", {"auto_pad": "SAME_UPPER"}),
        ("QLinearConv x one zone kernel t i0 one zone b4", {}),
        ("QLinearConv x s z ukernel t k o k b4", {}),
        ("QLinearConv x s z grouped w4 i0 o k b4", {"group": 2}),
        ("QLinearAdd x s z v t k o k", {}),
        ("QLinearAdd x s z x s k o k", {}),
        ("QLinearAdd x s z x t z o k", {}),
        ("QLinearAdd c s z v t k o k", {}),
        ("QLinearAdd x s z x s z o k", {}),
        ("QLinearMul x s z v t k o k", {}),
        ("QLinearAveragePool x s z t k", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
        ("QLinearAveragePool x s z t k", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
        ("QLinearAveragePool x s z t k", {"kernel_shape": [4, 4], "strides": [3, 3], "ceil_mode": 1}),
        ("QLinearSigmoid x s z tiny .", {}),
        ("QLinearLeakyRelu x s z t k", {"alpha": 0.25}),
        ("QLinearSoftmax x s z tiny k0", {"axis": -1, "opset": 13}),
        ("QLinearSoftmax x s z tiny k0", {"axis": 1, "opset": 13}),
        ("QLinearSoftmax x s z tiny k0", {"axis": 3, "opset": 11}),
        ("QLinearConcat o k x s z v t k c s k", {"axis": 1}),
        ("QLinearWhere mask x s z v t k o k", {}),
    ],
)
def test_every_operator_computes_what_it_did(text: str, attributes: dict[str, Any]) -> None:
    check_numbers(model_of(node(text, **attributes)))


def test_the_integers_of_signed_operators_stay_signed() -> None:
    check_numbers(model_of(node("QLinearAdd n s i n t j o j"), output=onnx.TensorProto.INT8))


@pytest.mark.parametrize(
    ("text", "output"),
    [
        ("QLinearAdd x s . x t . o .", onnx.TensorProto.UINT8),
        ("QLinearAdd n s . n t . o .", onnx.TensorProto.INT8),
        ("QLinearAdd n s i0 n t i0 o .", onnx.TensorProto.INT8),
    ],
)
def test_without_zero_points_they_are_zero_of_the_type_of_the_operands(text: str, output: int) -> None:
    model, name = model_of(node(text), output=output), text.split()[1]
    apply(RaiseQoperators(), model)
    limits = np.iinfo(FEEDS[name].dtype)
    expected = np.clip(np.round(FEEDS[name] * np.float32(0.05 + 0.03) / np.float32(0.11)), limits.min, limits.max)
    (actual,) = run(model, FEEDS)
    assert actual.dtype == FEEDS[name].dtype
    np.testing.assert_allclose(actual, expected, atol=1)


def test_a_global_average_pool_is_raised() -> None:
    model = model_of(node("QLinearGlobalAveragePool x s z tiny k", channels_last=0))
    before = model.to_proto()
    apply(RaiseQoperators(), model)
    assert "GlobalAveragePool" in op_types(model)
    np.testing.assert_allclose(run(model, FEEDS)[0].astype(int), run(before, FEEDS)[0].astype(int), atol=1)


@pytest.mark.parametrize(
    ("text", "attributes"),
    [
        ("QLinearMatMul a s z m t i0 o k", {}),
        ("QLinearMatMul a s z m w4 i4 o k", {}),
        ("QGemm a s z m t i0 b4 o k", {}),
        ("QGemm a s z m w4 i4 b4 o k", {}),
        ("QGemm a s z m3 w4 i4 b4 o k", {"transA": 1}),
        ("QGemm a s z mt w4 i4 b4 o k", {"transB": 1}),
        ("QGemm a s z mt w4 i4 . o k", {"transB": 1}),
        ("QGemm a s z mt w4 i4 b4 o k", {"transB": 1, "alpha": 0.5}),
    ],
)
def test_matrix_products_compute_what_they_did(text: str, attributes: dict[str, Any]) -> None:
    check_numbers(model_of(node(text, **attributes), rank=2))


@pytest.mark.parametrize(
    ("text", "attributes"),
    [
        ("QGemm a s z mt w4 i4 b4", {"transB": 1}),
        ("QGemm a s z mt t i0 b4 . .", {"transB": 1, "alpha": 2.0}),
        ("MatMulIntegerToFloat a m s t", {}),
        ("MatMulIntegerToFloat a m s t z i", {}),
        ("MatMulIntegerToFloat a m s w4 z i4 f4", {}),
        ("MatMulIntegerToFloat a m s w4 . . f4", {}),
    ],
)
def test_float_results_stay_float(text: str, attributes: dict[str, Any]) -> None:
    model = model_of(node(text, **attributes), output=onnx.TensorProto.FLOAT, rank=2)
    check_numbers(model)
    assert "QuantizeLinear" not in op_types(model)


def test_readers_that_agree_share_a_dequantizer_and_others_do_not() -> None:
    model = model_of(
        node("QLinearAdd x s z x s z o k", ["p"]),
        node("QLinearAdd x s z p o k o k", ["q"]),
        node("QLinearAdd p t k q o k o k", ["y"]),
    )
    check_numbers(model, lsb=2)
    read = [made.inputs[0].name for made in model.graph if made.op_type == "DequantizeLinear"]  # type: ignore[union-attr]
    assert sorted(read) == ["p", "p", "q", "x"]
    assert [made.name for made in model.graph if made.op_type == "Add"] == ["op", "a", "b"]


def test_a_bias_means_something_else_behind_every_pair_of_scales() -> None:
    model = model_of(
        node("QLinearConv x s z kernel t i0 o k b4", ["p"]),
        node("QLinearConv x s z kernel w4 i0 o k b4", ["q"]),
        node("QLinearAdd p o k q o k o k", ["y"]),
    )
    model.graph.initializers["b4"].const_value = oir.tensor(np.array([30000, -30000, 20000, 9000], np.int32))
    check_numbers(model, lsb=2)


def test_raised_operators_form_fake_quants() -> None:
    model = model_of(
        node("QLinearConv x s z kernel w4 i0 o k b4", ["p"]), node("QLinearAdd p o k p o k o k", ["y"])
    )
    apply(RaiseQoperators(), model)
    fakes = [fake for fake in fake_quants(model) if isinstance(fake, FakeQuant)]
    kinds = [(fake.constant, fake.is_bias, fake.is_given) for fake in fakes]
    assert kinds == [
        (False, False, True),
        (True, False, False),
        (True, True, False),
        (False, False, False),
    ]


@pytest.mark.parametrize(
    ("text", "attributes", "reason"),
    [
        ("QLinearAveragePool x s z t k", {"kernel_shape": [2, 2], "channels_last": 1}, "last axis"),
        ("QLinearGlobalAveragePool x s z t k", {"channels_last": 1}, "last axis"),
        ("QLinearSoftmax x s z t k", {"axis": 1, "opset": 12}, "flattens its input"),
        ("QLinearSoftmax x s z t k", {"axis": -2, "opset": 12}, "flattens its input"),
        ("QLinearAdd x r z v t k o k", {}, "'r' is computed while the model runs"),
        ("QLinearAdd x s z v t k r k", {}, "'r' is computed while the model runs"),
        ("QLinearAdd x w4 z v t k o k", {}, "'x' has one scale per channel"),
        ("QLinearAdd x s z v t k w4 k", {}, "its result has one scale per channel"),
        ("QLinearMatMul hidden s z ukernel w4 k o k", {}, "rank of 'ukernel'"),
        ("QLinearMatMul x s z c w22 k o k", {}, "neither one per tensor"),
        ("QLinearAdd x s z v t k one r", {}, "'r' is computed while the model runs"),
        ("QGemm a s z mt w4 i4 b1 o k", {"transB": 1}, "its bias 'b1' has not one element per channel"),
        ("QGemm a s z mt w4 i4 b0 o k", {"transB": 1}, "its bias 'b0' has not one element per channel"),
        ("QLinearAdd hidden s . hidden t . o .", {}, "type of its result is not known"),
    ],
)
def test_what_cannot_be_raised_is_kept_and_reported(text: str, attributes: dict[str, Any], reason: str) -> None:
    model = model_of(node(text, **attributes))
    if "hidden" in text:
        op_type = text.split()[0]
        made = next(made for made in model.graph if made.op_type == op_type)
        for value in made.inputs:
            if value is not None and value.name in ("hidden", "ukernel"):
                value.shape = value.type = None
    before, constants = op_types(model), set(model.graph.initializers)
    result = RaiseQoperators().run(model, CTX)
    (note,) = result.diagnostics
    assert (note.code, note.node, note.value) == (Code.UNSUPPORTED_OP, "op", "y")
    assert reason in note.reason
    assert note.remedy
    assert not result.modified
    assert op_types(model) == before
    assert set(model.graph.initializers) == constants


@pytest.mark.parametrize("text", ["QLinearConv x s z kernel", "QLinearAdd x s z . t k o k", "QLinearConcat o k"])
def test_a_missing_operand_is_an_error(text: str) -> None:
    with pytest.raises(InvalidModel, match=rf"{text.split()[0]} 'op'"):
        RaiseQoperators().run(model_of(node(text)), CTX)


def test_an_operator_of_the_same_name_elsewhere_is_left_alone() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17, "my" : 1]> g (uint8[2] x) => (uint8[2] y) <float s = {0.5}> {
          y = my.QLinearAdd (x, s, , x, s, , s)
        }"""
    )
    assert not apply(RaiseQoperators(), model).modified


def test_parameters_of_one_element_become_one_scalar_for_all() -> None:
    model = model_of(
        node("QLinearConv x one zone kernel t i0 one zone", ["p"]),
        node("QLinearConv v one zone kernel t i0 one zone", ["q"]),
        node("QLinearAdd p s z q s z o k", ["y"]),
    )
    check_numbers(model, lsb=2)
    quantizers = [made for made in model.graph if made.op_type == "QuantizeLinear"]
    assert quantizers[0].inputs[1:] == quantizers[1].inputs[1:]
    shapes = [model.constant(value).shape for made in quantizers for value in made.inputs[1:]]  # type: ignore[union-attr]
    assert shapes == [()] * 6


def test_a_parameter_read_elsewhere_stays() -> None:
    model = model_of(node("QLinearAdd x s z v t k o k", ["p"]), onnx.helper.make_node("Add", ["p", "z"], ["y"]))
    apply(RaiseQoperators(), model)
    assert {"z", "o", "k"} <= set(model.graph.initializers)
    assert not {"s", "t"} & set(model.graph.initializers)


MODELS = os.environ.get("QAT2INT8_ZOO", "")


@pytest.mark.zoo
@pytest.mark.skipif(not MODELS, reason="QAT2INT8_ZOO names no folder of models")
@pytest.mark.parametrize("path", sorted(Path(MODELS).glob("*qop*.onnx")) if MODELS else [], ids=lambda p: p.stem)
def test_exported_models_compute_what_they_did(path: Path) -> None:
    proto = onnx.load(path)
    model = Model.from_proto(proto)
    Canonicalize().run(model, CTX)
    FoldConstants().run(model, CTX)
    assert not apply(RaiseQoperators(), model).diagnostics
    apply(FloatDataMovement(), model)
    assert not {made.domain for made in model.graph} - {""}
    stored = np.load(path.with_suffix(".npz"))
    feeds = {model.graph.inputs[0].name or "": stored["input_0"]}
    (expected,), (actual,) = run(proto, feeds), run(model, feeds)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2.01 * np.ptp(expected) / 255)
    assert np.mean(actual.argmax(-1) == expected.argmax(-1)) > 0.99
