"""Shared by the tests: models in ONNX text, golden comparison of one pass, running a model in onnxruntime."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from qat2int8.ir import Contract, Model, OpRule, QuantParams, Target
from qat2int8.passes import Context, Pass, PassResult
from qat2int8.pipelines.sessions import deployed_session, reference_session
from qat2int8.pipelines.target_files import load_target

Feeds = dict[str, npt.NDArray[Any]]

HEADER = '<ir_version: 8, opset_import: ["" : 17]>'

TARGET = Target(
    name="test",
    description="uint8 activations, int8 weights",
    activation="uint8",
    zero_point="any",
    per_channel_weights=True,
    int32_bias=True,
    min_opset=13,
    max_opset=26,
    max_ir_version=13,
    ops={"Conv": OpRule(Contract.COMPUTE, absorbs=("Relu", "Clip"), weight_axis=0)},
)

X86 = load_target("ort-x86")


def parse(text: str) -> Model:
    """A model from ONNX text; the header is added when the text starts with the graph's name."""
    if not text.lstrip().startswith("<"):
        text = f"{HEADER}\n{text}"
    proto = onnx.parser.parse_model(text)
    onnx.checker.check_model(proto, full_check=True)
    return Model.from_proto(proto)


def graph_text(model: Model) -> str:
    """The graph as ONNX text, with neither header nor value_info, so that goldens show what matters."""
    proto = model.to_proto()
    del proto.graph.value_info[:]
    proto.ClearField("metadata_props")
    text: str = onnx.printer.to_text(proto)
    return text[text.index(">") + 1 :].strip()


def apply(pass_: Pass, model: Model, ctx: Context | None = None) -> PassResult:
    """Run one pass, check that what it leaves is valid and that a second run changes nothing more."""
    ctx = ctx or Context(TARGET)
    names = ([v.name for v in model.graph.inputs], [v.name for v in model.graph.outputs])
    result = pass_.run(model, ctx)
    onnx.checker.check_model(model.to_proto(), full_check=True)
    assert names == ([v.name for v in model.graph.inputs], [v.name for v in model.graph.outputs])
    settled = graph_text(model)
    again = pass_.run(model, ctx)
    assert not again.modified, f"{pass_.name} changed something in its second run: {dict(again.counts)}"
    assert graph_text(model) == settled
    return result


def check_pass(
    pass_: Pass,
    before: str,
    after: str,
    *,
    scales: dict[str, QuantParams] | None = None,
    ctx: Context | None = None,
) -> tuple[Model, PassResult]:
    """Golden test: ``pass_`` turns ``before`` into ``after`` (ONNX text, any layout)."""
    model = parse(before)
    for name, params in (scales or {}).items():
        model.scales.set(model.values()[name], params)
    result = apply(pass_, model, ctx)
    expected = graph_text(parse(after))
    actual = graph_text(model)
    diff = "\n".join(
        difflib.unified_diff(expected.splitlines(), actual.splitlines(), "expected", "actual", lineterm="")
    )
    assert not diff, f"{pass_.name}:\n{diff}"
    return model, result


def run(model: Model | onnx.ModelProto, feeds: Feeds, *, optimize: bool = False) -> list[Any]:
    """The model's outputs in onnxruntime: node by node, or optimised as on a processor with VNNI."""
    proto = model.to_proto() if isinstance(model, Model) else model
    content = proto.SerializeToString()
    session = deployed_session(X86, content, threads=1) if optimize else reference_session(content, threads=1)
    outputs: list[Any] = session.run(None, feeds)
    return outputs


def assert_same_numbers(
    before: onnx.ModelProto,
    after: Model,
    feeds: Feeds,
    *,
    rtol: float = 1e-4,
    atol: float = 1e-5,
) -> None:
    """Both models compute the same, up to float rounding."""
    for expected, actual in zip(run(before, feeds), run(after, feeds), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def named(values: Sequence[Any]) -> list[str]:
    """Names of values or nodes."""
    return [value.name for value in values]


REPOSITORY = Path(__file__).resolve().parent.parent
