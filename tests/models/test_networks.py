"""The networks that benchmarks and tests are made of look like what TensorRT-style QAT exports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import networks
import numpy as np
import onnx
import pytest
from fake_quant import images
from onnx import numpy_helper
from support import run

SMALL: dict[str, Callable[..., onnx.ModelProto]] = {
    "tiny_resnet": networks.tiny_resnet,
    "resnet50": lambda **export: networks.resnet50(width=8, size=32, classes=10, **export),
    "mobilenet_v2": lambda **export: networks.mobilenet_v2(width=0.25, size=32, classes=10, **export),
    "mobilenet_v3": lambda **export: networks.mobilenet_v3(width=0.25, size=32, classes=10, **export),
    "inception_like": lambda **export: networks.inception_like(width=8, modules=2, size=32, classes=10, **export),
    "deep_chain": lambda **export: networks.deep_chain(3, **export),
}


def side(model: onnx.ModelProto) -> int:
    size: int = model.graph.input[0].type.tensor_type.shape.dim[3].dim_value
    return size


def ops(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("name", SMALL)
def test_fake_quant_sits_on_inputs_and_weights_of_conv_and_gemm_only(name: str) -> None:
    model = SMALL[name](fake_quant=True)
    onnx.checker.check_model(model, full_check=True)
    makers = {node.output[0]: node for node in model.graph.node}
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        behind_pair = [makers[x].op_type == "DequantizeLinear" if x in makers else False for x in node.input]
        if node.op_type in ("Conv", "Gemm"):
            assert behind_pair[:2] == [True, True]
            weight = makers[node.input[1]]
            assert weights[weight.input[1]].shape == (weights[makers[weight.input[0]].input[0]].shape[0],)
            assert not weights[weight.input[2]].any()
        elif node.op_type != "DequantizeLinear":
            assert not any(makers[x].op_type == "DequantizeLinear" for x in node.input if x in makers)
    kernels = ops(model)["Conv"] + ops(model)["Gemm"]
    assert ops(model)["QuantizeLinear"] == ops(model)["DequantizeLinear"] == 2 * kernels


@pytest.mark.parametrize("name", SMALL)
def test_twins_compute_nearly_the_same(name: str) -> None:
    twins = {
        (fake, folded): SMALL[name](fake_quant=fake, bn_folded=folded)
        for fake in (False, True)
        for folded in (False, True)
    }
    feeds = {"image": images(4, side(twins[False, False]), seed=7)}
    results = {key: run(model, feeds)[0] for key, model in twins.items()}
    spread = results[False, False].std()
    np.testing.assert_allclose(results[False, True], results[False, False], atol=1e-3 * spread)
    for folded in (False, True):
        step = np.abs(results[True, folded] - results[False, folded]).mean()
        assert 1e-4 * spread < step < 0.5 * spread


def test_one_tensor_has_a_quantizer_per_consumer_unless_shared() -> None:
    own, shared = (networks.tiny_resnet(shared_quantizers=flag) for flag in (False, True))
    assert ops(own)["QuantizeLinear"] - ops(shared)["QuantizeLinear"] == 1


def test_no_activation_saturates_everywhere_or_dies() -> None:
    model = networks.resnet50(width=16, size=64, classes=10, fake_quant=False)
    relus = [node.output[0] for node in model.graph.node if node.op_type == "Relu"]
    for name in relus:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    for value in run(model, {"image": images(2, 64)})[1:]:
        assert 0.1 < (value > 0).mean() < 0.99
        assert value.max() < 100


def test_sizes_the_tests_and_benchmarks_count_on() -> None:
    assert networks.tiny_resnet().ByteSize() < 50_000
    assert 450 < len(networks.deep_chain(33).graph.node) < 550
    assert networks.tiny_resnet(seed=3) == networks.tiny_resnet(seed=3)
    assert networks.tiny_resnet(seed=3) != networks.tiny_resnet(seed=4)
