import numpy as np
import pytest
from support import apply, assert_same_numbers, parse

from qat2int8.ir import UINT8, Model, QuantParams
from qat2int8.passes import Context
from qat2int8.passes.average_pool_to_conv import AveragePoolToConv
from qat2int8.passes.insert_quantize_dequantize import InsertQuantizeDequantize
from qat2int8.pipelines.certificate import certify
from qat2int8.pipelines.target_files import load_target

CONTEXT = Context(load_target("ort-x86"))
GRID = QuantParams.make(0.02, 128, UINT8)


def pool(attributes: str, *, grids: str = "xyw", channels: object = 3) -> Model:
    model = parse(
        f"""
        g (float[N,{channels},8,8] x) => (float[N,{channels},H,W] out) <float w = {{2}}> {{
          [pool] y = AveragePool <{attributes}> (x)
          [scale] out = Mul (y, w)
        }}
        """
    )
    for name in grids:
        model.scales.set(model.values()[name], GRID)
    return model


@pytest.mark.parametrize(
    "attributes",
    [
        "kernel_shape = [2,2], strides = [2,2]",
        "kernel_shape = [3,3], pads = [1,1,1,1], count_include_pad = 1",
        'kernel_shape = [3,2], strides = [1,2], auto_pad = "VALID"',
    ],
)
def test_a_pool_between_two_grids_becomes_a_depthwise_conv(attributes: str) -> None:
    model = pool(attributes)
    before = model.to_proto()
    assert apply(AveragePoolToConv(), model, CONTEXT).counts == {"replaced": 1}
    conv = model.graph[0]
    assert (conv.op_type, conv.name, conv.attributes.get_int("group")) == ("Conv", "pool", 3)
    weight, result = conv.inputs[1], conv.outputs[0]
    assert weight is not None
    assert result.name == "y"
    assert model.scales[result] is GRID
    values = model.constant(weight)
    assert values is not None
    assert (model.scales[weight].quantize(values) == 1).all()
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    assert_same_numbers(before, model, {"x": x})


@pytest.mark.parametrize(
    "model",
    [
        pool("kernel_shape = [3,3], pads = [1,1,1,1]"),
        pool("kernel_shape = [3,3], strides = [2,2], ceil_mode = 1"),
        pool('kernel_shape = [2,2], auto_pad = "SAME_UPPER"'),
        pool("kernel_shape = [2,2]", channels="C"),
        pool("kernel_shape = [2,2]", grids="xw"),
        pool("kernel_shape = [2,2]", grids="yw"),
        pool("kernel_shape = [2,2]", grids="xy"),
    ],
    ids=[
        "padding left out",
        "ceil",
        "same",
        "unknown channels",
        "no output grid",
        "no input grid",
        "no weight on a grid",
    ],
)
def test_other_pools_stay(model: Model) -> None:
    assert not apply(AveragePoolToConv(), model, CONTEXT).modified


def test_it_runs_as_an_integer_convolution() -> None:
    model = pool("kernel_shape = [2,2], strides = [2,2]")
    AveragePoolToConv().run(model, CONTEXT)
    InsertQuantizeDequantize().run(model, CONTEXT)
    executed = certify(model, model.to_proto().SerializeToString()).executed
    assert executed.get("QLinearConv") == 1
    assert "QLinearAveragePool" not in executed
