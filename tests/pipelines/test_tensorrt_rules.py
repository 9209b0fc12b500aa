"""Each rule of TensorRT's is kept by what the pipeline places, and found where it is broken on purpose."""

from __future__ import annotations

import onnx
import pytest
from support import parse

import qat2int8
from qat2int8.ir import Code, Severity
from qat2int8.pipelines.benchmarking import networks
from qat2int8.pipelines.tensorrt_rules import broken_rules

HEAD = """
g (float[1,2,4,4] x, float[1,2,4,4] r) => (float[1,2,4,4] y)
<float s = {0.1}, float s2 = {0.2}, float neg = {-1.0}, float[2] pc = {0.1, 0.2}, int8 z = {0}, int8 one = {1},
 uint8 uz = {0}, int8[2] pz = {0, 0}, float[2] b = {0, 0}, int32[2] bq = {0, 0}, int32 bz = {0},
 int8[2,2,1,1] w = {1, 2, 3, 4}, float[2,2,1,1] wf = {1, 2, 3, 4}> {
"""

GOOD = """
  [q] xq = QuantizeLinear (x, s, z)
  [dq] xd = DequantizeLinear (xq, s, z)
  [dqw] wd = DequantizeLinear <axis = 0> (w, pc, pz)
  [qr] rq = QuantizeLinear (r, s, z)
  [dqr] rd = DequantizeLinear (rq, s, z)
  [conv] c = Conv (xd, wd, b)
  [add] a = Add (c, rd)
  [relu] y = Relu (a)
}
"""

BROKEN = [
    (
        "zero point",
        "dq",
        "its zero point is not 0",
        [("(x, s, z)", "(x, s, one)"), ("(xq, s, z)", "(xq, s, one)")],
    ),
    ("unsigned", "dq", "it uses UINT8", [("(x, s, z)", "(x, s, uz)"), ("(xq, s, z)", "(xq, s, uz)")]),
    ("negative scale", "dq", "its scale is not positive", [("(xq, s, z)", "(xq, neg, z)")]),
    (
        "computed scale",
        "q",
        "its scale is not constant",
        [("[q] ", "[m] t = Abs (s)\n  [q] "), ("(x, s,", "(x, t,")],
    ),
    ("per channel", "q", "an activation has a step per channel", [("(x, s, z)", "(x, pc, pz)")]),
    ("input channel", "conv", "a step per channel of axis 1", [("<axis = 0>", "<axis = 1>")]),
    ("float weight", "conv", "only one of the two operands", [("Conv (xd, wd, b)", "Conv (xd, wf, b)")]),
    ("float input", "conv", "only one of the two operands", [("Conv (xd, wd, b)", "Conv (x, wd, b)")]),
    (
        "quantized bias",
        "conv",
        "its bias is quantized",
        [("[conv]", "[dqb] bd = DequantizeLinear (bq, s, bz)\n  [conv]"), ("wd, b)", "wd, bd)")],
    ),
    (
        "between a pair",
        "q",
        "MaxPool stands between Quantize and Dequantize",
        [("[dq] ", "[m] xm = MaxPool <kernel_shape = [1,1]> (xq)\n  [dq] "), ("(xq, s, z)", "(xm, s, z)")],
    ),
    (
        "before the Relu",
        "qc",
        "a quantizer between Conv and Relu",
        [
            (
                "[add] a = Add (c, rd)",
                "[qc] cq = QuantizeLinear (c, s, z)\n  [dqc] a = DequantizeLinear (cq, s, z)",
            ),
        ],
    ),
    (
        "on the convolution's branch",
        "add",
        "the branch of the layer that the Add could be fused into is quantized",
        [
            (
                "[add] a = Add (c, rd)",
                "[qc] cq = QuantizeLinear (c, s, z)\n"
                "  [dqc] cd = DequantizeLinear (cq, s, z)\n  [add] a = Add (cd, rd)",
            )
        ],
    ),
    ("float residual", "add", "the residual input is not quantized", [("Add (c, rd)", "Add (c, r)")]),
    (
        "concat",
        "concat",
        "its inputs have different scales",
        [
            ("[add] a = Add (c, rd)", "[concat] j = Concat <axis = 1> (xd, rd)\n  [a2] a = Slice (j, lo, hi, ax)"),
            ("(r, s, z)", "(r, s2, z)"),
            ("(rq, s, z)", "(rq, s2, z)"),
            ("<float s ", "<int64[1] lo = {0}, int64[1] hi = {2}, int64[1] ax = {1}, float s "),
        ],
    ),
]


def test_what_keeps_the_rules_is_let_through() -> None:
    assert broken_rules(parse(HEAD + GOOD)) == ()


@pytest.mark.parametrize(("node", "says", "edits"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_a_broken_rule_is_found_where_it_is_broken(node: str, says: str, edits: list[tuple[str, str]]) -> None:
    text = HEAD + GOOD
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    found = [finding for finding in broken_rules(parse(text)) if says in finding.reason]
    assert [finding.node for finding in found][-1:] == [node]
    for finding in found:
        assert (finding.code, finding.severity) == (Code.PLACEMENT_RULE, Severity.WARNING)
        assert finding.remedy


def test_weights_that_are_quantized_in_the_graph_may_have_a_step_per_channel() -> None:
    text = HEAD + GOOD.replace(
        "[dqw] wd = DequantizeLinear <axis = 0> (w, pc, pz)",
        "[qw] wq = QuantizeLinear <axis = 0> (wf, pc, pz)\n  [dqw] wd = DequantizeLinear <axis = 0> (wq, pc, pz)",
    )
    assert broken_rules(parse(text)) == ()


@pytest.mark.parametrize("build", [networks.tiny_resnet, lambda: networks.inception_like(width=8, size=32)])
def test_converted_networks_break_no_rule(build: object) -> None:
    proto: onnx.ModelProto = build()  # type: ignore[operator]
    conversion = qat2int8.convert(proto, target="tensorrt")
    assert conversion.certificate.broken_rules == ()
    assert conversion.certificate.integer_macs_percent == 100.0


def test_the_same_networks_placed_for_onnxruntime_break_many() -> None:
    reasons = {finding.reason for finding in broken_rules(qat2int8.convert(networks.tiny_resnet()).model)}
    assert "its bias is quantized" in reasons
    assert "it uses UINT8" in reasons
