"""Layer by layer comparison: planted errors are found, forms and readings of names, what goes wrong is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support import parse

from qat2int8 import convert
from qat2int8.ir import DataError
from qat2int8.ir.io import load_model, save_model
from qat2int8.pipelines.benchmarking import networks
from qat2int8.pipelines.benchmarking.sketch import INPUT
from qat2int8.pipelines.certificate import certify
from qat2int8.pipelines.convert import TENSORS_KEY
from qat2int8.pipelines.data import Batch
from qat2int8.pipelines.evaluation.compare import Comparison, LayerComparison, compare_layers
from qat2int8.pipelines.evaluation.layer_match import match_layers
from qat2int8.pipelines.evaluation.read_reference import ReadReference
from qat2int8.pipelines.evaluation.skip_trials import try_skips
from qat2int8.pipelines.instrument import Instrumented

FLOAT = """g (float[N,4] x) => (float[N,4] y) <
    float[4,4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}, float two = {2}> {
    [m] a = MatMul (x, w)  [r] b = Relu (a)  [d] c = Mul (b, two)  [n] y = MatMul (c, w) }"""


def batches(count: int, size: int = 2, seed: int = 0) -> list[Batch]:
    rng = np.random.default_rng(seed)
    images = rng.normal(0.0, 1.0, (count, size, 3, 8, 8)).astype(np.float32)
    return [Batch({INPUT: images[index]}, None, index * size) for index in range(count)]


def rows(*values: list[float]) -> list[Batch]:
    return [Batch({"x": np.asarray([value], np.float32)}, None, index) for index, value in enumerate(values)]


def write(folder: Path, name: str, model: str | onnx.ModelProto) -> Path:
    path = folder / f"{name}.onnx"
    if isinstance(model, str):
        save_model(parse(model), path)
    else:
        onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """Sixteen residual blocks: 33 convolutions, 16 sums, a pool and a Gemm; and both forms of the result."""
    folder = tmp_path_factory.mktemp("deep")
    source = write(folder, "source", networks.deep_chain(16))
    forms = {}
    for form in ("qdq", "qoperator"):
        forms[form] = folder / f"{form}.onnx"
        convert(source, format=form, verify="none").save(forms[form])
    return source, forms


def doubled(result: Path, layer: str, folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """The model with another scale for the weight of ``layer``."""
    proto = onnx.load(result)
    (node,) = (node for node in proto.graph.node if node.name == layer)
    reader, place = node, 4
    if node.op_type == "Conv":
        (reader,) = (other for other in proto.graph.node if node.input[1] in other.output)
        place = 1
    replace_parameter(proto, reader, place, change)
    return write(folder, "planted", proto)


def replace_parameter(
    proto: onnx.ModelProto, node: onnx.NodeProto, place: int, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    (old,) = (one for one in proto.graph.initializer if one.name == node.input[place])
    proto.graph.initializer.append(numpy_helper.from_array(change(numpy_helper.to_array(old)), "planted"))
    node.input[place] = "planted"


def convolutions(path: Path) -> list[str]:
    return [node.name for node in onnx.load(path).graph.node if node.op_type in ("Conv", "QLinearConv")]


def matched(source: Path, candidate: Path) -> list[tuple[str, str]]:
    found = match_layers(ReadReference.open(source), load_model(candidate))
    return [(layer.name, layer.reference) for layer in found.layers]


def by_name(found: Comparison) -> dict[str, LayerComparison]:
    return {layer.name: layer for layer in found.layers}


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
@pytest.mark.parametrize("position", [1, 17])
def test_one_doubled_weight_scale_is_the_worst_of_fifty(
    deep: tuple[Path, dict[str, Path]], tmp_path: Path, form: str, position: int
) -> None:
    source, forms = deep
    layer = convolutions(forms[form])[position]
    planted = doubled(forms[form], layer, tmp_path, lambda scale: scale * np.float32(2.0))
    found = compare_layers(source, planted, batches(2))
    assert len(found.layers) == found.total >= 50
    worst, second, *_ = found.worst_first()
    assert worst.name == layer
    assert worst.errors("local").sqnr_db < second.errors("local").sqnr_db - 6.0
    # What stands behind it is poisoned when each model computes from its own input.
    behind = [one.name for one in found.layers].index(layer)
    assert all(one.end_to_end.sqnr_db < 20.0 for one in found.layers[behind : behind + 3])


def test_a_planted_zero_point_is_found(deep: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    source, forms = deep
    proto = onnx.load(forms["qoperator"])
    layer = convolutions(forms["qoperator"])[9]
    (node,) = (node for node in proto.graph.node if node.name == layer)
    replace_parameter(proto, node, 2, lambda zero: (zero + 9).astype(zero.dtype))
    found = compare_layers(source, write(tmp_path, "planted", proto), batches(2))
    assert found.worst_first()[0].name == layer


def test_a_sound_conversion_is_off_by_ties_only_where_training_had_a_grid(
    deep: tuple[Path, dict[str, Path]],
) -> None:
    source, forms = deep
    found = compare_layers(source, forms["qdq"], batches(2))
    first = found.layers[0].errors("local")
    assert found.layers[0].op_type == "Conv"
    assert sum(first.off_by) == first.off_by[0] == 2 * 2 * 4 * 8 * 8
    # Beside the floats in front of the fake quant it would be 40 dB, half a step everywhere.
    assert first.sqnr_db > 50.0
    assert all(layer.errors("local").sqnr_db > 20.0 for layer in found.layers)
    assert all(layer.errors("local").off_by[3] == 0 for layer in found.layers if layer.integer)


def test_both_forms_give_the_same_figures(deep: tuple[Path, dict[str, Path]]) -> None:
    source, forms = deep
    one, other = (by_name(compare_layers(source, forms[form], batches(1))) for form in ("qdq", "qoperator"))
    assert list(one) == list(other)
    for name, layer in one.items():
        assert layer.reference == other[name].reference
        assert layer.op_type == other[name].op_type
        if layer.integer:
            assert layer.local == other[name].local
            assert layer.end_to_end == other[name].end_to_end


def test_batches_add_up(deep: tuple[Path, dict[str, Path]]) -> None:
    source, forms = deep
    parts = batches(3)
    whole = Batch({INPUT: np.concatenate([part.inputs[INPUT] for part in parts])}, None, 0)
    split, joined = (compare_layers(source, forms["qdq"], data) for data in (parts, [whole]))
    assert split.samples == joined.samples == 6
    for left, right in zip(split.layers, joined.layers, strict=True):
        for view in ("local", "end-to-end"):
            one, other = left.errors(view), right.errors(view)
            assert one.off_by == other.off_by
            figures = [(each.sqnr_db, each.cosine, each.max_error, each.mean_error) for each in (one, other)]
            np.testing.assert_allclose(*figures, rtol=1e-4)


@pytest.mark.parametrize("form", ["source", "qdq", "qoperator"])
def test_a_model_is_equal_to_itself(deep: tuple[Path, dict[str, Path]], form: str) -> None:
    source, forms = deep
    path = forms.get(form, source)
    found = compare_layers(path, path, batches(1), as_written=True)
    assert not found.alone
    assert found.has_local
    for layer in found.layers:
        for view in ("local", "end-to-end"):
            errors = layer.errors(view)
            assert (errors.sqnr_db, errors.max_error, errors.not_finite) == (math.inf, 0.0, 0)
            assert errors.cosine == pytest.approx(1.0)
            assert not any(errors.off_by[1:])


def test_what_is_measured_are_the_integer_kernels(deep: tuple[Path, dict[str, Path]]) -> None:
    source, forms = deep
    for path in forms.values():
        model = load_model(path)
        layers = match_layers(ReadReference.open(source), model).layers
        shown = Instrumented(path, [layer.tensor for layer in layers])
        deployed = certify(model, path)
        assert deployed.integer_nodes > 50
        for content in (shown.content, shown.fed({layer.tensor: int(layer.dtype) for layer in layers})):
            measured = certify(model, content)
            assert measured.integer_nodes == deployed.integer_nodes
            assert measured.float_nodes == deployed.float_nodes


def test_without_the_record_names_do(deep: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    source, forms = deep
    proto = onnx.load(forms["qdq"])
    assert any(entry.key == TENSORS_KEY for entry in proto.metadata_props)
    del proto.metadata_props[:]
    assert matched(source, forms["qdq"]) == matched(source, write(tmp_path, "plain", proto))


def test_with_the_record_names_do_not_matter(deep: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    source, forms = deep
    proto = onnx.load(forms["qoperator"])
    (entry,) = (entry for entry in proto.metadata_props if entry.key == TENSORS_KEY)
    record = json.loads(entry.value)
    written = (name for node in proto.graph.node for name in node.output)
    levels = [name for name in written if name.endswith(("_quantized", "_clipped"))]
    renamed = {name: f"t{number}" for number, name in enumerate(levels)}
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    entry.value = json.dumps({renamed[name]: source_name for name, source_name in record.items()})
    del proto.graph.value_info[:]
    traced = {pair for pair in matched(source, forms["qoperator"]) if pair[1] in record.values()}
    assert len(traced) > 20
    assert traced <= set(matched(source, write(tmp_path, "renamed", proto)))


OTHERS = """g (float[N,4] x) => (float[N,4] y) <
    float[4,4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}, float two = {2},
    float s = {0.5}, uint8 z = {0}, float t = {1.0}> {
    [m] a = MatMul (x, w)
    a_QuantizeLinear_Output = QuantizeLinear (a, s, z)
    a_DequantizeLinear_Output = DequantizeLinear (a_QuantizeLinear_Output, s, z)
    [d] c = Mul (a_DequantizeLinear_Output, two)
    c_quantized = QuantizeLinear (c, t, z)
    c_dequantized = DequantizeLinear (c_quantized, t, z)
    [n] y = MatMul (c_dequantized, w) }"""
"""What a quantizer makes of FLOAT that lets the grid do what the Relu did."""


def test_a_grid_that_stands_for_an_activation_is_compared_behind_it(tmp_path: Path) -> None:
    source, candidate = write(tmp_path, "float", FLOAT), write(tmp_path, "others", OTHERS)
    found = by_name(compare_layers(source, candidate, rows([-3.0, 1.0, 2.0, 0.5])))
    assert {name: layer.reference for name, layer in found.items()} == {"m": "b", "d": "c", "n": "y"}
    assert found["m"].end_to_end.sqnr_db == math.inf
    assert found["m"].end_to_end.off_by == (4, 0, 0, 0)
    assert not found["n"].integer
    assert found["n"].end_to_end.off_by == ()


DYNAMIC = """g (float[N,4] x) => (float[N,4] y) <
    int8[4,4] w = {127,0,0,0, 0,127,0,0, 0,0,127,0, 0,0,0,127}, float ws = {0.00787401574}, int8 wz = {0},
    float[4] bias = {0, 0, 0, 0}, float two = {2}> {
    [dq] xq, xs, xz = DynamicQuantizeLinear (x)
    [scales] s = Mul (xs, ws)
    [m_quant] sums = MatMulInteger (xq, w, xz, wz)
    [cast] real = Cast <to = 1> (sums)
    [scaled] a_scaled = Mul (real, s)
    [m_bias] a = Add (a_scaled, bias)  [r] b = Relu (a)  [d] c = Mul (b, two)
    [n_dq] cq, cs, cz = DynamicQuantizeLinear (c)
    [n_scales] t = Mul (cs, ws)
    [n_quant] n_sums = MatMulInteger (cq, w, cz, wz)
    [n_cast] n_real = Cast <to = 1> (n_sums)
    [n_scaled] y = Mul (n_real, t) }"""
"""What a quantizer that finds ranges at run time makes of FLOAT."""


def test_sums_of_dynamic_quantization_are_one_layer_with_what_makes_them_real(tmp_path: Path) -> None:
    source, candidate = write(tmp_path, "float", FLOAT), write(tmp_path, "dynamic", DYNAMIC)
    found = compare_layers(source, candidate, rows([3.0, 1.5, 2.0, 0.5]))
    assert [(layer.name, layer.reference, layer.source) for layer in found.layers] == [
        ("m_quant", "b", "m"),
        ("d", "c", "d"),
        ("n_quant", "y", "n"),
    ]
    assert (found.alone, found.has_local) == ((), True)
    assert all(layer.errors("local").sqnr_db > 30.0 for layer in found.layers)


BATCHED = """g (float[N,3,4] x) => (float[N,3,4] y) <float[4,4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1},
    float[4] bias = {1, 2, 3, 4}, float two = {2}> {
    [m] m_out = MatMul (x, w)  [b] a = Add (m_out, bias)  [d] y = Mul (a, two) }"""
FLATTENED = """g (float[N,3,4] x) => (float[N,3,4] y) <float[4,4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,2},
    float[4] bias = {1, 2, 3, 4}, float two = {2}, int64[2] flat = {-1, 4}, int64[3] back = {-1, 3, 4}> {
    [f] x_flat = Reshape (x, flat)
    [m] m_flat = Gemm (x_flat, w, bias)
    [k] a = Reshape (m_flat, back)  [d] y = Mul (a, two) }"""
"""BATCHED as Gemm computes it, with an error in the weight."""


def test_a_layer_computed_in_another_shape_is_matched_where_it_has_its_own_again(tmp_path: Path) -> None:
    source, candidate = write(tmp_path, "batched", BATCHED), write(tmp_path, "flattened", FLATTENED)
    data = [Batch({"x": np.ones((1, 3, 4), np.float32)}, None, 0)]
    found = compare_layers(source, candidate, data)
    assert [(layer.name, layer.reference, layer.source) for layer in found.layers] == [
        ("m", "a", "m"),
        ("d", "y", "d"),
    ]
    assert found.worst_first()[0].name == "m"
    assert found.layers[1].errors("local").sqnr_db == math.inf


def test_figures_by_hand(tmp_path: Path) -> None:
    source, candidate = write(tmp_path, "float", FLOAT), write(tmp_path, "others", OTHERS)
    # b is 3.2, 4.3, 0 and 1; on a grid of halves 3.0, 4.5, 0, 1. 2 b on a grid of ones: 6, 9, 0, 2.
    found = by_name(compare_layers(source, candidate, rows([3.2, 4.3, -1.0, 1.0])))
    errors = found["m"].end_to_end
    assert errors.off_by == (4, 0, 0, 0)
    assert errors.max_error == pytest.approx(0.2, abs=1e-6)
    assert errors.mean_error == pytest.approx(0.1, abs=1e-6)
    signal, noise = 3.2**2 + 4.3**2 + 1.0, 2 * 0.2**2
    assert errors.sqnr_db == pytest.approx(10 * math.log10(signal / noise), abs=1e-3)
    # From its own input 4.5 becomes 9, where the reference's 8.6 is 9 too; from the reference's 4.3 likewise.
    assert found["d"].end_to_end.off_by == (4, 0, 0, 0)
    far = by_name(compare_layers(source, candidate, rows([200.0, 1.0, 1.0, 1.0])))
    # The grid of halves ends at 127.5, which is 255 - 400 levels off in the ones behind it, all within 0..255.
    assert far["m"].end_to_end.off_by == (4, 0, 0, 0)
    assert far["m"].end_to_end.max_error == 72.5


def test_a_layer_of_another_shape_is_no_counterpart(tmp_path: Path) -> None:
    source = write(tmp_path, "float", FLOAT)
    wider = """g (float[N,4] x) => (float[N,4] y) <
        float[4,2] w = {1,0, 0,1, 0,0, 0,0}, float[2,4] v = {1,0,0,0, 0,1,0,0}> {
        [m] c = MatMul (x, w)  [n] y = MatMul (c, v) }"""
    found = compare_layers(source, write(tmp_path, "wide", wider), rows([1.0, 2.0, 3.0, 4.0]))
    assert [layer.name for layer in found.layers] == ["n"]
    assert (found.alone, found.total) == (("m",), 2)


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        ("g (float[N,4] image) => (float[N,4] y) { y = Neg (image) }", "different inputs: image where"),
        ("g (float[N,4] x) => (float[N,4] z) { z = Neg (x) }", "different outputs: z where"),
        ("g (float[N,4] x) => (float[N,4] y) { y = Identity (x) }", "none of its 0 layers"),
    ],
)
def test_models_that_do_not_belong_together_are_refused(tmp_path: Path, candidate: str, message: str) -> None:
    source = write(tmp_path, "float", FLOAT)
    with pytest.raises(DataError, match=message):
        compare_layers(source, write(tmp_path, "other", candidate), rows([1.0, 2.0, 3.0, 4.0]))


def test_no_samples_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path, "float", FLOAT)
    with pytest.raises(DataError, match="no samples"):
        compare_layers(source, source, [])


def test_a_record_that_is_none_is_refused(tmp_path: Path) -> None:
    model = parse(FLOAT)
    model.ir.metadata_props[TENSORS_KEY] = "[1]"
    source, candidate = write(tmp_path, "float", FLOAT), tmp_path / "candidate.onnx"
    save_model(model, candidate)
    with pytest.raises(DataError, match="no record of tensors"):
        compare_layers(source, candidate, rows([1.0, 2.0, 3.0, 4.0]))


def test_a_batch_that_crashes_is_named_and_left_out(tmp_path: Path) -> None:
    source = write(tmp_path, "float", FLOAT)
    picky = write(tmp_path, "picky", FLOAT.replace("float[N,4]", "float[1,4]"))
    data = [Batch({"x": np.ones((size, 4), np.float32)}, None, first) for size, first in ((1, 0), (2, 1), (1, 3))]
    found = compare_layers(source, picky, data)
    assert found.samples == 2
    (failure,) = found.failures
    assert str(failure).startswith("candidate: samples 1 to 2: onnxruntime cannot run")
    missing = compare_layers(source, source, [Batch({"image": np.ones((1, 4), np.float32)}, None, 0)])
    assert (missing.layers, missing.samples) == ((), 0)
    assert "no array for input 'x'" in missing.failures[0].reason


def test_nan_and_infinity_are_named_where_they_arise(tmp_path: Path) -> None:
    good = "g (float[N,2] x) => (float[N,2] y) <float one = {1}> { [p] a = Add (x, one) [q] y = Mul (a, one) }"
    bad = good.replace("Add (x, one)", "Div (x, zero)").replace("float one", "float zero = {0}, float one")
    paths = write(tmp_path, "good", good), write(tmp_path, "bad", bad)
    found = compare_layers(*paths, rows([0.0, 1.0]))
    assert [layer.name for layer in found.not_finite] == ["p", "q"]
    assert found.layers[0].end_to_end.not_finite == 2
    assert found.worst_first()[0].errors("local").sqnr_db == -math.inf
    # Infinity in both, as masks have it, is no error; NaN in both is.
    both = compare_layers(paths[1], paths[1], rows([1.0, 1.0]))
    assert both.not_finite == ()
    assert compare_layers(paths[1], paths[1], rows([0.0, 1.0])).not_finite


def test_another_dialect_is_read_first(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "qonnx.custom_op.general" : 1]>
    g (float[N,4] x) => (float[N,4] y) <
      float[4,4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}, float s = {0.5}, float z = {0}, float bits = {8}> {
      xq = qonnx.custom_op.general.Quant <narrow = 0, signed = 1, rounding_mode = "ROUND"> (x, s, z, bits)
      wq = qonnx.custom_op.general.Quant <narrow = 0, signed = 1, rounding_mode = "ROUND"> (w, s, z, bits)
      [m] a = MatMul (xq, wq)
      y = qonnx.custom_op.general.Quant <narrow = 0, signed = 1, rounding_mode = "ROUND"> (a, s, z, bits) }"""
    source, result = tmp_path / "qonnx.onnx", tmp_path / "int8.onnx"
    onnx.save(onnx.parser.parse_model(text), source)
    convert(source).save(result)
    (layer,) = compare_layers(source, result, rows([1.2, 2.0, -3.0, 100.0])).layers
    assert layer.integer
    assert layer.errors("local").off_by == (4, 0, 0, 0)
    assert layer.errors("local").sqnr_db == math.inf


def test_leaving_a_layer_in_float_is_measured(deep: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    source, forms = deep
    layer = convolutions(forms["qdq"])[3]
    planted = doubled(forms["qdq"], layer, tmp_path, lambda scale: scale * np.float32(2.0))
    trials = try_skips(source, source, planted, [layer, "nobody"], batches(1))
    assert (trials.samples, trials.calibrated, trials.reference, trials.unjudged) == (2, False, {}, "")
    assert trials.candidate < trials.whole.sqnr_db - 3.0
    trial, failed = trials.trials
    assert trial.quality is not None
    assert trial.quality.integer_macs_percent < trials.whole.integer_macs_percent == 100.0
    assert trials.gain_db(trial) == trial.quality.sqnr_db - trials.whole.sqnr_db
    assert failed.quality is None
    assert "no node is called 'nobody'" in failed.error
    assert math.isnan(trials.gain_db(failed))
