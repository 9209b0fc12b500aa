import numpy as np
import onnx
import pytest
from arrays import model_of
from support import parse

from qat2int8.ir import INT8, UINT8, Model, QuantParams, UnsupportedModel
from qat2int8.passes import Context
from qat2int8.passes.insert_quantize_dequantize import InsertQuantizeDequantize
from qat2int8.pipelines.certificate import INTEGER_KERNELS, Certificate, NodeRecord, certify
from qat2int8.pipelines.target_files import load_target

RNG = np.random.default_rng(3)
S8 = QuantParams.make(0.05, 0, INT8)
U8 = QuantParams.make(0.02, 0, UINT8)


def of(model: Model) -> Certificate:
    return certify(model, model.to_proto().SerializeToString())


def placed(text: str, shapes: dict[str, tuple[int, ...]], *grids: str) -> Model:
    model = model_of(
        text, {name: RNG.normal(0, 0.3, shape) for name, shape in shapes.items()}, dict.fromkeys(grids, S8)
    )
    InsertQuantizeDequantize().run(model, Context(load_target("ort-x86")))
    return model


CONV = """
g (float[1,4,8,8] x, float[4,4,3,3] w, float[4,4,3,3] v) => (float[1,4,4,4] y) {
  [one] c = Conv (x, w)
  [two] y = Conv (c, v)
}
"""


def test_integer_and_float_convolutions_are_told_apart() -> None:
    model = placed(CONV, {"w": (4, 4, 3, 3), "v": (4, 4, 3, 3)}, "x", "w", "c")
    certificate = of(model)
    assert [(record.node, record.op_type, record.integer) for record in certificate.compute] == [
        ("one", "Conv", True),
        ("two", "Conv", False),
    ]
    first, second = 36 * 4 * 4 * 9, 16 * 4 * 4 * 9
    assert [record.macs for record in certificate.compute] == [4 * first // 4, second]
    assert certificate.integer_macs_percent == pytest.approx(100 * first / (first + second))
    assert certificate.float_compute == (NodeRecord("two", "Conv", second, False),)
    assert (certificate.integer_nodes, certificate.float_nodes) == (1, 1)
    assert certificate.integer_nodes_percent == 50.0
    assert certificate.runtime.startswith("onnxruntime ")


def test_a_convolution_in_the_layout_the_runtime_prefers_is_recognised() -> None:
    """The runtime replaces the node and writes another tensor, between two Transposes."""
    model = placed(CONV, {"w": (4, 4, 3, 3), "v": (4, 4, 3, 3)}, "x", "w", "c", "v", "y")
    certificate = of(model)
    assert certificate.executed["QLinearConv"] == 2
    assert certificate.integer_macs_percent == 100.0
    assert certificate.float_nodes == 0


def test_a_convolution_fused_with_its_activation_in_float_is_float() -> None:
    model = model_of(
        "g (float[1,4,8,8] x, float[4,4,3,3] w) => (float[1,4,6,6] y) { [conv] c = Conv (x, w) y = Relu (c) }",
        {"w": RNG.normal(0, 1, (4, 4, 3, 3))},
    )
    certificate = of(model)
    assert certificate.integer_macs_percent == 0.0
    assert certificate.integer_nodes == 0


def test_a_leftover_quantizer_does_not_make_its_neighbours_integer() -> None:
    model = parse(
        """g (float[1,4,8,8] x, float[4,4,3,3] w) => (float[1,4,6,6] y) <float s = {0.05}, uint8 z = {0}> {
          q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z)
          [conv] c = Conv (d, w)
          r = QuantizeLinear (c, s, z) y = DequantizeLinear (r, s, z)
        }"""
    )
    certificate = of(model)
    assert [record.integer for record in certificate.compute] == [False]
    assert certificate.integer_nodes == 0


GEMM = (
    "g (float[2,6] x, float[6,4] w, float[4] b) => (float[2,4] z) { [fc] y = Gemm (x, w, b) [last] z = Neg (y) }"
)


def test_a_gemm_that_ends_in_float_is_an_integer_kernel_and_what_follows_is_not() -> None:
    certificate = of(placed(GEMM, {"w": (6, 4), "b": (4,)}, "x", "w"))
    assert certificate.executed["QGemm"] == 1
    assert [(record.macs, record.integer) for record in certificate.compute] == [(2 * 4 * 6, True)]
    assert (certificate.integer_nodes, certificate.float_nodes) == (1, 1)


def test_matmul_integer_to_float_is_an_integer_kernel() -> None:
    model = placed(
        "g (float[2,6] x, float[6,4] w) => (float[2,4] z) { [mm] y = MatMul (x, w) z = Neg (y) }",
        {"w": (6, 4)},
        "x",
        "w",
    )
    certificate = of(model)
    assert "MatMulIntegerToFloat" in certificate.executed
    assert certificate.integer_macs_percent == 100.0
    assert (certificate.integer_nodes, certificate.float_nodes) == (1, 1)


def test_dynamically_quantized_matmul_is_an_integer_kernel() -> None:
    model = model_of(
        """
        g (float[2,6] x, int8[6,4] w, int8 z, float t) => (float[2,4] y) {
          q, s, zero = DynamicQuantizeLinear (x)
          i = MatMulInteger (q, w, zero, z)
          f = Cast <to = 1> (i)
          m = Mul (s, t)
          y = Mul (f, m)
        }
        """,
        {"w": np.ones((6, 4)), "z": 0, "t": 0.1},
    )
    certificate = of(model)
    assert certificate.executed == {"DynamicQuantizeMatMul": 1}
    assert (certificate.integer_nodes, certificate.float_nodes) == (1, 0)


def test_what_reads_accumulators_is_float() -> None:
    model = model_of(
        """
        g (uint8[2,6] x, int8[6,4] w) => (float[2,4] y) {
          i = MatMulInteger (x, w)
          f = Cast <to = 1> (i)
          y = Neg (f)
        }
        """,
        {"w": np.ones((6, 4))},
    )
    certificate = of(model)
    assert (certificate.integer_nodes, certificate.float_nodes) == (1, 1)


def test_data_movement_counts_by_what_it_moves() -> None:
    integer = of(parse("g (uint8[1,2,4,4] x) => (uint8[1,2,2,2] y) { y = MaxPool <kernel_shape = [3,3]> (x) }"))
    assert (integer.integer_nodes, integer.float_nodes) == (1, 0)
    floating = of(parse("g (float[1,2,4,4] x) => (float[1,2,2,2] y) { y = MaxPool <kernel_shape = [3,3]> (x) }"))
    assert (floating.integer_nodes, floating.float_nodes) == (0, 1)


@pytest.mark.parametrize(
    ("text", "macs"),
    [
        ("g (float[1,4,8,8] x, float[6,4,3,3] w) => (float[1,6,6,6] y) { y = Conv (x, w) }", 6 * 36 * 4 * 9),
        (
            "g (float[1,4,8,8] x, float[8,1,3,3] w) => (float[1,8,6,6] y) { y = Conv <group = 4> (x, w) }",
            8 * 36 * 9,
        ),
        (
            "g (float[1,4,9,9] x, float[6,2,3,3] w) => (float[1,6,4,4] y) "
            "{ y = Conv <group = 2, strides = [2,2]> (x, w) }",
            6 * 16 * 2 * 9,
        ),
        ("g (float[1,4,9] x, float[6,4,3] w) => (float[1,6,7] y) { y = Conv (x, w) }", 6 * 7 * 4 * 3),
        (
            "g (float[1,4,8,8] x, float[4,3,2,2] w) => (float[1,6,16,16] y) "
            "{ y = ConvTranspose <group = 2, strides = [2,2]> (x, w) }",
            4 * 64 * 3 * 4,
        ),
        ("g (float[3,5] x, float[5,7] w) => (float[3,7] y) { y = Gemm (x, w) }", 3 * 5 * 7),
        ("g (float[3,5] x, float[7,5] w) => (float[3,7] y) { y = Gemm <transB = 1> (x, w) }", 3 * 5 * 7),
        ("g (float[5,3] x, float[5,7] w) => (float[3,7] y) { y = Gemm <transA = 1> (x, w) }", 3 * 5 * 7),
        ("g (float[2,4,3,5] x, float[4,5,7] w) => (float[2,4,3,7] y) { y = MatMul (x, w) }", 2 * 4 * 3 * 5 * 7),
        ("g (float[5] x, float[5,7] w) => (float[7] y) { y = MatMul (x, w) }", 5 * 7),
        ("g (float[3,5] x, float[5] w) => (float[3] y) { y = MatMul (x, w) }", 3 * 5),
        ("g (float[N,5] x, float[5,7] w) => (float[N,7] y) { y = MatMul (x, w) }", 5 * 7),
        ("g (float[N,4,8,8] x, float[6,4,3,3] w) => (float[N,6,6,6] y) { y = Conv (x, w) }", 6 * 36 * 4 * 9),
        ("g (float[4] x) => (float[4] y) { y = Neg (x) }", 0),
    ],
)
def test_multiply_accumulates(text: str, macs: int) -> None:
    certificate = of(parse(text))
    assert certificate.macs == macs
    assert certificate.integer_macs_percent == (0.0 if macs else 100.0)


OPERATORS = """
<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
g (uint8[1,4,5,5] x, uint8[3,6] a) => (uint8[1,6,3,3] c, uint8[3,7] p, float[3,7] f, float[3,7] g)
<float s = {0.05}, uint8 z = {3}, int8 w = {0}> {
  [conv] c = QLinearConv (x, s, z, kernel, s, w, s, z)
  [product] p = QLinearMatMul (a, s, z, matrix, s, w, s, z)
  [to_float] f = com.microsoft.MatMulIntegerToFloat (a, matrix, s, s, z, w)
  [gemm] g = com.microsoft.QGemm <transB = 1> (a, s, z, turned, s, w)
}
"""


def test_operators_on_integers_multiply_and_accumulate_too() -> None:
    proto = onnx.parser.parse_model(OPERATORS)
    for name, shape in (("kernel", (6, 4, 3, 3)), ("matrix", (6, 7)), ("turned", (7, 6))):
        levels = RNG.integers(-128, 128, shape).astype(np.int8)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(levels, name))
    certificate = of(Model.from_proto(proto))
    assert [(record.node, record.op_type, record.macs) for record in certificate.compute] == [
        ("conv", "QLinearConv", 6 * 9 * 4 * 9),
        ("product", "QLinearMatMul", 3 * 6 * 7),
        ("to_float", "MatMulIntegerToFloat", 3 * 6 * 7),
        ("gemm", "QGemm", 3 * 6 * 7),
    ]
    assert certificate.float_compute == ()
    assert (certificate.integer_nodes, certificate.float_nodes) == (4, 0)


def test_the_bodies_of_control_flow_count() -> None:
    model = model_of(
        """
        g (float[2,6] x, float[6,4] w, bool k) => (float[2,4] z) {
          z = If (k) <
            then_branch = a () => (float[2,4] p) { [inner] p = MatMul (x, w) },
            else_branch = b () => (float[2,4] q) { [other] q = MatMul (x, w) }
          >
        }
        """,
        {"w": np.ones((6, 4))},
    )
    certificate = of(model)
    assert sorted((record.node, record.macs) for record in certificate.compute) == [("inner", 48), ("other", 48)]
    assert certificate.executed["MatMul"] == 2


def test_integer_kernels_in_the_bodies_of_control_flow_are_seen() -> None:
    model = parse(
        """
        g (uint8[2,6] x, int8[6,4] w, bool k) => (float[2,4] z)
        <float s = {0.05}, uint8 u = {0}, float t = {0.1}, int8 v = {0}> {
          z = If (k) <
            then_branch = a () => (float[2,4] p) {
              d = DequantizeLinear (x, s, u) e = DequantizeLinear (w, t, v) [inner] p = MatMul (d, e) },
            else_branch = b () => (float[2,4] q) {
              f = DequantizeLinear (x, s, u) h = DequantizeLinear (w, t, v) [other] q = MatMul (f, h) }
          >
        }
        """
    )
    certificate = of(model)
    assert [record.integer for record in certificate.compute] == [True, True]


def test_a_model_the_runtime_refuses() -> None:
    proto = parse("g (float[4] x) => (float[4] y) { y = Neg (x) }").to_proto()
    proto.opset_import[0].version = 1000
    with pytest.raises(UnsupportedModel, match="onnxruntime cannot load the model"):
        certify(Model.from_proto(proto), proto.SerializeToString())


def test_it_is_ready_for_json() -> None:
    import json

    certificate = of(placed(GEMM, {"w": (6, 4), "b": (4,)}, "x", "w"))
    document = json.loads(json.dumps(certificate.as_dict()))
    assert document["compute"] == [{"node": "fc", "op_type": "Gemm", "macs": 48, "integer": True}]
    assert document["integer_macs_percent"] == 100.0


def test_a_file_with_the_weights_beside_it(tmp_path: object) -> None:
    from pathlib import Path

    model = placed(GEMM, {"w": (6, 4), "b": (4,)}, "x", "w")
    path = Path(str(tmp_path)) / "model.onnx"
    onnx.save_model(model.to_proto(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert certify(model, path).integer_macs_percent == 100.0


def test_no_float_kernel_is_among_the_integer_ones() -> None:
    assert all(name.startswith(("Q", "MatMulInteger", "ConvInteger", "Dynamic")) for name in INTEGER_KERNELS)


def test_for_a_runtime_that_is_not_at_hand_the_placement_is_read() -> None:
    text = CONV.replace("[two] y = Conv (c, v)", "[relu] r = Relu (c)\n  [two] y = Conv (r, v)")
    arrays = {"w": RNG.normal(0, 0.3, (4, 4, 3, 3)), "v": RNG.normal(0, 0.3, (4, 4, 3, 3))}
    for grids, integer in ((("x", "w", "r", "v"), [True, True]), (("x", "w", "v"), [True, False])):
        model = model_of(text, arrays, dict.fromkeys(grids, S8))
        target = load_target("tensorrt")
        InsertQuantizeDequantize().run(model, Context(target))
        certificate = certify(model, b"is not looked at", target)
        assert [record.integer for record in certificate.compute] == integer
        assert (certificate.basis, certificate.runtime) == ("placement", "tensorrt")
        assert certificate.integer_nodes == sum(integer)
        assert certificate.executed["Relu"] == 1
        assert certificate.kernel_of(next(model.nodes("Relu"))) is None
        document = certificate.as_dict()
        assert (document["basis"], document["broken_rules"]) == ("placement", [])


def test_an_add_counts_as_integer_where_its_residual_input_is_quantized() -> None:
    text = """
    g (float[1,4,8,8] x, float[4,4,3,3] w) => (float[1,4,8,8] y) {
      [one] c = Conv <pads = [1,1,1,1]> (x, w)
      [add] y = Add (c, x)
    }
    """
    for grids, integer in ((("x", "w"), 2), (("x",), 0)):
        model = model_of(text, {"w": RNG.normal(0, 0.3, (4, 4, 3, 3))}, dict.fromkeys(grids, S8))
        target = load_target("openvino")
        InsertQuantizeDequantize().run(model, Context(target))
        assert certify(model, b"", target).integer_nodes == integer


def test_what_breaks_the_rules_of_tensorrt_is_in_its_certificate_only() -> None:
    model = placed(CONV, {"w": (4, 4, 3, 3), "v": (4, 4, 3, 3)}, "x", "w", "c", "v")
    assert certify(model, b"", load_target("tensorrt")).broken_rules
    assert not certify(model, b"", load_target("openvino")).broken_rules
