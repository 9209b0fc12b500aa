import numpy as np
import onnx
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
