"""The networks that benchmarks and tests are made of look like what TensorRT-style QAT exports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from onnx import numpy_helper
from support import run

import qat2int8
from qat2int8 import Conversion, Model
from qat2int8.ir.verify import VerifyLevel
from qat2int8.passes import Context
from qat2int8.pipelines.benchmarking import networks
from qat2int8.pipelines.benchmarking.fake_quant import images
from qat2int8.pipelines.manager import run_pipeline
from qat2int8.pipelines.spec import PipelineSpec

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


# -- converted --------------------------------------------------------------------------------------------------

ROUNDING = 3.0
"""Decibels; see :func:`noise_floor`."""
CLOSE = 35.0
"""Decibels; the steps of tensors that QAT did not observe are in it."""


def decibels(reference: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(np.square(reference).sum() / np.square(other - reference).sum()))


def noise_floor(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> float:
    """How far the outputs of ``model`` itself move when its inputs move by a fraction of their quantizer's step.

    Random networks are chaotic: one activation that rounds the other way changes the next layers' roundings. No
    conversion that rounds anywhere can be closer than this.
    """
    quantizer = next(node for node in model.graph.node if node.input[:1] == ["image"])
    step = next(float(numpy_helper.to_array(t)) for t in model.graph.initializer if t.name == quantizer.input[1])
    noise = np.random.default_rng(0).standard_normal(feeds["image"].shape)
    reference = run(model, feeds)[0]
    return min(
        decibels(reference, run(model, {"image": (feeds["image"] + part * step * noise).astype(np.float32)})[0])
        for part in (0.05, 0.25)
    )


def stays_float(node: oir.Node, model: Model) -> bool:
    """Whether ``node`` neither computes on integers nor stands between Dequantize and Quantize."""
    data = [value for value in node.inputs if value is not None and model.constant(value) is None]
    if all(value.dtype in (oir.DataType.INT8, oir.DataType.UINT8) for value in data):
        return False
    makers = [value.producer() for value in data]
    dequantized = all(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)
    readers = {use.node.op_type for use in node.outputs[0].uses()}
    quantized = readers == {"QuantizeLinear"} and not node.outputs[0].is_graph_output()
    return not (dequantized and (quantized or node.op_type in ("Gemm", "MatMul")))


@pytest.fixture(scope="module", params=SMALL)
def exports(request: pytest.FixtureRequest) -> dict[str, tuple[onnx.ModelProto, Conversion]]:
    """One network as three exporters write it, with what became of each."""
    write = SMALL[request.param]
    models = {
        "plain": write(),
        "shared quantizers": write(shared_quantizers=True),
        "folded": write(bn_folded=True),
    }
    return {name: (model, qat2int8.convert(model)) for name, model in models.items()}


def test_with_batch_norm_statistics_everything_that_multiplies_is_integer(
    exports: dict[str, tuple[onnx.ModelProto, Conversion]],
) -> None:
    for name in ("plain", "shared quantizers"):
        conversion = exports[name][1]
        assert conversion.certificate.float_compute == ()
        assert not {"Conv", "FusedConv", "Gemm", "MatMul"} & set(conversion.certificate.executed)
        assert "BatchNormalization" not in conversion.after


def test_shared_quantizers_change_nothing(exports: dict[str, tuple[onnx.ModelProto, Conversion]]) -> None:
    (plain, one), (_, other) = exports["plain"], exports["shared quantizers"]
    feeds = {"image": images(4, side(plain), seed=7)}
    assert one.after == other.after
    np.testing.assert_array_equal(run(one.model, feeds)[0], run(other.model, feeds)[0])


def test_converted_numbers_are_as_close_as_rounding_allows(
    exports: dict[str, tuple[onnx.ModelProto, Conversion]],
) -> None:
    for model, conversion in exports.values():
        feeds = {"image": images(16, side(model), seed=7)}
        reference = run(model, feeds)[0]
        enough = min(noise_floor(model, feeds) - ROUNDING, CLOSE)
        assert decibels(reference, run(conversion.model, feeds)[0]) > enough
        assert conversion.fidelity_on([feeds]).sqnr_db > enough


def test_trained_weights_are_the_integers_of_the_result(
    exports: dict[str, tuple[onnx.ModelProto, Conversion]],
) -> None:
    """Folding BatchNormalization moves a channel's scale and sign, never its integers."""
    for model, conversion in exports.values():
        arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        trained = set()
        for node in model.graph.node:
            if node.op_type == "QuantizeLinear" and node.input[0] in arrays:
                weight, scale = (arrays[name].reshape(len(arrays[name]), -1) for name in node.input[:2])
                trained |= {_magnitudes(row) for row in np.rint(weight / scale).clip(-127, 127)}
        found = 0
        for node in conversion.model.nodes("Conv"):
            maker = node.inputs[1].producer() if node.inputs[1] is not None else None
            if maker is None or maker.op_type != "DequantizeLinear":
                continue
            integers = conversion.model.constant(maker.inputs[0])
            assert integers is not None
            found += len(integers)
            strangers = [row for row in integers.reshape(len(integers), -1) if _magnitudes(row) not in trained]
            # pad-channels adds filters of zeros, up to a multiple of 16.
            assert len(strangers) < 16, node.name
            assert not np.any(strangers), node.name
        assert found


def _magnitudes(row: np.ndarray) -> bytes:
    """The integers of one filter without signs, order and zeros: stems get zeros and another layout for speed."""
    levels = np.sort(np.abs(row.astype(np.int16)))
    return levels[levels > 0].tobytes()


def test_operators_on_integers_are_executed_alike(
    exports: dict[str, tuple[onnx.ModelProto, Conversion]],
) -> None:
    """The other format holds what the runtime makes of this one, and can be read back."""
    for model, conversion in exports.values():
        feeds = {"image": images(4, side(model), seed=7)}
        expected = run(conversion.model, feeds, optimize=True)[0]
        other = qat2int8.convert(model, format="qoperator")
        assert other.certificate.executed == conversion.certificate.executed
        assert other.certificate.macs == conversion.certificate.macs > 0
        assert other.certificate.integer_macs_percent == conversion.certificate.integer_macs_percent
        records = zip(other.certificate.compute, conversion.certificate.compute, strict=True)
        assert all(left.node == right.node and left.integer == right.integer for left, right in records)
        np.testing.assert_array_equal(run(other.model, feeds, optimize=True)[0], expected)
        spec = PipelineSpec.parse("canonicalize,raise-qoperators")
        run_pipeline(other.model, spec, Context(other.target), verify=VerifyLevel.NONE)
        assert not any(node.domain or node.op_type.startswith("QLinear") for node in other.model.graph)
        np.testing.assert_array_equal(run(other.model, feeds, optimize=True)[0], expected)


def test_every_op_that_could_be_integer_and_is_not_has_a_reason(
    exports: dict[str, tuple[onnx.ModelProto, Conversion]],
) -> None:
    for _, conversion in exports.values():
        told = {finding.node: finding for finding in conversion.diagnostics}
        for node in conversion.model.nodes():
            if node.op_type in conversion.target.ops and stays_float(node, conversion.model):
                assert node.name in told, node.name
                assert told[node.name].reason
        for record in conversion.certificate.float_compute:
            assert told[record.node].remedy


@pytest.mark.parametrize("position", range(6))
def test_a_layer_left_out_on_purpose_runs_in_float(position: int) -> None:
    proto = networks.tiny_resnet(fake_quant=True)
    name = [node.name for node in proto.graph.node if node.op_type == "Conv"][position]
    certificate = qat2int8.convert(proto, skip_nodes=[name]).certificate
    assert [record.node for record in certificate.float_compute] == [name]


def test_on_arm_the_same_numbers_run_on_int8_kernels(
    exports: dict[str, tuple[onnx.ModelProto, Conversion]],
) -> None:
    for model, on_x86 in exports.values():
        on_arm = qat2int8.convert(model, target="ort-arm")
        integer = [[(r.node, r.integer) for r in each.certificate.compute] for each in (on_arm, on_x86)]
        assert integer[0] == integer[1]
        stored = {v.dtype for node in on_arm.model.nodes("QuantizeLinear") for v in node.outputs}
        assert stored == {oir.DataType.INT8}
        feeds = {"image": images(4, side(model), seed=7)}
        np.testing.assert_array_equal(run(on_arm.model, feeds)[0], run(on_x86.model, feeds)[0])


@pytest.mark.parametrize("target", ["tensorrt", "openvino"])
def test_quantizers_on_the_inputs_of_layers_only_are_what_was_trained(
    target: str, exports: dict[str, tuple[onnx.ModelProto, Conversion]]
) -> None:
    for name, (model, _) in exports.items():
        conversion = qat2int8.convert(model, target=target)
        certificate = conversion.certificate
        assert certificate.basis == "placement"
        assert certificate.integer_macs_percent == 100.0
        # Where BatchNormalization was folded before, nothing bounds what a shortcut computes.
        unbounded = "the residual input is not quantized, so the layer ends in float"
        reasons = {finding.reason for finding in certificate.broken_rules}
        assert reasons <= ({unbounded} if name == "folded" else set())
        feeds = {"image": images(4, side(model), seed=7)}
        reference = run(model, feeds)[0]
        enough = min(noise_floor(model, feeds) - ROUNDING, CLOSE)
        assert decibels(reference, run(conversion.model, feeds)[0]) > enough
        # Optimisation off, the file computes what fidelity measures.
        noise = np.abs(reference - run(conversion.model, feeds)[0]).max()
        assert conversion.fidelity_on([feeds]).outputs[0].max_error == pytest.approx(float(noise))
