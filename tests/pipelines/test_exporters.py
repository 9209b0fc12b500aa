import numpy as np
import pytest
from support import parse

from qat2int8.ir import Model
from qat2int8.pipelines.exporters import exporter_of

HEADER = """<ir_version: 8, opset_import: ["" : 17, "qonnx.custom_op.general" : 1, "org.openvinotoolkit" : 1,
 "paddle" : 1, "my" : 1]{producer}>"""


def model_of(op: str = "Relu (x)", producer: str = "", name: str = "n") -> Model:
    named = f', producer_name: "{producer}"' if producer else ""
    model = parse(f"{HEADER.format(producer=named)} g (float[2] x, float s) => (float[2] y) {{ y = {op} }}")
    model.graph[0].name = name
    return model


@pytest.mark.parametrize(
    ("model", "exporter"),
    [
        (model_of("qonnx.custom_op.general.Quant (x, s, s, s)", "pytorch"), "Brevitas"),
        (model_of(name="/c/act_quant/export_handler/Relu", producer="pytorch"), "Brevitas"),
        (model_of("org.openvinotoolkit.FakeQuantize (x, s, s, s, s)", "pytorch"), "NNCF"),
        (model_of("org.openvinotoolkit.Swish (x)"), ""),
        (model_of(name="/c/input_quantizer/Relu", producer="pytorch"), "NVIDIA Model Optimizer"),
        (model_of("paddle.fake_quantize_dequantize_moving_average_abs_max (x, s)"), "PaddlePaddle"),
        (model_of("paddle.hard_swish (x)"), ""),
        (model_of(name="/activation_post_process_0/Relu", producer="pytorch"), "PyTorch torch.ao"),
        (model_of(name="node_fake_quantize_per_tensor_affine", producer="pytorch"), "PyTorch torch.ao"),
        (model_of(name="node_quantize_per_tensor", producer="pytorch"), "PyTorch PT2E"),
        (model_of(producer="pytorch"), "PyTorch"),
        (model_of(producer="tf2onnx"), "TensorFlow"),
        (model_of(producer="onnx.quantize"), "onnxruntime quantize_static"),
        (model_of(producer="quark.onnx"), "AMD Quark"),
        (model_of(), ""),
    ],
)
def test_what_a_file_shows_of_its_exporter(model: Model, exporter: str) -> None:
    assert exporter_of(model) == exporter


def test_names_of_tensors_count_as_well() -> None:
    model = model_of()
    model.add_initializer("__nncf_hooks.post_hooks.x__0.0.scale", np.zeros(1, np.float32))
    assert exporter_of(model) == "NNCF"
