"""The sum in front of a LayerNormalization is spelt so that no runtime fuses it."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from support import apply, assert_same_numbers, check_pass, parse

from qat2int8.passes.add_to_sum import AddToSum

TEXT = (
    "g (float[2, 4] a, float[2, 4] b) => (float[2, 4] y{extra}) <float[4] gamma = {{1, 2, 3, 4}}, float[4] beta ="
    " {{0, 0, 0, 0}}> {{ [add] s = {op} (a, b) {middle}"
    " [norm] y = LayerNormalization <axis = -1> ({source}, gamma, beta) }}"
)


def text(op: str, middle: str = "", source: str = "s", extra: str = "") -> str:
    return TEXT.format(op=op, middle=middle, source=source, extra=extra)


@pytest.mark.parametrize("extra", ["", ", float[2, 4] s"])
def test_add_becomes_sum(extra: str) -> None:
    model, _ = check_pass(AddToSum(), text("Add", extra=extra), text("Sum", extra=extra))
    feeds = {name: np.random.default_rng(i).normal(size=(2, 4)).astype(np.float32) for i, name in enumerate("ab")}
    assert_same_numbers(parse(text("Add", extra=extra)).to_proto(), model, feeds, rtol=0, atol=0)


def test_other_sums_are_left_alone() -> None:
    assert not apply(AddToSum(), parse(text("Add", "t = Relu (s)", "t"))).modified
    assert not apply(AddToSum(), parse(text("Mul"))).modified


def test_onnxruntime_fuses_the_add_and_not_the_sum(tmp_path: object) -> None:
    """Where this fails the runtime has changed, and the pass may have lost its reason."""
    for op, fused in (("Add", True), ("Sum", False)):
        options = ort.SessionOptions()
        options.optimized_model_filepath = f"{tmp_path}/{op}.onnx"
        options.log_severity_level = 3
        model = parse(text(op).replace("[2, 4]", "[1, 2, 4]"))
        ort.InferenceSession(model.to_proto().SerializeToString(), options, providers=["CPUExecutionProvider"])
        ops = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
        assert ("SkipLayerNormalization" in ops) is fused
