"""Weights that share a zero point get one each, and the runtime's exact mode loads what is converted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from support import REPOSITORY, check_pass

from qat2int8.passes.own_zero_points import OwnZeroPoints
from qat2int8.pipelines.convert import convert
from qat2int8.pipelines.sessions import reference_session, run_session

SOURCE = REPOSITORY / "tools" / "demo_data" / "resnet_trt_qat.onnx"
TWO = (
    "g (float[1, 2] x) => (float[1, 2] y) <float s = {{0.5}}, uint8 z = {{128}}, float t = {{0.25}},"
    " int8 n = {{0}}, int8[2, 2] w = {{1, 2, 3, 4}}, int8[2, 2] v = {{4, 3, 2, 1}}{own}>"
    " {{ xq = QuantizeLinear (x, s, z) xd = DequantizeLinear (xq, s, z) wd = DequantizeLinear (w, t, n)"
    " m = MatMul (xd, wd) mq = QuantizeLinear (m, s, z) md = DequantizeLinear (mq, s, z)"
    " vd = DequantizeLinear (v, t, {second}) y = MatMul (md, vd) }}"
)


def test_the_second_layer_gets_its_own() -> None:
    shared = TWO.format(own="", second="n")
    parts = TWO.format(own=", int8 n_1 = {0}", second="n_1")
    _, result = check_pass(OwnZeroPoints(), shared, parts)
    assert result.counts == {"copied": 1}


def test_a_dequantize_that_layers_share_keeps_its_one() -> None:
    text = (
        TWO.format(own="", second="n").replace(" vd = DequantizeLinear (v, t, n)", "").replace("md, vd", "md, wd")
    )
    check_pass(OwnZeroPoints(), text, text)


@pytest.mark.parametrize("format_", ["qdq", "qoperator"])
@pytest.mark.parametrize("target", ["ort-x86", "ort-x86-avx2"])
def test_the_exact_mode_of_the_runtime_loads_the_result(target: str, format_: str, tmp_path: Path) -> None:
    path = tmp_path / "int8.onnx"
    convert(SOURCE, target=target, format=format_).save(path)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    running = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {"image": np.random.default_rng(0).uniform(0, 1, (2, 1, 28, 28)).astype(np.float32)}
    expected = run_session(reference_session(SOURCE), feeds)[0]
    np.testing.assert_allclose(running.run(None, feeds)[0], expected, atol=0.1 * np.abs(expected).max())
    model = onnx.load(path)
    assert any(tensor.data_type == onnx.TensorProto.INT8 for tensor in model.graph.initializer)
