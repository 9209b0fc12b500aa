"""Time by op type, from onnxruntime's profiler."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from support import parse

from qat2int8.ir.io import save_model
from qat2int8.pipelines.evaluation.profile import profile

TEXT = "g (float[N,64] x) => (float[N,64] y) { a = Exp (x)  b = Exp (a)  y = Tanh (b) }"


def test_op_types_with_nodes_and_shares_the_slowest_first(tmp_path: Path) -> None:
    save_model(parse(TEXT), tmp_path / "model.onnx")
    times = profile(tmp_path / "model.onnx", [{"x": np.ones((8, 64), np.float32)}] * 3)
    assert {time.op_type: time.nodes for time in times} == {"Exp": 2, "Tanh": 1}
    assert [time.milliseconds for time in times] == sorted((time.milliseconds for time in times), reverse=True)
    assert abs(sum(time.percent for time in times) - 100.0) < 1e-6
    assert list(tmp_path.iterdir()) == [tmp_path / "model.onnx"]


def test_one_batch_is_enough(tmp_path: Path) -> None:
    save_model(parse(TEXT), tmp_path / "model.onnx")
    assert profile(tmp_path / "model.onnx", [{"x": np.ones((8, 64), np.float32)}])[0].milliseconds > 0.0
