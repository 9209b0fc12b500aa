import numpy as np
import onnx
import pytest
from support import TARGET, parse

from qat2int8.ir import Model
from qat2int8.passes import Context
from qat2int8.passes.registry import find_pass
from qat2int8.pipelines.convert import Conversion, convert
from qat2int8.pipelines.dialects import has_fake_quant, is_readable
from qat2int8.pipelines.manager import run_pipeline
from qat2int8.pipelines.reference import ReadableSource
from qat2int8.pipelines.shipped import load_pipeline

HEADER = """<ir_version: 8, opset_import: ["" : 17, "qonnx.custom_op.general" : 2, "org.openvinotoolkit" : 1,
 "com.microsoft" : 1, "my" : 1, "paddle" : 1]>"""


def model_of(node: str) -> Model:
    return parse(f"{HEADER} g (uint8[2] u, float[2] x, float s) => (float[2] y) {{ t = {node} y = Neg (x) }}")


@pytest.mark.parametrize(
    ("node", "found", "readable"),
    [
        ("QuantizeLinear (x, s)", True, True),
        ("DequantizeLinear (u, s)", True, True),
        ("com.microsoft.QuantizeLinear (x, s)", True, True),
        ("com.microsoft.QLinearAdd (u, s, , u, s, , s)", True, True),
        ("com.microsoft.QGemm (u, s, u, u, s, u)", True, True),
        ("qonnx.custom_op.general.Quant (x, s, s, s)", True, False),
        ("qonnx.custom_op.general.Trunc (x, s, s, s, s)", True, False),
        ("org.openvinotoolkit.FakeQuantize (x, s, s, s, s)", True, False),
        ("org.openvinotoolkit.Swish (x)", False, True),
        ("paddle.fake_quantize_dequantize_moving_average_abs_max (x, s)", True, False),
        ("my.dequantize_linear (x, s)", True, False),
        ("paddle.hard_swish (x)", False, True),
        ("my.Quant (x, s, s, s)", False, True),
        ('Relu <out_threshold = 1.0, to = 1> (x)', True, True),
        ("Relu (x)", False, True),
    ],
)  # fmt: skip
def test_what_says_that_a_model_was_quantized(node: str, found: bool, readable: bool) -> None:
    if "out_threshold" in node:
        model = model_of("Relu (x)")
        model.graph[0].metadata_props["out_threshold"] = "1.0"
    else:
        model = model_of(node)
    assert (has_fake_quant(model), is_readable(model)) == (found, readable)


def test_branches_and_functions_are_looked_into() -> None:
    branch = parse(
        f"""{HEADER} g (bool c, float[2] x, float s) => (float[2] y) {{
          y = If (c) <
            then_branch = t () => (float[2] p) {{ p = qonnx.custom_op.general.Quant (x, s, s, s) }},
            else_branch = e () => (float[2] q) {{ q = Neg (x) }}
          >
        }}"""
    )
    function = parse(
        f"""{HEADER} g (float[2] x, float s) => (float[2] y) {{ y = my.f (x, s) }}
        <domain: "my", opset_import: ["" : 17, "qonnx.custom_op.general" : 2]>
        f (x, s) => (y) {{ y = qonnx.custom_op.general.Quant (x, s, s, s) }}"""
    )
    for model in (branch, function):
        assert has_fake_quant(model)
        assert not is_readable(model)


def network(activation: str, weight: str) -> str:
    """A convolution and a ReLU in between quantizers ``q(x)``; each dialect fills in how it writes them."""
    kernel = ", ".join(str(round(0.04 * ((7 * i) % 11 - 5), 2)) for i in range(16))
    return f"""{HEADER} g (float[1,4,8,8] x) => (float[1,4,8,8] y)
    <float[4,4,1,1] w = {{{kernel}}}, float s = {{0.0625}}, float ws = {{0.00390625}}, float z = {{0}},
     float b = {{8}}, float al = {{-8}}, float ah = {{7.9375}}, float wl = {{-0.49609375}},
     float wh = {{0.49609375}}> {{
      xq = {activation.format("x")}
      wq = {weight.format("w")}
      [conv] c = Conv (xq, wq)
      [relu] r = Relu (c)
      y = {activation.format("r")}
    }}"""


QONNX = network(
    "qonnx.custom_op.general.Quant <signed = 1, narrow = 0> ({}, s, z, b)",
    "qonnx.custom_op.general.Quant <signed = 1, narrow = 1> ({}, ws, z, b)",
)
OPENVINO = network(
    "org.openvinotoolkit.FakeQuantize <levels = 256> ({}, al, ah, al, ah)",
    "org.openvinotoolkit.FakeQuantize <levels = 255> ({}, wl, wh, wl, wh)",
)
PADDLE = network(
    "paddle.fake_quantize_dequantize_moving_average_abs_max <round_type = 0> ({}, ah)",
    "paddle.fake_quantize_dequantize_abs_max ({})",
)


def kernels(conversion: Conversion) -> list[str]:
    return sorted(set(conversion.after) - {"QuantizeLinear", "DequantizeLinear", "Clip"})


@pytest.mark.parametrize("text", [QONNX, OPENVINO, PADDLE], ids=["qonnx", "openvino", "paddle"])
def test_a_dialect_no_runtime_loads_is_converted_and_measured(text: str) -> None:
    conversion = convert(parse(text).to_proto())
    assert not [finding for finding in conversion.diagnostics if finding.severity == "warning"]
    assert conversion.certificate.integer_macs_percent == 100
    fidelity = conversion.fidelity
    # Levels of the reference that float rounding puts on the other side of a tie are one step away.
    assert fidelity.outputs[0].max_error <= 0.0625 * 1.01
    assert fidelity.sqnr_db > 30
    assert fidelity.outputs[0].value_range > 1


def test_the_dialects_are_one_model() -> None:
    left, right = (convert(parse(text).to_proto()) for text in (QONNX, OPENVINO))
    x = {"x": np.random.default_rng(0).normal(scale=3, size=(1, 4, 8, 8)).astype(np.float32)}
    assert left.fidelity_on([x]).outputs[0].max_error == right.fidelity_on([x]).outputs[0].max_error
    assert kernels(left) == kernels(right)


PLAIN = f"""{HEADER} g (float[4] x) => (float[4] y) <float s = {{0.5}}> {{
  q = QuantizeLinear (x, s) d = DequantizeLinear (q, s) y = Relu (d)
}}"""


@pytest.mark.parametrize(("text", "kept"), [(PLAIN, False), (QONNX, True)], ids=["plain", "qonnx"])
def test_a_reference_is_kept_where_the_source_cannot_be_one(text: str, kept: bool) -> None:
    model = parse(text)
    observer = ReadableSource(model)
    passes = [find_pass(name)() for name in ("canonicalize", "read-qonnx-quant", "gather-weight-scales")]
    run_pipeline(model, passes, Context(TARGET), observers=[observer])
    assert (observer.path is not None) == kept
    if observer.path is not None:
        left = onnx.load(observer.path)
        assert {node.domain for node in left.graph.node} == {""}
        assert "QuantizeLinear" in {node.op_type for node in left.graph.node}


def test_no_reference_is_kept_while_an_op_is_left_that_no_runtime_loads() -> None:
    model = parse(OPENVINO)
    observer = ReadableSource(model)
    run_pipeline(
        model,
        [find_pass("canonicalize")(), find_pass("read-qonnx-quant")()],
        Context(TARGET),
        observers=[observer],
    )
    assert observer.path is None


@pytest.mark.parametrize("name", ["qat-to-int8", "qat-to-fp32"])
def test_every_dialect_is_read_before_anything_is_gathered(name: str) -> None:
    names = [step.name for step in load_pipeline(name).build()]
    gather = names.index("gather-weight-scales")
    readers = ["raise-qoperators", "read-qonnx-quant", "read-openvino-fake-quantize", "float-data-movement"]
    positions = [names.index(reader) for reader in readers]
    assert positions == sorted(positions)
    assert names.index("fold-constants") < positions[0]
    assert positions[-1] < gather
