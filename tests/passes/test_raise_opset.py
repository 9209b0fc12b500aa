from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from support import TARGET, assert_same_numbers

from qat2int8.ir import Model, UnsupportedModel
from qat2int8.passes import Context
from qat2int8.passes.raise_opset import RaiseOpset

OLD = """
<ir_version: 6, opset_import: ["" : {opset}]>
g (float[N,2,4,4] x) => (float[N,2,2,2] y) {{
  r = {clip} (x)
  [pool] y = MaxPool <kernel_shape = [2,2], strides = [2,2]> (r)
}}
"""


def model_of(opset: int, clip: str = "Relu") -> onnx.ModelProto:
    return onnx.parser.parse_model(OLD.format(opset=opset, clip=clip))


@pytest.mark.parametrize(("opset", "clip"), [(10, "Clip <min = 0.0, max = 6.0>"), (11, "Relu"), (12, "Relu")])
def test_an_old_model_reaches_the_targets_opset_and_computes_the_same(opset: int, clip: str) -> None:
    before = model_of(opset, clip)
    model = Model.from_proto(before)
    assert RaiseOpset().run(model, Context(TARGET)).counts == {"opset versions": 13 - opset}
    assert model.opset == 13
    onnx.checker.check_model(model.to_proto(), full_check=True)
    assert not RaiseOpset().run(model, Context(TARGET)).modified
    x = np.random.default_rng(0).normal(size=(2, 2, 4, 4)).astype(np.float32) * 8
    assert_same_numbers(before, model, {"x": x})


@pytest.mark.parametrize("opset", [13, 17])
def test_a_recent_model_is_left_alone(opset: int) -> None:
    model = Model.from_proto(model_of(opset))
    graph = model.ir
    assert not RaiseOpset().run(model, Context(TARGET)).modified
    assert model.ir is graph


def test_an_op_without_a_way_up_is_refused_with_a_remedy() -> None:
    model = Model.from_proto(onnx.parser.parse_model(OLD.format(opset=10, clip="NoSuchOp")))
    with pytest.raises(UnsupportedModel, match=r"opset 10 cannot be raised to 13.*export"):
        RaiseOpset().run(model, Context(TARGET))


SPELLED = """
<ir_version: 8, opset_import: ["" : {opset}]>
g (float[N, 4] x) => (float[N, 4] y) <float c = {{0.5}}> {{
  {body}
  a = MatMul (t, w)
  y = MatMul (a, v)
}}
"""


def spelled(opset: int, body: str) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(SPELLED.format(opset=opset, body=body))
    rng = np.random.default_rng(1)
    for name, shape in (("w", (4, 400)), ("v", (400, 4))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=shape).astype("f"), name))
    return proto


ERF = "e = Erf (x) s = Shape (e) r = Reshape (e, s) t = Mul (r, c)"
NORM = "m = ReduceMean <axes = [-1]> (x) q = Pow (x, c) r = Sqrt (q) t = Add (m, r)"


@pytest.mark.parametrize(
    ("opset", "body", "expected"),
    [
        (17, ERF, 20),
        (21, ERF, 21),
        (13, NORM, 17),
        (17, NORM, 17),
        (13, "h = HardSigmoid (x) t = Mul (h, x)", 14),
        (13, "t = Mul (c, x)", 13),
        (11, ERF, 20),
    ],
)
def test_a_model_that_spells_out_a_function_reaches_the_opset_of_its_op(
    opset: int, body: str, expected: int
) -> None:
    before = spelled(opset, body)
    model = Model.from_proto(before)
    assert RaiseOpset().run(model, Context(TARGET)).counts == {"opset versions": expected - opset}
    assert model.opset == expected
    onnx.checker.check_model(model.to_proto(), full_check=True)
    x = np.random.default_rng(0).uniform(1, 2, (3, 4)).astype(np.float32)
    assert_same_numbers(before, model, {"x": x})


def test_what_is_only_useful_is_not_insisted_on() -> None:
    model = Model.from_proto(spelled(17, "e = Erf (x) t = NoSuchOp (e)"))
    graph = model.ir
    assert not RaiseOpset().run(model, Context(TARGET)).modified
    assert model.ir is graph
    assert all(not isinstance(v.const_value, oir.ExternalTensor) for v in model.graph.initializers.values())


def test_the_target_sets_the_limit() -> None:
    model = Model.from_proto(spelled(13, ERF))
    RaiseOpset().run(model, Context(replace(TARGET, max_opset=18)))
    assert model.opset == 18


def test_a_model_with_functions_keeps_its_opset() -> None:
    proto = spelled(17, "e = Erf (x) t = local.twice (e)")
    proto.opset_import.append(onnx.helper.make_opsetid("local", 1))
    body = [onnx.helper.make_node("Add", ["i", "i"], ["o"])]
    imports = [onnx.helper.make_opsetid("", 17)]
    proto.functions.append(onnx.helper.make_function("local", "twice", ["i"], ["o"], body, imports))
    model = Model.from_proto(proto)
    assert not RaiseOpset().run(model, Context(TARGET)).modified
    assert model.ir.functions
