from dataclasses import replace

import numpy as np
import pytest
from support import TARGET, apply, parse, run

from qat2int8.ir import Code, Model, Severity
from qat2int8.passes import Context
from qat2int8.passes.guard_float_layers import GuardFloatLayers
from qat2int8.pipelines.certificate import certify


def layer(body: str) -> Model:
    return parse(
        f"""
        g (uint8[1,2,4,4] q) => (uint8[1,2,4,4] o)
        <float s = {{0.05}}, uint8 z = {{128}}, float[2,2,1,1] w = {{0.3, -2.0, 0.001, 0.7}},
         int8[2,2,1,1] wq = {{1, 2, 3, 4}}, int8 wz = {{0}}> {{
          [dq] x = DequantizeLinear (q, s, z)
          {body}
        }}
        """
    )


BETWEEN = [
    "[conv] c = Conv (x, w) [q2] o = QuantizeLinear (c, s, z)",
    "[conv] c = Conv (x, w) [relu] r = Relu (c) [q2] o = QuantizeLinear (r, s, z)",
]


@pytest.mark.parametrize("body", BETWEEN)
def test_a_float_layer_between_quantizers_stays_in_float(body: str) -> None:
    model = layer(body)
    before = model.to_proto()
    executed = certify(model, before.SerializeToString()).executed
    assert executed.get("QLinearConv") or "Relu" in body, "the runtime quantizes the weight: what this pass is for"
    assert apply(GuardFloatLayers(), model).counts["guarded"] == 1
    assert [node.op_type for node in model.graph][:3] == ["DequantizeLinear", "Max", "Conv"]
    certificate = certify(model, model.to_proto().SerializeToString())
    assert [record.integer for record in certificate.compute] == [False]
    q = np.random.default_rng(0).integers(0, 256, (1, 2, 4, 4)).astype(np.uint8)
    np.testing.assert_array_equal(run(model, {"q": q}, optimize=True)[0], run(before, {"q": q})[0])


@pytest.mark.parametrize(
    "body",
    [
        "[dw] wd = DequantizeLinear (wq, s, wz) [conv] c = Conv (x, wd) [q2] o = QuantizeLinear (c, s, z)",
        "[neg] n = Neg (x) [conv] c = Conv (n, w) [q2] o = QuantizeLinear (c, s, z)",
        "[conv] c = Conv (x, w) [neg] n = Neg (c) [q2] o = QuantizeLinear (n, s, z)",
    ],
    ids=["integer weight", "float input", "float output"],
)
def test_other_layers_need_no_guard(body: str) -> None:
    assert not GuardFloatLayers().run(layer(body), Context(TARGET)).modified


POOL = """g (uint8[1,2,8,8] q) => (uint8[1,2,8,8] o) <float s = {0.05}, uint8 z = {128}> {
  [dq] x = DequantizeLinear (q, s, z)
  [pool] c = AveragePool <kernel_shape = [3,3], pads = [1,1,1,1]> (x)
  [q2] o = QuantizeLinear (c, s, z)
}"""
SLOW = Context(replace(TARGET, faster_in_float=("AveragePool",)))


def test_an_op_that_is_faster_in_float_stays_there_and_it_is_told() -> None:
    model = parse(POOL)
    before = model.to_proto()
    assert "QLinearAveragePool" in certify(model, before.SerializeToString()).executed
    result = apply(GuardFloatLayers(), model, SLOW)
    assert result.counts["guarded"] == 1
    (finding,) = result.diagnostics
    assert (finding.code, finding.severity, finding.node) == (Code.KEPT_FLOAT, Severity.NOTE, "pool")
    assert "faster in float" in finding.reason
    assert "QLinearAveragePool" not in certify(model, model.to_proto().SerializeToString()).executed
    q = np.random.default_rng(0).integers(0, 256, (1, 2, 8, 8)).astype(np.uint8)
    np.testing.assert_array_equal(run(model, {"q": q}, optimize=True)[0], run(before, {"q": q})[0])


@pytest.mark.parametrize(
    ("text", "ctx"),
    [(POOL, Context(TARGET)), (POOL.replace("[q2]", "n = Neg (c) [q2]").replace("(c, s", "(n, s"), SLOW)],
    ids=["another target", "no quantizer behind"],
)
def test_other_pools_need_no_guard(text: str, ctx: Context) -> None:
    assert not GuardFloatLayers().run(parse(text), ctx).modified


def test_what_reads_float8_reads_it_behind_a_guard() -> None:
    model = parse(
        """<ir_version: 9, opset_import: ["" : 19]>
        g (float[2,4] x, float[4,2] w) => (float[2,2] y) <float s = {0.05}, float8e4m3fn z = {0}> {
          [a] a = QuantizeLinear (x, s, z)
          [b] b = DequantizeLinear (a, s, z)
          [c] c = QuantizeLinear (w, s, z)
          [d] d = DequantizeLinear (c, s, z)
          [mm] y = MatMul (b, d)
        }"""
    )
    before = model.to_proto()
    feeds = {"x": np.ones((2, 4), np.float32), "w": np.ones((4, 2), np.float32)}
    with pytest.raises(Exception, match="float8"):
        run(before, feeds, optimize=True)
    assert apply(GuardFloatLayers(), model).counts["float8 guarded"] == 2
    np.testing.assert_allclose(run(model, feeds, optimize=True)[0], run(before, feeds)[0])
