"""Q/DQ written as operators on integers: what onnxruntime would make of it, bit by bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as oir
import pytest
from support import TARGET, apply, check_pass, graph_text, named, run

from qat2int8.ir import INT8, Format, Model, PipelineError, QuantParams
from qat2int8.passes import Context
from qat2int8.passes.cleanup import Cleanup
from qat2int8.passes.lower_to_qoperators import LowerToQoperators
from qat2int8.passes.raise_qoperators import RaiseQoperators

CTX = Context(replace(TARGET, formats=(Format.QDQ, Format.QOPERATOR)))
RNG = np.random.default_rng(0)
FEEDS: dict[str, npt.NDArray[Any]] = {
    "x": RNG.integers(0, 256, (1, 2, 6, 6)).astype(np.uint8),
    "v": RNG.integers(0, 256, (1, 2, 6, 6)).astype(np.uint8),
    "n": RNG.integers(-128, 128, (1, 2, 6, 6)).astype(np.int8),
    "a": RNG.integers(0, 256, (3, 6)).astype(np.uint8),
    "mask": RNG.integers(0, 2, (1, 1, 6, 6)).astype(bool),
}
CONSTANTS: dict[str, npt.NDArray[Any]] = {
    "kernel": RNG.integers(-128, 128, (4, 2, 3, 3)).astype(np.int8),
    "plain": RNG.integers(-128, 128, (4, 2, 3, 3)).astype(np.int8),
    "ukernel": RNG.integers(0, 256, (4, 2, 3, 3)).astype(np.uint8),
    "grouped": RNG.integers(-128, 128, (4, 1, 3, 3)).astype(np.int8),
    "inner": RNG.integers(-128, 128, (4, 2, 3, 3)).astype(np.int8),
    "m": RNG.integers(-128, 128, (6, 4)).astype(np.int8),
    "mt": RNG.integers(-128, 128, (4, 6)).astype(np.int8),
    "m3": RNG.integers(-128, 128, (3, 4)).astype(np.int8),
    "rows": RNG.integers(-128, 128, (6, 4)).astype(np.int8),
    "c": RNG.integers(0, 256, (1, 2, 1, 1)).astype(np.uint8),
    "b": RNG.integers(-2000, 2000, 4).astype(np.int32),
    "bp": RNG.integers(-2000, 2000, 4).astype(np.int32),
    "bx": RNG.integers(-2000, 2000, 4).astype(np.int32),
    "bz": RNG.integers(-2000, 2000, 4).astype(np.int32),
    "b14": RNG.integers(-2000, 2000, (1, 4)).astype(np.int32),
    "b31": RNG.integers(-2000, 2000, (3, 1)).astype(np.int32),
    "m31": RNG.integers(-128, 128, (6, 4)).astype(np.int8),
    "w16": RNG.integers(0, 65536, (1, 2, 6, 6)).astype(np.uint16),
    "channels": RNG.integers(0, 256, (1, 2, 6, 6)).astype(np.uint8),
    "b8": RNG.integers(-100, 100, 4).astype(np.int8),
    "b3": RNG.integers(-100, 100, 3).astype(np.int32),
    "floats": RNG.normal(size=(1, 2, 6, 6)).astype(np.float32),
}
W4 = np.float32([0.01, 0.02, 0.03, 0.04])
GRIDS: dict[str, tuple[npt.ArrayLike, npt.NDArray[Any] | None, int | None]] = {
    "x": (0.05, np.uint8(120), None),
    "v": (0.03, np.uint8(7), None),
    "n": (0.05, np.int8(-3), None),
    "a": (0.05, np.uint8(120), None),
    "c": (0.07, np.uint8(9), None),
    "kernel": (W4, np.zeros(4, np.int8), 0),
    "plain": (0.03, np.int8(0), None),
    "ukernel": (0.03, np.uint8(11), None),
    "grouped": (W4, np.int8([0, 1, -2, 3]), 0),
    "inner": ([0.01, 0.02], np.zeros(2, np.int8), 1),
    "m": (W4, np.zeros(4, np.int8), -1),
    "mt": (W4, np.zeros(4, np.int8), 0),
    "m3": (W4, np.zeros(4, np.int8), 1),
    "rows": (np.full(6, 0.02), np.zeros(6, np.int8), 0),
    "b": (np.float32(0.05) * W4, None, 0),
    "bp": (np.float32(0.05) * np.float32(0.03), np.int32(0), None),
    "bx": (np.float32(0.05) * W4 * 1.01, None, 0),
    "bz": (np.float32(0.05) * W4, np.ones(4, np.int32), 0),
    "b14": (np.float32(0.05) * W4, None, 1),
    "b31": (np.float32(0.05) * np.float32(0.03), None, None),
    "m31": (0.03, np.int8(0), None),
    "w16": (0.001, np.uint16(300), None),
    "channels": ([0.05, 0.04], np.uint8([7, 7]), 1),
    "b8": (np.float32(0.05) * W4, None, 0),
    "b3": (np.full(3, np.float32(0.05) * np.float32(0.03)), None, 0),
}
"""Scale, zero point and axis of every tensor."""
OUT = (0.11, np.uint8(7))
TINY = (1 / 256, np.uint8(0))


def qdq(
    text: str,
    out: tuple[npt.ArrayLike, npt.NDArray[Any]] | None = OUT,
    *,
    opset: int = 17,
    grids: Mapping[str, Any] | None = None,
    **attributes: Any,
) -> Model:
    """A float op ``Name tensor tensor ...`` between Dequantize nodes and a Quantize to ``out``, if any."""
    op_type, *names = text.split()
    known = {**GRIDS, **(grids or {})}
    nodes, constants = [], {name: CONSTANTS[name] for name in names if name in CONSTANTS}
    for name in dict.fromkeys(names):
        if name not in known:
            continue
        scale, zero_point, axis = known[name]
        constants[f"{name}_s"] = np.asarray(scale, np.float32)
        if zero_point is not None:
            constants[f"{name}_z"] = zero_point
        read = [name, f"{name}_s", *([] if zero_point is None else [f"{name}_z"])]
        axes = {} if axis is None else {"axis": axis}
        nodes.append(onnx.helper.make_node("DequantizeLinear", read, [f"{name}_f"], name=f"dq_{name}", **axes))
    read = [f"{name}_f" if name in known else name for name in names]
    nodes.append(onnx.helper.make_node(op_type, read, ["y" if out is None else "f"], name="op", **attributes))
    if out is not None:
        constants["o_s"], constants["o_z"] = np.asarray(out[0], np.float32), np.asarray(out[1])
        nodes.append(onnx.helper.make_node("QuantizeLinear", ["f", "o_s", "o_z"], ["y"], name="q"))
    kind = np.float32 if out is None else np.asarray(out[1]).dtype
    rank = 2 if "a" in names else 4
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [
            onnx.helper.make_tensor_value_info(
                name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
            )
            for name, array in FEEDS.items()
        ],
        [
            onnx.helper.make_tensor_value_info(
                "y", onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind)), [None] * rank
            )
        ],
        [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    imports = [onnx.helper.make_opsetid("", opset)]
    return Model.from_proto(onnx.helper.make_model(graph, opset_imports=imports, ir_version=8))


def op_types(model: Model) -> list[str]:
    return [node.op_type for node in model.graph]


def check_lowered(model: Model, op_type: str) -> None:
    """It becomes this one operator, which computes what onnxruntime's own fusion does, and can be raised again."""
    before = model.to_proto()
    fused = run(before, FEEDS, optimize=True)
    result = apply(LowerToQoperators(), model, CTX)
    assert op_types(model) == [op_type]
    assert result.counts == {op_type: 1}
    assert model.graph[0].name == "op"
    for optimize in (False, True):
        for expected, actual in zip(fused, run(model, FEEDS, optimize=optimize), strict=True):
            assert expected.dtype == actual.dtype
            np.testing.assert_array_equal(actual, expected)
    assert np.ptp(fused[0].astype(float)) > 20 * (1 if fused[0].dtype.kind in "iu" else 0.05)
    apply(RaiseQoperators(), model, CTX)
    for expected, actual in zip(run(before, FEEDS), run(model, FEEDS), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_a_convolution_becomes_one_operator() -> None:
    check_pass(
        LowerToQoperators(),
        """g (uint8[1,1,2,2] x) => (uint8[1,2,2,2] y)
        <float xs = {0.5}, uint8 xz = {7}, int8[2,1,1,1] w = {1, 2}, float[2] ws = {0.5, 0.25},
         int8[2] wz = {0, 0}, int32[2] b = {100, -100}, float[2] bs = {0.25, 0.125}, int32[2] bz = {0, 0},
         float ys = {0.125}, uint8 yz = {9}> {
          [xd] xf = DequantizeLinear (x, xs, xz)
          [wd] wf = DequantizeLinear <axis = 0> (w, ws, wz)
          [bd] bf = DequantizeLinear <axis = 0> (b, bs, bz)
          [conv] f = Conv <kernel_shape = [1, 1]> (xf, wf, bf)
          [q] y = QuantizeLinear (f, ys, yz)
        }""",
        """g (uint8[1,1,2,2] x) => (uint8[1,2,2,2] y)
        <float xs = {0.5}, uint8 xz = {7}, int8[2,1,1,1] w = {1, 2}, float[2] ws = {0.5, 0.25},
         int8[2] wz = {0, 0}, int32[2] b = {100, -100}, float ys = {0.125}, uint8 yz = {9}> {
          [conv] y = QLinearConv <kernel_shape = [1, 1]> (x, xs, xz, w, ws, wz, ys, yz, b)
        }""",
        ctx=CTX,
    )


CONV = {"pads": [1, 1, 1, 1], "strides": [2, 2]}


@pytest.mark.parametrize(
    ("text", "attributes"),
    [
        ("Conv x kernel b", CONV),
        ("Conv x kernel", {"dilations": [2, 2]}),
        ("Conv x kernel", {"auto_pad": "SAME_UPPER"}),
        ("Conv x plain bp", {"kernel_shape": [3, 3]}),
        ("Conv x ukernel bp", {}),
        ("Conv x grouped b", {"group": 2}),
        ("Add x v", {}),
        ("Add x x", {}),
        ("Add c x", {}),
        ("Mul x v", {}),
        ("Mul x c", {}),
        ("AveragePool x", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
        ("AveragePool x", {"kernel_shape": [4, 4], "strides": [2, 2], "ceil_mode": 1}),
        ("LeakyRelu x", {"alpha": 0.25}),
        ("LeakyRelu x", {}),
        ("Concat x v x", {"axis": 1}),
        ("Concat x v", {"axis": -1}),
        ("Where mask x v", {}),
    ],
)
def test_every_operator_computes_what_the_runtime_would_make(text: str, attributes: dict[str, Any]) -> None:
    check_lowered(qdq(text, **attributes), f"QLinear{text.split()[0]}")


@pytest.mark.parametrize(
    ("text", "attributes"),
    [("Sigmoid x", {}), ("Softmax x", {"axis": 1}), ("Softmax x", {}), ("GlobalAveragePool x", {})],
)
def test_operators_with_small_results(text: str, attributes: dict[str, Any]) -> None:
    out = (0.02, np.uint8(120)) if text.startswith("Global") else TINY
    model = qdq(text, out, **attributes)
    before = run(model, FEEDS, optimize=True)
    apply(LowerToQoperators(), model, CTX)
    assert op_types(model) == [f"QLinear{text.split()[0]}"]
    np.testing.assert_array_equal(run(model, FEEDS)[0], before[0])
    assert len(np.unique(before[0])) > (1 if text.startswith("Global") else 20)


@pytest.mark.parametrize(
    ("text", "attributes"),
    [
        ("MatMul a m", {}),
        ("Gemm a m b", {}),
        ("Gemm a m", {"alpha": 0.5}),
        ("Gemm a mt b", {"transB": 1}),
        ("Gemm a m b14", {}),
        ("Gemm a m3 b", {"transA": 1}),
    ],
)
@pytest.mark.parametrize("out", [OUT, None], ids=["quantized", "float"])
def test_matrix_products(text: str, attributes: dict[str, Any], out: Any) -> None:
    operators = {"Gemm": "QGemm", "MatMul": "QLinearMatMul" if out else "MatMulIntegerToFloat"}
    check_lowered(qdq(text, out, **attributes), operators[text.split()[0]])


@pytest.mark.parametrize("text", ["Add n n", "Conv n kernel b", "LeakyRelu n"])
def test_signed_integers_stay_signed(text: str) -> None:
    """onnxruntime's fusion turns these into uint8 first, so it is compared with one that did not happen."""
    model = qdq(text, (0.11, np.int8(7)))
    (expected,) = run(model, FEEDS)
    apply(LowerToQoperators(), model, CTX)
    assert len(op_types(model)) == 1
    (actual,) = run(model, FEEDS)
    assert actual.dtype == np.int8
    assert np.abs(actual.astype(int) - expected.astype(int)).max() <= 1


def test_a_product_of_two_activations() -> None:
    check_lowered(qdq("MatMul x v"), "QLinearMatMul")


@pytest.mark.parametrize(
    ("text", "kwargs", "why"),
    [
        ("Sub x v", {}, "there is no such operator"),
        ("ConvTranspose x kernel", {}, "there is no such operator"),
        ("Add x n", {}, "types of the operands differ"),
        ("Concat x n", {"axis": 1}, "types of the operands differ"),
        ("Add x v", {"out": (0.11, np.int8(7))}, "types of operand and result differ"),
        ("Conv x kernel", {"out": (0.11, np.int8(7))}, "types of operand and result differ"),
        ("Conv n ukernel", {"out": (0.11, np.int8(7))}, "signed data wants signed weights"),
        ("Conv x kernel b", {"out": None}, "a convolution cannot end in float"),
        ("Add x v", {"out": None}, "an addition cannot end in float"),
        ("Conv x inner", {}, "a scale per input channel"),
        ("MatMul a rows", {}, "a scale per input channel"),
        ("Add x floats", {}, "one operand is in float"),
        ("Conv x kernel bx", {}, "the bias is on another step than the product of scales"),
        ("Conv x kernel bz", {}, "the bias has a zero point"),
        ("Gemm a m bx", {}, "the bias is on another step than the product of scales"),
        ("Gemm a m bz", {}, "the bias has a zero point"),
        ("Gemm a m b", {"alpha": 0.5}, "alpha would scale the bias"),
        ("Gemm a m b", {"beta": 0.5}, "no operator has a beta"),
        ("Gemm a m31 b31", {}, "a bias per row"),
        ("Add x v", {"out": (0.11, np.uint16(7)), "opset": 21}, "a grid of 16 bits"),
        ("MatMul w16 w16", {"out": None, "opset": 21}, "grids of 16 bits"),
        ("Add x channels", {}, "an operand with a scale per channel"),
        ("Add channels channels", {}, "operands with a scale per channel"),
        ("Conv channels kernel", {}, "data with a scale per channel"),
        ("Add x v", {"out": ([0.11, 0.2], np.uint8([7, 7]))}, "a result with a scale per channel"),
        ("Conv x kernel b8", {}, "a bias of 8 bits"),
        ("Conv x kernel b3", {}, "a bias with fewer elements than there are channels"),
        ("Softmax x", {"out": TINY, "opset": 12}, "flattened its input then"),
        ("AveragePool x", {"kernel_shape": [2, 2], "dilations": [2, 2], "opset": 19}, "no operator dilates"),
    ],
)
def test_what_has_no_operator_stays_as_it_is(text: str, kwargs: dict[str, Any], why: str) -> None:
    out = kwargs.pop("out", OUT)
    model = qdq(text, out, **kwargs)
    before = graph_text(model)
    assert not apply(LowerToQoperators(), model, CTX).modified, why
    assert graph_text(model) == before


# -- neighbours -------------------------------------------------------------------------------------------------

CHAIN = """
<ir_version: 8, opset_import: ["" : 17]>
g (uint8[1,2,4,4] x) => (OUTPUTS)
<float s = {0.05}, uint8 z = {120}, float t = {0.1}, uint8 k = {100}> {
  [d1] d = DequantizeLinear (x, s, z)
  [sum] f = Add (d, d)
  [q1] q = QuantizeLinear (f, t, k)
  [d2] e = DequantizeLinear (q, t, k)
  BODY
}
"""
IMAGE = {"x": FEEDS["x"][:, :, :4, :4]}


def chain(body: str, outputs: str = "float[1,2,4,4] y") -> Model:
    return Model.from_proto(onnx.parser.parse_model(CHAIN.replace("BODY", body).replace("OUTPUTS", outputs)))


def lowered(body: str, outputs: str = "float[1,2,4,4] y") -> Model:
    """The chain with this end, lowered; it computes what the runtime makes of the chain."""
    model = chain(body, outputs)
    expected = run(model, IMAGE, optimize=True)
    apply(LowerToQoperators(), model, CTX)
    for left, right in zip(expected, run(model, IMAGE), strict=True):
        np.testing.assert_array_equal(left, right)
    return model


def test_a_float_reader_keeps_its_dequantizer() -> None:
    model = lowered("[n] y = Neg (e)")
    assert op_types(model) == ["QLinearAdd", "DequantizeLinear", "Neg"]


def test_a_dequantizer_that_is_a_graph_output_stays() -> None:
    model = lowered("[n] y = Neg (e)", "float[1,2,4,4] y, float[1,2,4,4] d")
    assert op_types(model) == ["DequantizeLinear", "QLinearAdd", "DequantizeLinear", "Neg"]


def test_integers_are_read_by_the_next_operator() -> None:
    model = lowered("[m] g = Mul (e, d) [q2] h = QuantizeLinear (g, t, k) [d3] y = DequantizeLinear (h, t, k)")
    assert op_types(model) == ["QLinearAdd", "QLinearMul", "DequantizeLinear"]
    assert named(model.graph[1].inputs) == ["q", "t", "k", "x", "s", "z", "t", "k"]


def test_moves_and_clips_of_integers_stay_between_operators() -> None:
    body = """[c] c = Clip (q, k) [p] p = MaxPool <kernel_shape = [1, 1]> (c) [d3] g = DequantizeLinear (p, t, k)
              [m] h = Mul (g, e) [q2] i = QuantizeLinear (h, s, z) [d4] y = DequantizeLinear (i, s, z)"""
    assert op_types(lowered(body)) == ["QLinearAdd", "Clip", "MaxPool", "QLinearMul", "DequantizeLinear"]


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("[n] y = Neg (f)", "float[1,2,4,4] y"),
        ("[n] y = Neg (e)", "float[1,2,4,4] y, float[1,2,4,4] f"),
        ("[q2] g = QuantizeLinear (f, s, z) [d3] y = DequantizeLinear (g, s, z)", "float[1,2,4,4] y"),
    ],
    ids=["read in float", "a graph output", "quantized twice"],
)
def test_a_result_that_others_want_in_float_keeps_its_operator(body: str, outputs: str) -> None:
    model = chain(body, outputs)
    assert not apply(LowerToQoperators(), model, CTX).modified


def test_a_product_that_is_quantized_for_some_and_read_in_float_by_others_is_left_alone() -> None:
    """An integer product that ends in float would be quantized once more."""
    body = """[p] p = MatMul (e, d) [q2] g = QuantizeLinear (p, s, z) [d3] h = DequantizeLinear (g, s, z)
              [n] y = Add (h, p)"""
    assert op_types(lowered(body)).count("MatMul") == 1


def test_a_product_in_front_of_an_activation_that_no_grid_absorbs_ends_in_float() -> None:
    """Which the runtime's own fusion leaves in float."""
    model = chain("[p] p = MatMul (e, d) [r] y = Relu (p)")
    (expected,) = run(model, IMAGE)
    apply(LowerToQoperators(), model, CTX)
    assert op_types(model) == ["QLinearAdd", "MatMulIntegerToFloat", "Relu"]
    np.testing.assert_allclose(run(model, IMAGE)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_result_read_inside_a_branch_keeps_its_operator() -> None:
    model = chain(
        """[b] b = Cast <to = 9> (z) [if] y = If (b) <
             then_branch = then () => (float[1,2,4,4] u) { u = Neg (f) },
             else_branch = other () => (float[1,2,4,4] v) { v = Abs (e) }>"""
    )
    assert not apply(LowerToQoperators(), model, CTX).modified


def test_operands_from_outside_of_a_branch_keep_the_operator_inside() -> None:
    model = lowered(
        """[b] b = Cast <to = 9> (z) [if] y = If (b) <
             then_branch = then () => (float[1,2,4,4] u) {
               g = Mul (e, e) h = QuantizeLinear (g, s, z) u = DequantizeLinear (h, s, z) },
             else_branch = other () => (float[1,2,4,4] v) { v = Abs (e) }>"""
    )
    assert op_types(model) == ["QLinearAdd", "DequantizeLinear", "Cast", "If"]


def test_an_op_of_another_domain_is_no_operator() -> None:
    model = chain("[n] y = Neg (e)")
    model.graph[1].domain = "my"
    before = graph_text(model)
    assert not LowerToQoperators().run(model, CTX).modified
    assert graph_text(model) == before


# -- parameters and tables --------------------------------------------------------------------------------------


def test_parameters_of_one_element_become_one_scalar_for_all() -> None:
    """onnxruntime refuses a QLinearAdd whose scale has a dimension, also one that it made itself."""
    model = qdq("Add x x", grids={"x": ([0.05], np.uint8([120]), None)})
    expected = run(model, FEEDS)
    apply(LowerToQoperators(), model, CTX)
    np.testing.assert_array_equal(run(model, FEEDS, optimize=True)[0], expected[0])
    assert model.graph[0].inputs[1:3] == model.graph[0].inputs[4:6]
    for value in model.graph[0].inputs[1:3]:
        assert value is not None
        assert value.shape == oir.Shape([])
        assert value.is_initializer()


def test_what_the_exporter_said_of_a_node_stays() -> None:
    model = qdq("Add x v")
    node = next(node for node in model.graph if node.name == "op")
    node.doc_string, node.metadata_props["layer"] = "a residual", "3"
    apply(LowerToQoperators(), model, CTX)
    assert (model.graph[0].doc_string, model.graph[0].metadata_props["layer"]) == ("a residual", "3")


@pytest.mark.parametrize("text", ["Add x v", "MatMul x v"])
def test_the_domain_of_the_operator_is_imported(text: str) -> None:
    model = qdq(text)
    apply(LowerToQoperators(), model, CTX)
    imported = {"": 17, "com.microsoft": 1} if "Add" in text else {"": 17}
    assert dict(model.ir.opset_imports) == imported


def test_what_is_behind_an_operator_onnx_does_not_know_keeps_its_type_and_shape() -> None:
    model = chain("[n] y = Neg (e)")
    for node in model.graph:
        if node.name != "n":
            node.outputs[0].shape = node.outputs[0].type = None
    apply(LowerToQoperators(), model, CTX)
    result = model.graph[0].outputs[0]
    assert (result.dtype, result.shape) == (oir.DataType.UINT8, oir.Shape([1, 2, 4, 4]))


def test_integers_take_over_the_grids_of_the_floats_that_go() -> None:
    model, params = chain("[m] g = Mul (e, e) [q2] y = QuantizeLinear (g, s, z)", "uint8[1,2,4,4] y"), []
    for name, step in (("d", 2.0), ("f", 0.25), ("e", 0.5), ("g", 1.0)):
        params.append(QuantParams.make(step, 0, INT8))
        model.scales.set(model.values()[name], params[-1])
    apply(LowerToQoperators(), model, CTX)
    assert {value.name: grid.scale for value, grid in model.scales.items()} == {"x": 2.0, "q": 0.25, "y": 1.0}


def test_parameters_nobody_reads_go() -> None:
    model = qdq("Conv x kernel b")
    apply(LowerToQoperators(), model, CTX)
    assert "b_s" not in model.graph.initializers
    assert not apply(Cleanup(), model, CTX).modified


# -- the option -------------------------------------------------------------------------------------------------


def test_the_other_format_leaves_everything() -> None:
    model = qdq("Conv x kernel b")
    before = graph_text(model)
    assert not apply(LowerToQoperators(Format.QDQ), model, CTX).modified
    assert graph_text(model) == before


def test_a_target_that_reads_q_dq_only_refuses() -> None:
    with pytest.raises(PipelineError, match=r"test does not read the format qoperator \(it reads qdq\)"):
        LowerToQoperators().run(qdq("Add x v"), Context(TARGET))
    assert not LowerToQoperators(Format.QDQ).run(qdq("Add x v"), Context(TARGET)).modified
