"""The second of two activations that are multiplied gets a sign, and every number stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from support import TARGET, apply, check_pass, parse, run

import qat2int8
from qat2int8.ir import Contract, Model, OpRule
from qat2int8.passes import Context
from qat2int8.passes.sign_matmul_operands import SignMatmulOperands
from qat2int8.pipelines.benchmarking import bert

CTX = Context(
    replace(
        TARGET,
        ops={
            "MatMul": OpRule(Contract.COMPUTE, float_output=True, weight_axis=1, data_inputs=(0, 1)),
            "Reshape": OpRule(Contract.MOVEMENT),
            "Relu": OpRule(Contract.ELEMENTWISE),
        },
    )
)
GRID = "float s = {0.5}, uint8 z = {100}, float r = {0.25}, uint8 o = {3}, int64[3] shape = {2, 4, 3}"
RNG = np.random.default_rng(8)


def product(second: str, *, rows: int = 64, grids: str = GRID, extra: str = "", tail: str = "") -> str:
    return (
        f"g (float[2, {rows}, 3] a, float[2, 4, 3] b) => (float[2, {rows}, 4] y{extra}) <{grids}>"
        f" {{ aq = QuantizeLinear (a, s, z) ad = DequantizeLinear (aq, s, z) {second}"
        f" [mm] y = MatMul (ad, bd) {tail} }}"
    )


DIRECT = "bq = QuantizeLinear (b, r, o) t = Transpose <perm = [0, 2, 1]> (bq) bd = DequantizeLinear (t, r, o)"
BEHIND_A_KERNEL = (
    "b0 = QuantizeLinear (b, s, z) b1 = DequantizeLinear (b0, s, z) c = Relu (b1)"
    " bq = QuantizeLinear (c, r, o) m = Reshape (bq, shape)"
    " t = Transpose <perm = [0, 2, 1]> (m) bd = DequantizeLinear (t, r, o)"
)
LATE = "f = Transpose <perm = [0, 2, 1]> (b) bq = QuantizeLinear (f, r, o) bd = DequantizeLinear (bq, r, o)"
FEEDS = {
    "a": RNG.normal(0, 30, (2, 64, 3)).astype(np.float32),
    "b": RNG.normal(0, 30, (2, 4, 3)).astype(np.float32),
}


def test_a_quantize_of_a_float_becomes_signed_itself() -> None:
    signed = DIRECT.replace("(b, r, o)", "(b, r, zero_point)").replace("(t, r, o)", "(t, r, zero_point)")
    check_pass(
        SignMatmulOperands(),
        product(DIRECT, rows=5),
        product(signed, rows=5, grids=f"{GRID}, int8 zero_point = {{-125}}"),
        ctx=CTX,
    )


def test_the_integers_of_a_kernel_are_quantized_again_in_front_of_the_transpose() -> None:
    again = (
        "[m_unsigned] m_float = DequantizeLinear (m, r, o)"
        " [m_signing] m_signed = QuantizeLinear (m_float, r, zero_point)"
        " t = Transpose <perm = [0, 2, 1]> (m_signed) bd = DequantizeLinear (t, r, zero_point)"
    )
    check_pass(
        SignMatmulOperands(),
        product(BEHIND_A_KERNEL),
        product(
            BEHIND_A_KERNEL[: BEHIND_A_KERNEL.index("t =")] + again, grids=f"{GRID}, int8 zero_point = {{-125}}"
        ),
        ctx=CTX,
    )


def test_the_quantize_behind_a_kernel_keeps_the_type_of_the_kernel() -> None:
    second = BEHIND_A_KERNEL.replace("m = Reshape (bq, shape)", "").replace("(m)", "(bq)")
    model = parse(product(second))
    assert apply(SignMatmulOperands(), model, CTX).modified
    quantize = next(node for node in model.graph if node.outputs[0].name == "bq")
    assert [value.name for value in quantize.inputs if value is not None] == ["c", "r", "o"]


def test_enough_rows_pay_for_two_passes() -> None:
    model = Model.from_proto(onnx.shape_inference.infer_shapes(parse(product(BEHIND_A_KERNEL)).to_proto()))
    assert apply(SignMatmulOperands(), model.clone(), CTX).modified
    assert not apply(SignMatmulOperands(rows=65), model.clone(), CTX).modified


@pytest.mark.parametrize("second", [DIRECT, BEHIND_A_KERNEL])
@pytest.mark.parametrize("zero", [0, 100, 128, 255])
def test_no_number_moves(second: str, zero: int) -> None:
    model = parse(product(second, grids=GRID.replace("uint8 o = {3}", f"uint8 o = {{{zero}}}")))
    expected = run(model, FEEDS)[0]
    assert apply(SignMatmulOperands(), model, CTX).counts["signed"] == 1
    np.testing.assert_array_equal(run(model, FEEDS)[0], expected)


def test_a_reshape_behind_the_transpose_stays_in_the_way() -> None:
    second = DIRECT.replace("bd =", "u = Reshape (t, back) bd =").replace("(t, r, o)", "(u, r, o)")
    model = parse(product(second, grids=f"{GRID}, int64[3] back = {{2, 3, 4}}"))
    expected = run(model, FEEDS)[0]
    assert apply(SignMatmulOperands(), model, CTX).modified
    np.testing.assert_array_equal(run(model, FEEDS)[0], expected)


@pytest.mark.parametrize(
    ("second", "rows", "extra", "tail"),
    [
        (BEHIND_A_KERNEL, 63, "", ""),
        (DIRECT.replace("(t, r, o)", "(t, r, s8)").replace("(b, r, o)", "(b, r, s8)"), 64, "", ""),
        (LATE, 64, "", ""),
        ("bd = Transpose <perm = [0, 2, 1]> (b)", 64, "", ""),
        (DIRECT, 64, ", float[2, 3, 4] bd", ""),
        (DIRECT, 64, ", uint8[2, 3, 4] t", ""),
        (DIRECT, 64, ", float[2, 3, 4] w", "w = DequantizeLinear (t, r, o)"),
        (DIRECT, 64, ", float[2, 3, 4] w", "w = Abs (bd)"),
    ],
    ids=["few rows", "signed", "no transpose", "float", "output", "integer output", "two readers", "other reader"],
)
def test_other_products_stay(second: str, rows: int, extra: str, tail: str) -> None:
    text = product(second, rows=rows, grids=f"{GRID}, int8 s8 = {{3}}", extra=extra, tail=tail)
    model = Model.from_proto(onnx.shape_inference.infer_shapes(parse(text).to_proto()))
    assert not apply(SignMatmulOperands(), model, CTX).modified


def test_an_operand_read_elsewhere_too_keeps_its_type_there() -> None:
    model = parse(product(DIRECT, extra=", float[2, 4, 3] w", tail="w = DequantizeLinear (bq, r, o)"))
    expected = run(model, FEEDS)
    assert apply(SignMatmulOperands(), model, CTX).modified
    for before, after in zip(expected, run(model, FEEDS), strict=True):
        np.testing.assert_array_equal(after, before)


def test_the_first_operand_has_to_be_on_integers() -> None:
    model = parse(product(DIRECT).replace("MatMul (ad", "MatMul (a"))
    assert not apply(SignMatmulOperands(), model, CTX).modified


def test_the_runtime_multiplies_by_signed_bytes(tmp_path: Path) -> None:
    size = replace(bert.SMALL, layers=1, hidden=64, sequence=64)
    source = bert.bert(size, products=True)
    conversion = qat2int8.convert(source)
    assert conversion.certificate.integer_macs_percent == 100
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "executed.onnx")
    options.log_severity_level = 3
    proto = conversion.model.to_proto()
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    zero_points = {
        node.op_type: types[node.input[5]]
        for node in graph.node
        if node.op_type in ("QLinearMatMul", "MatMulIntegerToFloat")
    }
    assert zero_points == dict.fromkeys(("QLinearMatMul", "MatMulIntegerToFloat"), onnx.TensorProto.INT8)
    feeds = {bert.TOKENS: bert.tokens(1, size, seed=5)}
    expected = run(source, feeds)[0]
    np.testing.assert_allclose(run(Model.from_proto(proto), feeds, optimize=True)[0], expected, atol=0.1)
