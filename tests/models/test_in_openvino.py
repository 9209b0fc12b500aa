"""What is converted for OpenVINO, run by OpenVINO itself: every layer in integers, and the numbers of the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import qat2int8
from qat2int8.pipelines.benchmarking.fake_quant import images
from qat2int8.pipelines.sessions import reference_session, run_session

pytest.importorskip("openvino")

import in_openvino

from qat2int8.pipelines.benchmarking import networks

SMALL: dict[str, Callable[..., onnx.ModelProto]] = {
    "tiny_resnet": networks.tiny_resnet,
    "mobilenet_v2": lambda: networks.mobilenet_v2(width=0.25, size=32, classes=10),
    "inception_like": lambda: networks.inception_like(width=8, modules=2, size=32, classes=10),
}


@pytest.mark.parametrize("name", SMALL)
def test_all_layers_run_in_integers_and_compute_what_the_file_says(name: str, tmp_path: Path) -> None:
    conversion = qat2int8.convert(SMALL[name](), target="openvino")
    conversion.save(tmp_path / "model.onnx")
    side = conversion.model.graph.inputs[0].shape[3]  # type: ignore[index]
    feeds = {"image": images(4, int(str(side)), seed=7)}
    seen = in_openvino.see(tmp_path / "model.onnx", [feeds])
    layers = [node for node in conversion.model.nodes() if node.op_type in ("Conv", "Gemm")]
    assert seen.integer == seen.layers == len(layers)
    (expected,) = run_session(reference_session(tmp_path / "model.onnx"), feeds)
    assert in_openvino.decibels([expected], seen.outputs) > 25
    # Most answers are the same but for the order of float additions.
    close = np.isclose(seen.outputs[0], expected, rtol=0.05, atol=0.05 * float(np.abs(expected).max()))
    assert close.mean() > 0.9


def test_float_layers_are_told_from_integer_ones(tmp_path: Path) -> None:
    path = tmp_path / "float.onnx"
    onnx.save(networks.tiny_resnet(fake_quant=False), path)
    seen = in_openvino.see(path, [{"image": images(1, 16, seed=7)}])
    assert seen.integer == 0
    assert seen.layers > 0


def test_a_row_tells_what_was_exported_from_what_was_placed(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(networks.tiny_resnet(), path)
    row = in_openvino.row(path, rounds=1)
    assert len(row) == len(in_openvino.HEAD)
    assert row[0] == "net"
    assert row[1] == row[3]
