"""Post-training quantization end to end: in integers and close to the float model, or a clear refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from float_networks import Array, convolutions, images
from support import REPOSITORY, X86, parse

from qat2int8.ir import Code, DataError, Provenance, UnsupportedModel
from qat2int8.pipelines.calibration import ALGORITHMS, calibrate
from qat2int8.pipelines.calibration.steps import with_calibration
from qat2int8.pipelines.convert import Conversion, convert
from qat2int8.pipelines.quantize import quantize
from qat2int8.pipelines.sessions import deployed_session, run_session
from qat2int8.pipelines.shipped import load_pipeline
from qat2int8.pipelines.spec import flatten
from qat2int8.pipelines.tables import CalibrationTable, Entry

QAT_MODEL = REPOSITORY / "tools" / "demo_data" / "resnet_trt_qat.onnx"
DATA = {"image": images(64)}


def logits(model: onnx.ModelProto | Conversion, data: Array) -> Array:
    proto = model.model.to_proto() if isinstance(model, Conversion) else model
    return run_session(deployed_session(X86, proto.SerializeToString()), {"image": data})[0]


def operators(conversion: Conversion) -> list[str]:
    return [record.op_type for record in conversion.certificate.float_compute]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_result_is_integer_and_close_to_the_float_model(algorithm: str) -> None:
    source = convolutions()
    conversion = quantize(source, DATA, calibrator=algorithm)
    assert operators(conversion) == []
    fresh = images(32, seed=9)
    expected, actual = logits(source, fresh), logits(conversion, fresh)
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error < (0.3 if algorithm in ("avg", "moving-average") else 0.05)
    calibrated = [p for _, p in conversion.model.scales.items() if p.source is Provenance.CALIBRATED]
    assert calibrated
    assert all(params.origin == f"{algorithm} over 64 samples of arrays in memory" for params in calibrated)


def test_data_in_memory_and_a_table_give_the_same_model() -> None:
    from_data = quantize(convolutions(), DATA)
    table = calibrate(convolutions(), DATA)
    assert from_data.calibration == table
    from_table = quantize(convolutions(), table=table)
    assert from_table.calibration is table
    np.testing.assert_array_equal(logits(from_data, images(8)), logits(from_table, images(8)))


def test_fidelity_is_measured_on_the_data() -> None:
    fidelity = quantize(convolutions(), DATA).fidelity
    assert fidelity.data == "arrays in memory"
    assert fidelity.sqnr_db > 25.0
    # What can be gone through once only is gone; then inputs are made up.
    assert quantize(convolutions(), iter([DATA])).fidelity.data == "synthetic"


def test_weights_per_tensor_or_per_channel() -> None:
    def ranks(conversion: Conversion) -> set[int]:
        """Shapes of the steps of constants: weights and biases."""
        constant = conversion.model.constant
        nodes = [n for n in conversion.model.nodes("DequantizeLinear") if constant(n.inputs[0]) is not None]
        return {step.ndim for node in nodes if (step := constant(node.inputs[1])) is not None}

    assert ranks(quantize(convolutions(), DATA)) == {1}
    assert ranks(quantize(convolutions(), DATA, per_channel=False)) == {0}


def zero_points(conversion: Conversion) -> set[int]:
    """Of quantized activations that can be negative."""
    return {
        int(zero)
        for node in conversion.model.nodes("QuantizeLinear")
        if (zero := conversion.model.constant(node.inputs[2])) is not None and int(zero) != 0
    }


def test_activations_can_be_symmetric() -> None:
    skewed = {"image": images(16) + 1.0}
    assert zero_points(quantize(convolutions(), skewed, symmetric=True)) == {128}
    assert zero_points(quantize(convolutions(), skewed)) != {128}


def test_the_first_layer_can_stay_in_float() -> None:
    conversion = quantize(convolutions(), DATA, skip_first_conv=True)
    assert [record.node for record in conversion.certificate.float_compute] == ["conv1"]


def test_nodes_and_ops_can_be_chosen() -> None:
    assert operators(quantize(convolutions(), DATA, quantize_ops=["Conv"])) == ["Gemm"]
    assert operators(quantize(convolutions(), DATA, skip_nodes=["gemm"])) == ["Gemm"]


def test_neither_or_both_sources_are_refused() -> None:
    with pytest.raises(DataError, match="neither data nor a table"):
        quantize(convolutions())
    with pytest.raises(DataError, match="both data and a table"):
        quantize(convolutions(), DATA, table=CalibrationTable("", 0, ""))


def test_a_table_of_another_model_is_refused() -> None:
    table = calibrate(convolutions(seed=3), DATA)
    with pytest.raises(DataError, match="made for another model"):
        quantize(convolutions(), table=table)
    with pytest.raises(DataError, match="has none of the 5 tensors that need a range, such as 'image'"):
        quantize(convolutions(), table=CalibrationTable("", 0, "", {"else": Entry(0.0, 1.0, 1.0)}))


def test_a_table_with_a_gap_leaves_its_layer_in_float_and_says_so() -> None:
    known = calibrate(convolutions(), DATA).entries
    kept = {name: entry for name, entry in known.items() if name != "image"}
    conversion = quantize(convolutions(), table=CalibrationTable("entropy", 64, "", kept))
    assert [record.node for record in conversion.certificate.float_compute] == ["conv1"]
    assert any(f.code is Code.SCALE_MISSING and f.value == "image" for f in conversion.diagnostics)


def test_a_table_of_magnitudes_is_enough() -> None:
    known = calibrate(convolutions(), DATA).entries
    table = CalibrationTable("", 0, "", {name: Entry.symmetric(entry.amax) for name, entry in known.items()})
    conversion = quantize(convolutions(), table=table)
    assert operators(conversion) == []
    expected = logits(convolutions(), images(8))
    assert np.abs(logits(conversion, images(8)) - expected).max() < 0.05 * np.abs(expected).max()


def test_models_that_are_quantized_or_hold_no_layer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"has fake quantization.*use convert"):
        quantize(QAT_MODEL, {"image": np.zeros((1, 1, 28, 28), np.float32)})
    done = tmp_path / "int8.onnx"
    quantize(convolutions(), DATA).save(done)
    with pytest.raises(UnsupportedModel, match="has been converted to INT8 already"):
        quantize(done, DATA)
    with pytest.raises(UnsupportedModel, match="nothing that ort-x86 computes in integers"):
        quantize(parse("g (float[N,2] x) => (float[N,2] y) { y = Neg (x) }").to_proto(), {"x": np.zeros((1, 2))})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"image": images(2)[:, :, :4]}, "shape"),
        ({"image": (images(2) * 50).astype(np.int32)}, "int32"),
        ({"image": np.where(images(2) > 3.0, np.nan, images(2)) * np.float32(np.nan)}, "holds nan"),
        ({"image": images(0)}, "no samples"),
    ],
)
def test_bad_data_are_refused_without_naming_a_pass(data: dict[str, Array], message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        quantize(convolutions(), data)
    assert "gather-calibrated-scales" not in str(refused.value)


def test_a_sample_that_overflows_inside_is_named() -> None:
    data = images(4)
    data[2] *= 1e38
    with pytest.raises(DataError, match="sample 2, tensor 'relu1'"):
        quantize(convolutions(), {"image": data})


# -- completing a model with fake quant -----------------------------------------------------------------------


def half_trained() -> onnx.ModelProto:
    """The first layer has fake quant on what it reads, the second none at all."""
    return parse(
        """
        g (float[N,2,4,4] x) => (float[N,3] y)
        <float s = {0.05}, int8 z = {0}, float[2,2,1,1] w1 = {0.5, -0.25, 1, 0.75},
         float[2,2,1,1] w2 = {1, 0.5, -0.5, 2}, float[2,3] w3 = {1, 2, -1, 0.5, -2, 1}>
        {
          q = QuantizeLinear (x, s, z)
          d = DequantizeLinear (q, s, z)
          [one] c1 = Conv (d, w1)
          r = Relu (c1)
          [two] c2 = Conv (r, w2)
          m = GlobalAveragePool (c2)
          f = Flatten (m)
          [three] y = Gemm (f, w3)
        }
        """
    ).to_proto()


def test_data_complete_what_training_left_open() -> None:
    data = {"x": np.random.default_rng(0).normal(size=(32, 2, 4, 4)).astype(np.float32)}
    without = convert(half_trained())
    assert sorted(record.node for record in without.certificate.float_compute) == ["one", "three", "two"]
    completed = convert(half_trained(), data=data, calibrator="minmax")
    assert operators(completed) == []
    assert not [f for f in completed.diagnostics if f.code is Code.SCALE_MISSING]
    assert completed.calibration is not None
    assert list(completed.calibration.entries) == ["r", "c2", "m"]
    fresh = np.random.default_rng(1).normal(size=(16, 2, 4, 4)).astype(np.float32)
    (fidelity,) = completed.fidelity_on([{"x": fresh}]).outputs
    assert fidelity.sqnr_db > 25.0


def test_a_model_that_lacks_nothing_is_not_run() -> None:
    data = {"image": np.zeros((1, 1, 28, 28), np.float32)}
    completed = convert(QAT_MODEL, data=data, verify="none")
    assert completed.calibration is not None
    assert not completed.calibration.entries


def test_calibration_stands_behind_everything_that_needs_no_data() -> None:
    names = [one.name for one in flatten(with_calibration(load_pipeline("qat-to-int8")).passes)]
    at = names.index("gather-calibrated-scales")
    assert names.index("complete-scales") < at
    assert names[at + 1 :].count("complete-scales") == 1
    spec = load_pipeline("post-training")
    assert with_calibration(spec) is spec


def test_post_training_has_the_passes_of_qat_to_int8() -> None:
    reading = {
        *("read-primitive-fake-quant", "raise-qoperators", "read-qonnx-quant", "read-openvino-fake-quantize"),
        *("float-data-movement", "gather-weight-scales", "gather-output-scales", "gather-input-scales"),
        *("remove-fake-quant", "dequantize-weights", "recover-weight-grids", "centre-weights"),
        "quantize-embeddings",
        *("narrow-wide-grids", "read-paddle-fake-quant", "fold-channel-steps", "keep-first-grids"),
        "release-weights",
    }
    """What is of no use without fake quant."""
    trained = {one.name for one in flatten(load_pipeline("qat-to-int8").passes)}
    calibrated = {one.name for one in flatten(load_pipeline("post-training").passes)}
    assert calibrated - trained == {"gather-calibrated-scales"}
    assert trained - calibrated == reading
