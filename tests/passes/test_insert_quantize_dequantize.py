from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx_ir as oir
import pytest
from arrays import model_of
from support import apply, named, parse, run

from qat2int8.ir import (
    INT8,
    UINT8,
    Code,
    Diagnostic,
    Model,
    PassFailed,
    Provenance,
    QuantDType,
    QuantParams,
    Severity,
)
from qat2int8.passes import Context, PassResult
from qat2int8.passes.insert_quantize_dequantize import InsertQuantizeDequantize, OnMissingScale
from qat2int8.pipelines.certificate import certify
from qat2int8.pipelines.target_files import load_target

CONTEXT = Context(load_target("ort-x86"))

U8 = QuantParams.make(0.02, 0, UINT8, origin="fake quant")
S8 = QuantParams.make(0.05, 0, INT8, origin="fake quant")
W = QuantParams.make(0.01, 0, INT8, origin="fake quant")


class Numbers:
    rng = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order() -> None:
    Numbers.rng = np.random.default_rng(7)


def normal(*shape: int) -> npt.NDArray[np.float32]:
    return Numbers.rng.normal(0, 0.3, shape).astype(np.float32)


def columns(count: int, axis: int) -> QuantParams:
    return QuantParams.make(np.linspace(0.005, 0.02, count, dtype=np.float32), 0, INT8, axis=axis)


def derived(params: QuantParams) -> QuantParams:
    return params.with_(source=Provenance.DERIVED)


def place(model: Model, pass_: InsertQuantizeDequantize | None = None) -> PassResult:
    return apply(pass_ or InsertQuantizeDequantize(), model, CONTEXT)


def executed(model: Model) -> dict[str, int]:
    return certify(model, model.to_proto().SerializeToString()).executed


def ops(model: Model) -> list[str]:
    return [node.op_type for node in model.graph]


def integers(model: Model, name: str) -> npt.NDArray[np.generic]:
    array = model.constant(model.values()[name])
    assert array is not None
    return array


def only(result: PassResult, code: Code) -> Diagnostic:
    found = [finding for finding in result.diagnostics if finding.code is code]
    assert len(found) == 1, [str(finding) for finding in result.diagnostics]
    return found[0]


CONV = """
g (float[1,3,8,8] x, float[4,3,3,3] w, float[4] b) => (float[1,4,8,8] y) {
  [conv] c = Conv <pads = [1,1,1,1]> (x, w, b)
  [act] y = Relu (c)
}
"""


def conv(**scales: QuantParams) -> Model:
    grids = {"x": S8, "w": columns(4, 0), "y": U8} | scales
    return model_of(CONV, {"w": normal(4, 3, 3, 3), "b": normal(4)}, grids)


def test_a_conv_gets_its_contract_and_runs_as_qlinearconv() -> None:
    model = conv()
    before = model.clone()
    result = place(model)
    assert dict(result.counts) == {"Conv": 1}
    assert not result.diagnostics
    assert ops(model) == [
        "QuantizeLinear",
        "DequantizeLinear",
        "DequantizeLinear",
        "DequantizeLinear",
        "Conv",
        "Relu",
        "QuantizeLinear",
        "DequantizeLinear",
    ]
    for node, reads, writes in (
        (model.graph[0], ["x", "x_scale", "zero_point_2"], "x_quantized"),
        (model.graph[1], ["x_quantized", "x_scale", "zero_point_2"], "x_dequantized"),
        (model.graph[4], ["x_dequantized", "w_dequantized", "b_dequantized"], "c"),
        (model.graph[6], ["y_float", "y_scale", "zero_point_3"], "y_quantized"),
        (model.graph[7], ["y_quantized", "y_scale", "zero_point_3"], "y"),
    ):
        assert named([value for value in node.inputs if value is not None]) == reads
        assert node.outputs[0].name == writes
    assert executed(model).keys() >= {"QLinearConv"}
    assert not executed(model).keys() & {"Conv", "FusedConv"}
    assert_follows(model, before)


def assert_follows(model: Model, reference: Model, *, steps: float = 1.0) -> None:
    """The placed model computes, to ``steps`` of its output grid, what fake quantization of the reference does."""
    feeds = {value.name or "": normal(*map(int, value.shape or ())) for value in reference.graph.inputs}
    truth = run(model, feeds)
    fast = run(model, feeds, optimize=True)
    grids = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    step = float(np.max(integers(model, grids[-1].inputs[1].name or "")))  # type: ignore[union-attr]
    for left, right in zip(truth, fast, strict=True):
        assert np.abs(left - right).max() <= steps * step * 1.001
    for left, right in zip(run(reference, feeds), truth, strict=True):
        assert np.abs(left - right).max() < 0.35, "quantized and float models are strangers"


def test_trained_integers_are_the_integers_in_the_output() -> None:
    model = conv()
    weight, steps = integers(model, "w"), columns(4, 0).scale
    place(model)
    written = integers(model, "w_quantized")
    assert written.dtype == np.int8
    levels = np.rint(weight / steps.reshape(-1, 1, 1, 1))  # type: ignore[operator]
    np.testing.assert_array_equal(written, levels.clip(-128, 127))
    np.testing.assert_array_equal(integers(model, "w_scale"), steps)
    dequantize = model.values()["w_dequantized"].producer()
    assert dequantize is not None
    assert dequantize.attributes.get_int("axis") == 0


def test_a_narrow_weight_grid_keeps_its_saturation() -> None:
    model = conv(w=QuantParams.make(0.05, 0, QuantDType(4, signed=True)))
    place(model)
    written = integers(model, "w_quantized")
    assert (written.min(), written.max()) == (-8, 7)


def test_uint8_weights_around_128_become_int8_around_zero() -> None:
    model = conv(w=QuantParams.make(0.01, 128, UINT8))
    weight = integers(model, "w")
    place(model)
    np.testing.assert_array_equal(
        integers(model, "w_quantized"),
        np.clip(np.rint(weight / np.float32(0.01)), -128, 127),  # type: ignore[operator]
    )


def test_a_weight_off_centre_keeps_its_integers_in_the_channels_that_fit() -> None:
    weight = (np.arange(256, dtype=np.float32).reshape(4, -1, 1, 1) - 100) * np.float32(0.01)
    model = model_of(
        "g (float[1,64,8,8] x, float[4,64,1,1] w) => (float[1,4,8,8] y) { [conv] y = Conv (x, w) }",
        {"w": weight},
        {"x": S8, "w": QuantParams.make(0.01, 100, UINT8), "y": S8},
    )
    result = place(model)
    finding = only(result, Code.WEIGHT_REQUANTIZED)
    assert (finding.node, finding.value) == ("conv", "w")
    assert "1 of 4 steps" in finding.reason
    steps = integers(model, "w_scale")
    np.testing.assert_array_equal(steps[:3], np.float32([0.01] * 3))
    assert steps[3] == pytest.approx(0.01 * 155 / 127)
    written = integers(model, "w_quantized").astype(int).reshape(4, -1)
    np.testing.assert_array_equal(written[:3].reshape(-1), np.arange(192) - 100)
    np.testing.assert_array_equal(written[3], np.rint((np.arange(192, 256) - 100) * 127 / 155))
    assert "QLinearConv" in executed(model)


def test_a_zero_point_off_centre_is_no_matter_where_the_levels_that_occur_fit() -> None:
    model = conv(w=QuantParams.make(0.05, 100, UINT8))
    weight = integers(model, "w")
    assert not place(model).diagnostics
    np.testing.assert_array_equal(integers(model, "w_quantized"), np.rint(weight / np.float32(0.05)))  # type: ignore[operator]
    assert integers(model, "w_scale") == np.float32(0.05)


def test_a_matrix_per_tensor_only_gets_one_wider_step() -> None:
    model = model_of(
        "g (float[2,5,6] x, float[2,6,4] w) => (float[2,5,4] y) { [mm] y = MatMul (x, w) }",
        {"w": np.linspace(-0.5, 2.05, 48).reshape(2, 6, 4)},
        {"x": S8, "w": QuantParams.make(0.01, 50, UINT8), "y": S8},
    )
    only(place(model), Code.WEIGHT_REQUANTIZED)
    assert integers(model, "w_scale") == pytest.approx(0.01 * 205 / 127)
    assert integers(model, "w_quantized").max() == 127


def test_the_bias_is_int32_on_the_product_of_the_steps() -> None:
    model = conv()
    bias = integers(model, "b")
    place(model)
    step = np.float32(0.05) * columns(4, 0).scale
    written = integers(model, "b_quantized")
    assert written.dtype == np.int32
    np.testing.assert_array_equal(written, np.rint(bias / step))  # type: ignore[operator]
    np.testing.assert_array_equal(integers(model, "b_scale"), step)


def test_a_scalar_step_gives_a_scalar_bias_step() -> None:
    model = conv(w=W)
    place(model)
    assert integers(model, "b_scale").shape == ()
    assert "QLinearConv" in executed(model)


def test_a_bias_too_large_widens_the_step_of_its_channel_only() -> None:
    weight = np.rint(normal(4, 3, 3, 3) * 200) * np.float32(1e-6)
    grids = {"x": QuantParams.make(1e-5, 0, INT8), "w": QuantParams.make(1e-6, 0, INT8), "y": U8}
    model = model_of(CONV, {"w": weight, "b": [0.001, 2.0, -0.001, 0.0]}, grids)
    finding = only(place(model), Code.BIAS_OVERFLOW)
    assert (finding.node, finding.value) == ("conv", "b")
    assert "1 channels" in finding.reason
    steps = integers(model, "w_scale")
    assert steps.shape == (4,)
    np.testing.assert_array_equal(steps[[0, 2, 3]], np.float32([1e-6] * 3))
    assert steps[1] > 1e-6
    written = integers(model, "w_quantized")
    np.testing.assert_array_equal(
        written[[0, 2, 3]], np.clip(np.rint(weight / np.float32(1e-6)), -128, 127)[[0, 2, 3]]
    )
    assert abs(int(integers(model, "b_quantized")[1])) <= 1 << 30
    outputs = run(model, {"x": normal(1, 3, 8, 8)}, optimize=True)[0]
    np.testing.assert_allclose(outputs[0, 1], 2.0, atol=0.02)
    assert "QLinearConv" in executed(model)


def test_steps_whose_product_vanishes_are_widened() -> None:
    grids = {"x": QuantParams.make(1e-30, 0, INT8), "w": QuantParams.make(1e-30, 0, INT8), "y": U8}
    model = model_of(CONV, {"w": normal(4, 3, 3, 3), "b": np.zeros(4)}, grids)
    place(model)
    assert np.all(integers(model, "b_scale") > 0)  # type: ignore[operator]


GEMM = """
g (float[2,6] x, float[{shape}] w, float[4] b) => (float[2,4] y) {{
  [fc] y = Gemm <transB = {transposed}> (x, w, b)
}}
"""


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemm_head_ends_in_float_with_an_int32_bias(transposed: int) -> None:
    shape = (4, 6) if transposed else (6, 4)
    text = GEMM.format(shape=",".join(map(str, shape)), transposed=transposed)
    model = model_of(
        text, {"w": normal(*shape), "b": normal(4)}, {"x": S8, "w": columns(4, 0 if transposed else 1)}
    )
    before = model.clone()
    assert not place(model).diagnostics
    assert ops(model) == ["QuantizeLinear", *["DequantizeLinear"] * 3, "Gemm"]
    assert model.graph.outputs[0].producer() is model.graph[-1]
    assert integers(model, "b_quantized").dtype == np.int32
    record = certify(model, model.to_proto().SerializeToString())
    assert record.executed.keys() >= {"QGemm"}
    assert record.integer_macs_percent == 100.0
    feeds = {"x": normal(2, 6)}
    np.testing.assert_allclose(run(model, feeds, optimize=True)[0], run(model, feeds)[0], atol=1e-4)
    np.testing.assert_allclose(run(model, feeds)[0], run(before, feeds)[0], atol=0.1)


def test_a_gemm_in_the_middle_ends_in_float_where_nothing_trained_its_output() -> None:
    model = model_of(
        """
        g (float[2,6] x, float[6,4] w) => (float[2,4] y) { [fc] t = Gemm (x, w) [act] y = Sigmoid (t) }
        """,
        {"w": normal(6, 4)},
        {"x": S8, "w": W, "t": derived(S8)},
    )
    place(model)
    assert ops(model) == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "Gemm", "Sigmoid"]


@pytest.mark.parametrize("bias", [np.float32(0.5), np.full((1,), 0.5), np.full((1, 1), 0.5), normal(1, 4)])
def test_a_gemm_bias_that_broadcasts_is_written_per_channel(bias: npt.NDArray[np.float32]) -> None:
    dims = ",".join(map(str, bias.shape))
    model = model_of(
        f"g (float[2,6] x, float[6,4] w, float[{dims}] b) => (float[2,4] y) {{ [fc] y = Gemm (x, w, b) }}"
        if dims
        else "g (float[2,6] x, float[6,4] w, float b) => (float[2,4] y) { [fc] y = Gemm (x, w, b) }",
        {"w": normal(6, 4), "b": bias},
        {"x": S8, "w": W},
    )
    place(model)
    assert integers(model, "b_quantized").shape == (4,)
    assert "QGemm" in executed(model)


@pytest.mark.parametrize("batch", ["", "3,"])
def test_a_matmul_with_a_constant_matrix(batch: str) -> None:
    model = model_of(
        f"g (float[{batch}5,6] x, float[6,4] w) => (float[{batch}5,4] y) {{ [mm] y = MatMul (x, w) }}",
        {"w": normal(6, 4)},
        {"x": S8, "w": columns(4, 1), "y": S8},
    )
    before = model.clone()
    assert not place(model).diagnostics
    assert "QLinearMatMul" in executed(model)
    assert_follows(model, before)


def test_a_matmul_of_two_activations() -> None:
    model = model_of(
        "g (float[2,5,6] a, float[2,6,4] b) => (float[2,5,4] y) { [mm] y = MatMul (a, b) }",
        scales={"a": S8, "b": S8, "y": S8},
    )
    before = model.clone()
    place(model)
    assert "QLinearMatMul" in executed(model)
    assert_follows(model, before)


@pytest.mark.parametrize(("shape", "axis"), [((6,), 0), ((2, 6, 4), 2)])
def test_only_a_matrix_has_a_step_per_column(shape: tuple[int, ...], axis: int) -> None:
    dims, result = ",".join(map(str, shape)), "2,5" if len(shape) == 1 else "2,5,4"
    text = f"g (float[2,5,6] x, float[{dims}] w) => (float[{result}] y) {{ [mm] y = MatMul (x, w) }}"
    weights = {"w": normal(*shape)}
    model = model_of(text, weights, {"x": S8, "w": columns(shape[axis], axis), "y": S8})
    finding = only(place(model), Code.KEPT_FLOAT)
    assert finding.value == "w"
    model = model_of(text, weights, {"x": S8, "w": W, "y": S8})
    before = model.clone()
    place(model)
    assert "QLinearMatMul" in executed(model)
    assert_follows(model, before)


RESIDUAL = """
g (float[1,3,8,8] x, float[3,3,1,1] w) => (float[1,3,8,8] y) {
  [conv] c = Conv (x, w)
  [add] s = Add (c, x)
  [act] y = Relu (s)
}
"""


def test_a_residual_add_with_relu_runs_as_qlinearadd() -> None:
    model = model_of(RESIDUAL, {"w": normal(3, 3, 1, 1)}, {"x": S8, "w": W, "c": S8, "y": U8})
    before = model.clone()
    result = place(model)
    assert dict(result.counts) == {"Conv": 1, "Add": 1}
    assert executed(model).keys() >= {"QLinearConv", "QLinearAdd"}
    assert not executed(model).keys() & {"Relu", "Add", "Conv"}
    # A tie that the convolution rounds the other way is two and a half steps of the sum's finer grid.
    assert_follows(model, before, steps=3)


def test_a_tensor_has_one_quantizer_however_many_read_it() -> None:
    model = model_of(RESIDUAL, {"w": normal(3, 3, 1, 1)}, {"x": S8, "w": W, "c": S8, "y": U8})
    place(model)
    assert ops(model).count("QuantizeLinear") == 3
    quantizers = [use.node.op_type for use in model.values()["x"].uses()]
    assert quantizers == ["QuantizeLinear"]


def test_a_tensor_computed_in_float_is_read_raw_by_float_consumers() -> None:
    model = model_of(
        """
        g (float[1,3,8,8] x, float[3,3,1,1] w) => (float[1,3,8,8] y, float[1,3,8,8] z) {
          t = Neg (x)
          [conv] y = Conv (t, w)
          z = Abs (t)
        }
        """,
        {"w": normal(3, 3, 1, 1)},
        {"t": S8, "w": W, "y": S8},
    )
    place(model)
    absolute = model.values()["z"].producer()
    assert absolute is not None
    assert absolute.inputs[0] is model.values()["t"]


def test_a_tensor_computed_in_integers_is_read_dequantized_by_all_even_in_subgraphs() -> None:
    model = model_of(
        """
        g (float[1,3,8,8] x, float[3,3,1,1] w, bool k) => (float[1,3,8,8] z) {
          [conv] c = Conv (x, w)
          z = If (k) <
            then_branch = a () => (float[1,3,8,8] p) { p = Neg (c) },
            else_branch = b () => (float[1,3,8,8] q) { q = Abs (c) }
          >
        }
        """,
        {"w": normal(3, 3, 1, 1)},
        {"x": S8, "w": W, "c": S8},
    )
    place(model)
    assert [use.node.op_type for use in model.values()["c"].uses()] == ["QuantizeLinear"]
    assert sorted(use.node.op_type for use in model.values()["c_dequantized"].uses()) == ["Abs", "Neg"]


def test_a_conv_inside_a_subgraph_says_why_it_stays() -> None:
    model = model_of(
        """
        g (float[1,3,8,8] x, float[3,3,1,1] w, bool k) => (float[1,3,8,8] z) {
          z = If (k) <
            then_branch = a () => (float[1,3,8,8] p) { [inner] p = Conv (x, w) },
            else_branch = b () => (float[1,3,8,8] q) { q = Abs (x) }
          >
        }
        """,
        {"w": normal(3, 3, 1, 1)},
        {"x": S8, "w": W},
    )
    finding = only(place(model), Code.KEPT_FLOAT)
    assert finding.node == "inner"
    assert "body" in finding.reason


ELEMENTWISE = """
g (float[1,3,8,8] x, float[3,3,1,1] w) => (float[{shape}] y) {{
  [conv] c = Conv (x, w)
  [op] y = {op}
}}
"""


@pytest.mark.parametrize(
    ("op", "shape", "kernel"),
    [
        ("Add (c, x)", "1,3,8,8", "QLinearAdd"),
        ("Mul (c, c)", "1,3,8,8", "QLinearMul"),
        ("Concat <axis = 1> (c, x)", "1,6,8,8", "QLinearConcat"),
        ("GlobalAveragePool (c)", "1,3,1,1", "QLinearGlobalAveragePool"),
        ("LeakyRelu <alpha = 0.1> (c)", "1,3,8,8", "QLinearLeakyRelu"),
        ("Sigmoid (c)", "1,3,8,8", "QLinearSigmoid"),
    ],
)
def test_elementwise_ops_join_an_integer_producer(op: str, shape: str, kernel: str) -> None:
    model = model_of(
        ELEMENTWISE.format(op=op, shape=shape),
        {"w": normal(3, 3, 1, 1)},
        {"x": S8, "w": W, "c": S8, "y": S8},
    )
    before = model.clone()
    place(model)
    assert executed(model).keys() >= {"QLinearConv", kernel}
    assert_follows(model, before)


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        ("MaxPool <kernel_shape = [2,2], strides = [2,2]> (c)", "1,3,4,4"),
        ("Transpose <perm = [0,2,3,1]> (c)", "1,8,8,3"),
        ("Flatten (c)", "1,192"),
    ],
)
def test_data_movement_joins_where_both_sides_lie_on_one_grid(op: str, shape: str) -> None:
    text, weights = ELEMENTWISE.format(op=op, shape=shape), {"w": normal(3, 3, 1, 1)}
    model = model_of(text, weights, {"x": S8, "w": W, "c": S8, "y": S8})
    assert place(model).counts[op.split()[0]] == 1
    moved = model.values()["y_float"].producer()
    assert moved is not None
    assert moved.inputs[0] is model.values()["c_dequantized"]
    model = model_of(text, weights, {"x": S8, "w": W, "c": S8, "y": W})
    placed = place(model)
    if op.startswith("MaxPool"):
        assert placed.counts["MaxPool"] == 1  # rounding commutes with a maximum
        return
    finding = only(placed, Code.KEPT_FLOAT)
    assert "different grids" in finding.reason
    assert (finding.node, finding.value) == ("op", "y")


def test_every_output_of_a_split_carries_integers() -> None:
    model = model_of(
        """
        g (float[1,4,8,8] x, float[4,4,1,1] w) => (float[1,2,8,8] y) {
          [conv] c = Conv (x, w)
          [split] a, b = Split <axis = 1> (c)
          [add] y = Add (b, b)
        }
        """,
        {"w": normal(4, 4, 1, 1)},
        {"x": S8, "w": W, "c": S8, "a": S8, "b": S8, "y": S8},
    )
    result = place(model)
    assert dict(result.counts) == {"Conv": 1, "Split": 1, "Add": 1}


@pytest.mark.parametrize("op", ["Add (c, k)", "Mul (k, c)"])
def test_a_constant_operand_is_quantized_with_its_node(op: str) -> None:
    model = model_of(
        """
        g (float[1,3,8,8] x, float[3,3,1,1] w, float[3,1,1] k) => (float[1,3,8,8] y) {
          [conv] c = Conv (x, w)
          [op] y = OP
        }
        """.replace("OP", op),
        {"w": normal(3, 3, 1, 1), "k": np.asarray([-0.5, 0.25, 1.5]).reshape(3, 1, 1)},
        {"x": S8, "w": W, "c": S8, "y": S8},
    )
    before = model.clone()
    place(model)
    assert integers(model, "k_quantized").dtype == np.uint8
    assert f"QLinear{op[:3]}" in executed(model)
    assert_follows(model, before)


def test_a_constant_operand_keeps_the_grid_it_was_trained_on() -> None:
    model = model_of(
        """
        g (float[1,3,8,8] x, float[3,3,1,1] w, float[3,1,1] k) => (float[1,3,8,8] y) {
          [conv] c = Conv (x, w)
          [op] y = Add (c, k)
        }
        """,
        {"w": normal(3, 3, 1, 1), "k": np.asarray([-0.5, 0.25, 1.5]).reshape(3, 1, 1)},
        {"x": S8, "w": W, "c": S8, "y": S8, "k": QuantParams.make(0.25, 0, INT8)},
    )
    place(model)
    np.testing.assert_array_equal(integers(model, "k_quantized").reshape(-1), [126, 129, 134])
    assert integers(model, "k_scale") == 0.25


def test_one_constant_in_two_roles_is_written_twice() -> None:
    model = model_of(
        """
        g (float[1,3,1,1] x, float[3,3,1,1] w) => (float[3,3,1,1] y) {
          [conv] c = Conv (x, w)
          [add] y = Add (c, w)
        }
        """,
        {"w": np.linspace(-1.27, 1.27, 9).reshape(3, 3, 1, 1)},
        {"x": S8, "w": QuantParams.make(0.01, 0, INT8), "c": S8, "y": S8},
    )
    place(model)
    written = {array.dtype.name for name in ("w_quantized", "w_quantized_1") for array in [integers(model, name)]}
    assert written == {"int8", "uint8"}


@pytest.mark.parametrize("number", [np.inf, np.nan])
def test_an_operand_that_no_grid_holds_keeps_its_node_in_float(number: float) -> None:
    model = model_of(
        """
        g (float[1,3,8,8] x, float[3,3,1,1] w, float[1] k) => (float[1,3,8,8] y) {
          [conv] c = Conv (x, w)
          [add] y = Add (c, k)
        }
        """,
        {"w": normal(3, 3, 1, 1), "k": [number]},
        {"x": S8, "w": W, "c": S8, "y": S8},
    )
    finding = only(place(model), Code.KEPT_FLOAT)
    assert (finding.node, finding.value) == ("add", "k")


def test_elementwise_ops_between_float_producers_stay_with_a_note() -> None:
    model = model_of(
        "g (float[4] x, float[4] z) => (float[4] y) { [add] y = Add (x, z) }", scales={"x": S8, "z": S8}
    )
    finding = only(place(model), Code.KEPT_FLOAT)
    assert finding.severity is Severity.NOTE
    assert not ops(model).count("QuantizeLinear")


def test_an_elementwise_op_asked_for_by_name_needs_no_integer_producer() -> None:
    model = model_of(
        "g (float[4] x, float[4] z) => (float[4] y) { [add] y = Add (x, z) }", scales={"x": S8, "z": S8, "y": S8}
    )
    assert dict(place(model, InsertQuantizeDequantize(quantize_ops=("Add",))).counts) == {"Add": 1}
    assert "QLinearAdd" in executed(model)


def test_arithmetic_on_shapes_is_no_kernel() -> None:
    model = parse("g (int64[4] x, int64[4] z) => (int64[4] y) { [add] y = Add (x, z) }")
    assert not place(model, InsertQuantizeDequantize(quantize_ops=("Add",))).diagnostics


def test_a_graph_output_with_a_trained_grid_keeps_its_name() -> None:
    model = conv()
    place(model)
    assert named(model.graph.outputs) == ["y"]
    producer = model.graph.outputs[0].producer()
    assert producer is not None
    assert producer.op_type == "DequantizeLinear"


def test_a_tensor_that_is_two_graph_outputs_keeps_both_names() -> None:
    model = conv()
    model.graph.outputs.append(model.graph.outputs[0])
    InsertQuantizeDequantize().run(model, CONTEXT)
    assert named(model.graph.outputs) == ["y", "y"]


@pytest.mark.parametrize("grid", [None, derived(S8)])
def test_a_graph_output_nobody_trained_stays_float(grid: QuantParams | None) -> None:
    text = "g (float[1,3,8,8] x, float[4,3,3,3] w) => (float[1,4,6,6] y) { [conv] y = Conv (x, w) }"
    scales = {"x": S8, "w": W} | ({"y": grid} if grid is not None else {})
    model = model_of(text, {"w": normal(4, 3, 3, 3)}, scales)
    finding = only(place(model), Code.OUTPUT_KEPT_FLOAT)
    assert (finding.node, finding.value) == ("conv", "y")
    assert finding.remedy
    assert ops(model) == ["Conv"]


def test_an_elementwise_graph_output_nobody_trained_stays_float() -> None:
    model = model_of(RESIDUAL, {"w": normal(3, 3, 1, 1)}, {"x": S8, "w": W, "c": S8, "y": derived(U8)})
    finding = only(place(model), Code.OUTPUT_KEPT_FLOAT)
    assert (finding.node, finding.value) == ("add", "y")


def test_an_output_grid_on_a_graph_output_that_somebody_reads_serves_them_all() -> None:
    model = model_of(
        "g (float[1,3,8,8] x, float[3,3,1,1] w) => (float[1,3,8,8] c, float[1,3,8,8] z) "
        "{ [conv] c = Conv (x, w) z = Neg (c) }",
        {"w": normal(3, 3, 1, 1)},
        {"x": S8, "w": W, "c": S8},
    )
    place(model)
    negation = model.values()["z"].producer()
    assert negation is not None
    assert negation.inputs[0] is model.graph.outputs[0]
    assert model.graph.outputs[0].name == "c"


KEPT = {
    "alpha": ("Gemm <alpha = 2.0> (x, w, b)", {}, ""),
    "beta": ("Gemm <beta = 0.5> (x, w, b)", {}, ""),
    "transA": ("Gemm <transA = 1> (z, w, b)", {}, ""),
    "dynamic bias": ("Gemm (x, w, r)", {}, "r"),
    "weight axis": ("Gemm (x, w, b)", {"w": columns(6, 0)}, "w"),
    "missing input grid": ("Gemm (q, w, b)", {}, "q"),
    "missing weight grid": ("Gemm (x, u, b)", {}, "u"),
    "activation per channel": ("Gemm (x, w, b)", {"x": columns(6, 1)}, "x"),
    "16 bits": ("Gemm (x, w, b)", {"x": QuantParams.make(0.01, 0, QuantDType(16, signed=True))}, "x"),
    "weight of 16 bits": ("Gemm (x, w, b)", {"w": QuantParams.make(0.01, 0, QuantDType(16, signed=True))}, "w"),
    "infinite bias": ("Gemm (x, w, i)", {}, "i"),
    "bias of the other axis": ("Gemm (x, w, t)", {}, "t"),
}


@pytest.mark.parametrize("case", KEPT)
def test_a_kernel_that_cannot_be_says_why(case: str) -> None:
    call, scales, value = KEPT[case]
    model = model_of(
        """
        g (float[4,6] x, float[6,4] z, float[4,6] q, float[4] r, float[6,4] w, float[6,4] u, float[4] b,
           float[4] i, float[4,1] t) => (float[4,4] y) { [fc] y = CALL }
        """.replace("CALL", call),
        {"w": normal(6, 4), "u": normal(6, 4), "b": normal(4), "i": [np.inf, 0, 0, 0], "t": normal(4, 1)},
        {"x": S8, "z": S8, "w": W, **scales},
    )
    finding = only(place(model), Code.KEPT_FLOAT)
    assert (finding.node, finding.value) == ("fc", value)
    assert finding.reason.startswith("Gemm stays in float: ")
    assert ops(model) == ["Gemm"]


def test_alpha_and_beta_of_one_are_no_obstacle_and_beta_without_bias_neither() -> None:
    model = model_of(
        "g (float[4,6] x, float[6,4] w) => (float[4,4] y) { [fc] y = Gemm <alpha = 1.0, beta = 0.5> (x, w) }",
        {"w": normal(6, 4)},
        {"x": S8, "w": W},
    )
    assert not place(model).diagnostics


def test_half_floats_are_refused_not_mangled() -> None:
    model = parse("g (float16[4,6] x, float16[6,4] w) => (float16[4,4] y) { [fc] y = MatMul (x, w) }")
    for name in ("x", "w", "y"):
        model.scales.set(model.values()[name], S8)
    assert "FLOAT16" in only(place(model), Code.KEPT_FLOAT).reason


def test_constants_only_are_for_folding() -> None:
    model = model_of(
        "g (float[4,6] x, float[6,4] w, float[4] b) => (float[4,4] y) { [fc] y = Gemm (x, w, b) }",
        {"x": normal(4, 6), "w": normal(6, 4), "b": normal(4)},
        {"x": S8, "w": W},
    )
    assert "constants only" in only(place(model), Code.KEPT_FLOAT).reason


def test_an_op_without_a_kernel_is_named() -> None:
    model = model_of(
        "g (float[1,3,8,8] x, float[3,3,1,1] w) => (float[1,3,8,8] y) { [up] y = ConvTranspose (x, w) }",
        {"w": normal(3, 3, 1, 1)},
    )
    assert only(place(model), Code.UNSUPPORTED_OP).node == "up"


def test_a_narrow_grid_clips_its_integers() -> None:
    model = conv(y=QuantParams.make(0.04, 0, QuantDType(7, signed=False)))
    place(model)
    assert ops(model)[-3:] == ["QuantizeLinear", "Clip", "DequantizeLinear"]
    clip = model.graph[-2]
    assert [integers(model, str(value.name)).item() for value in clip.inputs[1:] if value is not None] == [0, 127]
    assert run(model, {"x": np.full((1, 3, 8, 8), 100.0, np.float32)})[0].max() <= np.float32(127 * 0.04)
    assert "QLinearConv" in executed(model)


def test_moving_from_signed_to_unsigned_is_bit_exact() -> None:
    def quantized(params: QuantParams) -> npt.NDArray[np.float32]:
        return params.dequantize(params.quantize(np.linspace(-10, 10, 4001, dtype=np.float32)))

    model = model_of(
        "g (float[1,1,1,4001] x, float[1,1,1,1] w) => (float[1,1,1,4001] y) { [conv] y = Conv (x, w) }",
        {"w": np.ones((1, 1, 1, 1))},
        {"x": S8, "w": QuantParams.make(1.0, 0, INT8), "y": S8},
    )
    place(model)
    x = np.linspace(-10, 10, 4001, dtype=np.float32).reshape(1, 1, 1, -1)
    for optimize in (False, True):
        np.testing.assert_array_equal(run(model, {"x": x}, optimize=optimize)[0].reshape(-1), quantized(S8))
    assert integers(model, "zero_point_1").dtype == np.uint8
    assert "QLinearConv" in executed(model)


def test_a_narrow_signed_grid_from_zero_keeps_zero_lowest_and_absorbs_its_relu() -> None:
    model = conv(y=QuantParams.make(0.02, -127, QuantDType(8, signed=True, narrow_range=True)))
    before = model.clone()
    place(model)
    assert integers(model, str(model.graph[-1].inputs[2].name)) == 0  # type: ignore[union-attr]
    assert executed(model).keys() >= {"QLinearConv"}
    assert_follows(model, before)


def test_a_clip_is_absorbed_by_the_grid_that_is_written_not_by_the_trained_one() -> None:
    """Lowered, a narrow grid has one level more, and the runtime keeps the Clip."""
    model = model_of(
        """
        g (float[1,3,8,8] x, float[4,3,3,3] w, float lo, float hi) => (float[1,4,6,6] y) {
          [conv] c = Conv (x, w)
          [act] y = Clip (c, lo, hi)
        }
        """,
        {"w": normal(4, 3, 3, 3), "lo": 0.0, "hi": 254 * 0.02},
        {"x": S8, "w": W, "c": S8, "y": QuantParams.make(0.02, -127, QuantDType(8, True, narrow_range=True))},
    )
    place(model)
    assert "c_quantized" in model.values()
    assert "QLinearConv" in executed(model)


SHARED = """
g (float[1,3,8,8] x, float[3,3,1,1] w, float[3] b) => (float[1,3,8,8] y) {
  [one] t = Conv (x, w, b)
  [two] y = Conv (t, w, b)
}
"""


def test_a_shared_weight_is_written_once_and_a_shared_bias_for_each_step() -> None:
    model = model_of(
        SHARED,
        {"w": normal(3, 3, 1, 1), "b": normal(3)},
        {"x": S8, "w": W, "t": U8.with_(scale=np.float32(0.03)), "y": S8},
    )
    before = model.clone()
    place(model)
    names = list(model.graph.initializers)
    assert [name for name in names if name.startswith("w_quantized")] == ["w_quantized"]
    assert sorted(name for name in names if name.startswith("b_quantized")) == ["b_quantized", "b_quantized_1"]
    assert executed(model)["QLinearConv"] == 2
    assert before.graph is not model.graph


def test_a_weight_that_float_readers_share_stays_for_them() -> None:
    model = model_of(
        """
        g (float[1,3,8,8] x, float[3,3,1,1] w) => (float[1,3,8,8] y, float[3,3,1,1] z) {
          [conv] y = Conv (x, w)
          z = Neg (w)
        }
        """,
        {"w": normal(3, 3, 1, 1)},
        {"x": S8, "w": W, "y": S8},
    )
    place(model)
    negation = model.values()["z"].producer()
    assert negation is not None
    assert negation.inputs[0] is model.values()["w"]


def test_only_the_ops_asked_for_are_quantized() -> None:
    model = model_of(RESIDUAL, {"w": normal(3, 3, 1, 1)}, {"x": S8, "w": W, "c": S8, "y": U8})
    result = place(model, InsertQuantizeDequantize(quantize_ops=("Conv",)))
    assert dict(result.counts) == {"Conv": 1}
    finding = only(result, Code.NODE_SKIPPED)
    assert (finding.node, finding.severity) == ("add", Severity.NOTE)


def test_an_unknown_op_lists_the_ones_there_are() -> None:
    with pytest.raises(PassFailed, match="no integer kernel for op 'Softplus'") as caught:
        InsertQuantizeDequantize(quantize_ops=("Conv", "Softplus")).run(conv(), CONTEXT)
    assert "Conv, Flatten" in str(caught.value.remedy).replace("Concat, ", "")


@pytest.mark.parametrize("missing", ["x", "w", "y"])
def test_a_missing_scale_of_an_op_asked_for_names_node_and_tensor(missing: str) -> None:
    model = conv()
    if missing == "y":
        model.graph.outputs[0] = model.values()["c"]  # a tensor in the middle, so that it is not a graph output
        model = model_of(
            "g (float[1,3,8,8] x, float[4,3,3,3] w) => (float[1,4,6,6] z) { [conv] y = Conv (x, w) z = Neg (y) }",
            {"w": normal(4, 3, 3, 3)},
            {"x": S8, "w": W},
        )
    model.scales.discard(model.values()[missing])
    asked = InsertQuantizeDequantize(quantize_ops=("Conv",))
    with pytest.raises(PassFailed, match=f"tensor '{missing}'") as caught:
        asked.run(model, CONTEXT)
    assert "'conv'" in str(caught.value)
    relaxed = place(model, replace(asked, on_missing_scale=OnMissingScale.FLOAT))
    assert only(relaxed, Code.KEPT_FLOAT).value == missing


def test_without_being_asked_for_a_missing_scale_is_a_warning() -> None:
    model = conv()
    model.scales.discard(model.values()["x"])
    finding = only(place(model), Code.KEPT_FLOAT)
    assert (finding.node, finding.value, finding.severity) == ("conv", "x", Severity.WARNING)
    assert finding.remedy


@pytest.mark.parametrize("pattern", ["conv", "co*"])
def test_nodes_to_skip_stay_in_float(pattern: str) -> None:
    result = place(model := conv(), InsertQuantizeDequantize(skip_nodes=(pattern,)))
    assert only(result, Code.NODE_SKIPPED).node == "conv"
    assert ops(model) == ["Conv", "Relu"]


@pytest.mark.parametrize("pattern", ["conw", "block[0]"])
def test_a_node_to_skip_that_is_not_there_suggests_the_nearest(pattern: str) -> None:
    with pytest.raises(PassFailed, match="no node is called") as caught:
        InsertQuantizeDequantize(skip_nodes=(pattern,)).run(conv(), CONTEXT)
    assert pattern != "conw" or "'conv'" in str(caught.value.remedy)


def test_a_name_with_brackets_is_a_name_first() -> None:
    model = conv()
    model.graph[0].name = "block[0]"
    result = InsertQuantizeDequantize(skip_nodes=("block[0]",)).run(model, CONTEXT)
    assert only(result, Code.NODE_SKIPPED).node == "block[0]"


def test_equal_parameters_share_one_initializer() -> None:
    model = model_of(RESIDUAL, {"w": normal(3, 3, 1, 1)}, {"x": S8, "w": W, "c": S8, "y": S8})
    place(model)
    quantizers = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    assert len({node.inputs[1] for node in quantizers}) == 1
    assert len({node.inputs[2] for node in quantizers}) == 1


def test_a_relu_whose_grid_reaches_below_zero_is_not_absorbed() -> None:
    model = conv(y=S8, c=S8)
    place(model)
    assert model.values()["c_quantized"].producer() is not None
    relu = next(node for node in model.graph if node.op_type == "Relu")
    assert relu.inputs[0] is model.values()["c_dequantized"]


@pytest.mark.parametrize(("high", "absorbed"), [(6.0, True), (5.0, False), (np.inf, True)])
def test_a_clip_is_absorbed_where_the_grid_ends_inside(high: float, absorbed: bool) -> None:
    model = model_of(
        """
        g (float[1,3,8,8] x, float[4,3,3,3] w, float lo, float hi) => (float[1,4,6,6] y) {
          [conv] c = Conv (x, w)
          [act] y = Clip (c, lo, hi)
        }
        """,
        {"w": normal(4, 3, 3, 3), "lo": 0.0, "hi": high},
        {"x": S8, "w": W, "y": QuantParams.make(6 / 255, 0, UINT8), "c": S8},
    )
    place(model)
    assert ("c_quantized" not in model.values()) == absorbed
    assert ("QLinearConv" in executed(model)) or not absorbed


def test_an_activation_that_no_grid_computes_is_reported() -> None:
    model = parse(
        """
        g (float[1,1,2,2] x) => (float[1,1,2,2] y) <float[1,1,1,1] w = {1}> {
          [conv] c = Conv (x, w)
          [relu] r = Relu (c)
          [conv2] y = Conv (r, w)
        }
        """
    )
    values = model.values()
    for name in ("x", "c", "r", "y"):
        model.scales.set(values[name], QuantParams.make(0.1, 100, UINT8))
    model.scales.set(values["w"], QuantParams.make(0.01, 0, INT8))
    notes = place(model).diagnostics
    assert [(d.node, d.value) for d in notes if d.code is Code.ACTIVATION_NOT_ABSORBED] == [("relu", "r")]


def test_a_target_without_int32_bias_keeps_the_bias_it_finds() -> None:
    model = conv(w=W)
    bias = integers(model, "b")
    apply(InsertQuantizeDequantize(), model, Context(replace(CONTEXT.target, int32_bias=False)))
    node = next(model.nodes("Conv"))
    assert node.inputs[2] is not None
    np.testing.assert_array_equal(integers(model, "b"), bias)
    assert node.inputs[2].name == "b"


def test_a_bias_that_fits_no_int32_is_no_obstacle_where_it_stays_float() -> None:
    model = conv(x=S8.with_(scale=np.float32(1e-30)))
    result = apply(InsertQuantizeDequantize(), model, Context(replace(CONTEXT.target, int32_bias=False)))
    assert not result.diagnostics
    assert dict(result.counts) == {"Conv": 1}


@pytest.mark.parametrize("target", ["ort-x86", "ort-arm"])
def test_levels_are_cut_off_in_float_where_integers_cannot_be_clipped(target: str) -> None:
    """Grids that end before, begin after, and do both to the levels of int8 and uint8."""
    grids = [
        QuantParams.make(0.05, 0, QuantDType(8, signed=False, top=127)),
        QuantParams.make(0.3, 2, QuantDType(4, signed=True)),
        QuantParams.make(0.3, 4, QuantDType(4, signed=False)),
    ]
    feeds = {"x": Numbers.rng.normal(0, 8, (1, 3, 8, 8)).astype(np.float32)}
    for grid in grids:
        answers = []
        for integer_clip in (True, False):
            Numbers.rng = np.random.default_rng(7)
            model = conv(x=grid, y=U8)
            ctx = Context(replace(load_target(target), integer_clip=integer_clip))
            apply(InsertQuantizeDequantize(), model, ctx)
            clips = [node.outputs[0].dtype for node in model.nodes("Clip")]
            integer = ctx.target.activation_dtype.storage
            assert clips == [integer if integer_clip else oir.DataType.FLOAT]
            answers.append(run(model, feeds)[0])
        np.testing.assert_array_equal(*answers)


def test_a_model_with_grids_on_weights_alone_is_told_so_once() -> None:
    text = """g (float[2,3] x) => (float[2,3] y)
    <float[3,3] a = {1,2,3,4,5,6,7,8,9}, float[3,3] b = {9,8,7,6,5,4,3,2,1}> {
      [first] h = MatMul (x, a)
      [second] y = MatMul (h, b)
    }"""
    for activation in (False, True):
        model = parse(text)
        for name in ("a", "b", *(["x"] if activation else [])):
            model.scales.set(model.values()[name], W if name != "x" else S8)
        result = InsertQuantizeDequantize().run(model, CONTEXT)
        warned = [note for note in result.diagnostics if note.severity is Severity.WARNING]
        if activation:
            assert {note.node for note in warned} == {"second"}
            continue
        (note,) = warned
        assert (note.code, note.node) == (Code.SCALE_MISSING, "")
        assert "only weights were fake quantized" in note.reason
        assert [note.node for note in result.diagnostics[1:]] == ["first", "second"]
