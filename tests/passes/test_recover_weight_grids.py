"""Weights that lie on a grid get it back; weights that do not, practically never."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TARGET, apply, graph_text

from qat2int8.ir import INT8, Code, Model, Provenance, QuantDType, QuantParams, Severity
from qat2int8.passes import Context, find_pass, recover_weight_grids
from qat2int8.passes.output_channel import output_channel_axis
from qat2int8.passes.recover_weight_grids import RecoverWeightGrids, recovered_grid

CTX = Context(TARGET)
NARROW = QuantDType(8, signed=True, narrow_range=True)
TRAINED = QuantParams.make(0.1, 3, INT8, origin="DequantizeLinear 'd'")

Floats = np.ndarray


def layer(
    node: str, weights: Floats, source: str = "", *, data: str = "float[N, M] x", out: str = "A, B"
) -> Model:
    """A model around one layer with weight ``w``; ``x``, or what ``source`` names, lies on a trained grid."""
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g ({data}) => (float[{out}] y) {{ {node} }}'
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    model = Model.from_proto(proto)
    if source:
        model.scales.set(model.values()[source], TRAINED)
    return model


def on_grid(shape: tuple[int, ...], axis: int | None, *, seed: int = 0, top: int = 127) -> tuple[Floats, Floats]:
    """Weights, and the integers behind them; every channel reaches ``top``."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(-top, top + 1, shape)
    spread = [1] * len(shape)
    if axis is not None:
        spread[axis] = -1
        for channel in range(shape[axis]):
            np.moveaxis(levels, axis, 0)[channel].flat[0] = top
    else:
        levels.flat[0] = top
    steps = rng.uniform(1e-3, 1e-1, 1 if axis is None else shape[axis]).astype(np.float32).reshape(spread)
    return (levels.astype(np.float32) * steps).astype(np.float32), levels


@pytest.mark.parametrize(
    ("node", "shape", "axis"),
    [
        ("y = Conv (x, w)", (5, 3, 2, 2), 0),
        ("y = Conv <group = 5> (x, w)", (5, 1, 3, 3), 0),
        ("y = ConvTranspose (x, w)", (3, 5, 2, 2), 1),
        ("y = Gemm (x, w)", (9, 4), 1),
        ("y = Gemm <transB = 1> (x, w)", (4, 9), 0),
        ("y = MatMul (x, w)", (9, 4), 1),
        ("y = MatMul (x, w)", (2, 9, 4), None),
        ("y = MatMul (x, w)", (40,), None),
    ],
)
def test_every_layer_by_its_output_channels(node: str, shape: tuple[int, ...], axis: int | None) -> None:
    weights, levels = on_grid(shape, axis)
    dims = {"Conv": "N, C, H, W", "Gemm": "N, M"}.get(node[4:8], "N, M, K"[: max(4, 3 * len(shape) - 2)])
    out = {"Conv": "A, B, C, D", "Gemm": "A, B"}.get(node[4:8], "A, B, C"[: 3 * len(shape) - 2])
    model = layer(node, weights, "x", data=f"float[{dims}] x", out=out)
    before = graph_text(model)
    result = apply(RecoverWeightGrids(), model)
    assert result.counts == {"recovered": 1}
    params = model.scales[model.graph.initializers["w"]]
    assert (params.axis, params.dtype, params.source) == (axis, NARROW, Provenance.TRAINED)
    assert params.symmetric
    assert params.origin == "recovered from the weight's own values"
    np.testing.assert_array_equal(params.quantize(weights), levels)
    np.testing.assert_allclose(params.dequantize(params.quantize(weights)), weights, rtol=1e-6)
    assert graph_text(model) == before
    (note,) = result.diagnostics
    assert (note.code, note.severity, note.value) == (Code.WEIGHT_GRID_COMPUTED, Severity.NOTE, "w")


def test_one_step_for_the_whole_weight_stays_one() -> None:
    weights, levels = on_grid((9, 4), None)
    model = layer("y = MatMul (x, w)", weights, "x")
    apply(RecoverWeightGrids(), model)
    params = model.scales[model.graph.initializers["w"]]
    assert params.scale.shape == ()
    np.testing.assert_array_equal(params.quantize(weights), levels)


def test_a_step_per_channel_is_preferred_to_one_for_all() -> None:
    """Where both fit they say the same, and a fold of a BatchNormalization needs one per channel anyway."""
    levels = np.random.default_rng(0).integers(-126, 127, (4, 30))
    levels[:, 0] = 127
    params = recovered_grid((levels * np.float32(0.25)).astype(np.float32), 0)
    assert params is not None
    assert params.scale.tolist() == [0.25] * 4


def test_weights_that_no_grid_was_trained_for_get_none() -> None:
    weights = np.random.default_rng(0).normal(size=(16, 30)).astype(np.float32)
    assert not apply(RecoverWeightGrids(), layer("y = MatMul (x, w)", weights, "x")).modified


def test_one_weight_off_the_grid_is_enough() -> None:
    weights, _ = on_grid((9, 4), 1)
    weights[4, 2] *= 1.01
    assert recovered_grid(weights, 1) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_get_none(bad: float) -> None:
    weights, _ = on_grid((9, 4), 1)
    weights[4, 2] = bad
    with np.errstate(all="raise"):
        assert recovered_grid(weights, 1) is None


def test_steps_the_runtime_cannot_divide_by_are_no_grid() -> None:
    weights, _ = on_grid((9, 4), 1)
    assert recovered_grid(weights * np.float32(1e-37), 1) is None


def test_a_layer_left_in_float_is_left() -> None:
    weights, _ = on_grid((9, 4), 1)
    assert not apply(RecoverWeightGrids(), layer("y = MatMul (x, w)", weights)).modified


def test_a_grid_that_was_not_trained_says_nothing() -> None:
    weights, _ = on_grid((9, 4), 1)
    model = layer("y = MatMul (x, w)", weights, "x")
    model.scales.set(model.graph.inputs[0], TRAINED.with_(source=Provenance.DERIVED))
    assert not apply(RecoverWeightGrids(), model).modified


@pytest.mark.parametrize(
    ("between", "seen"),
    [
        ("f = Flatten (x) t = Transpose (f)", True),
        ("t = Relu (x)", True),
        ("t = Clip (x)", True),
        ("t = Concat <axis = 0> (x, x)", True),
        ("r = Softmax (x) t = Concat <axis = 0> (x, r)", False),
        ("t = Softmax (x)", False),
        ("r = Softmax (x) t = Relu (r)", False),
    ],
)
def test_the_grid_of_the_data_is_seen_through_what_carries_it(between: str, seen: bool) -> None:
    weights, _ = on_grid((9, 4), 1)
    model = layer(f"{between} y = MatMul (t, w)", weights, "x")
    assert apply(RecoverWeightGrids(), model).modified == seen


@pytest.mark.parametrize("pool", ["AveragePool <kernel_shape = [2, 2]>", "GlobalAveragePool"])
def test_the_grid_of_the_data_is_seen_through_pools(pool: str) -> None:
    weights, _ = on_grid((4, 9, 1, 1), 0)
    model = layer(f"t = {pool} (x) y = Conv (t, w)", weights, "x", data="float[N, C, H, W] x", out="A, B, C, D")
    assert apply(RecoverWeightGrids(), model).modified


def test_a_grid_that_is_known_stays() -> None:
    weights, _ = on_grid((9, 4), 1)
    model = layer("y = MatMul (x, w)", weights, "x")
    known = QuantParams.make(0.5)
    model.scales.set(model.graph.initializers["w"], known)
    assert not apply(RecoverWeightGrids(), model).modified
    assert model.scales[model.graph.initializers["w"]] is known


def test_weights_of_other_types_and_computed_weights_are_left() -> None:
    weights, _ = on_grid((9, 4), 1)
    assert not apply(RecoverWeightGrids(), layer("v = Neg (w) y = Gemm (x, v)", weights, "x")).modified
    double = layer("y = MatMul (x, w)", weights.astype(np.float64), "x", data="double[N, M] x")
    assert not RecoverWeightGrids().run(double, CTX).modified


def test_a_shared_weight_is_recovered_once() -> None:
    weights, _ = on_grid((9, 9), 1)
    model = layer("t = MatMul (x, w) y = MatMul (x, w)", weights, "x")
    assert apply(RecoverWeightGrids(), model).counts["recovered"] == 1


@pytest.mark.parametrize("top", [15, 57, 100, 126, 127])
def test_channels_that_do_not_reach_the_top_are_found_by_search(top: int) -> None:
    weights, levels = on_grid((64, 1, 3, 3), 0, top=top)
    weights[0] *= 3  # so that one step for all does not fit by chance
    params = recovered_grid(weights, 0)
    assert params is not None
    if top < 127:
        assert params.per_channel
    found = params.quantize(weights).astype(int).reshape(64, -1)
    factors = levels.reshape(64, -1)[:, 0] // found[:, 0]
    np.testing.assert_array_equal(found * factors[:, None], levels.reshape(64, -1))


def test_the_lowest_level_of_int8() -> None:
    rng = np.random.default_rng(1)
    levels = rng.integers(-128, 127, (3, 50))
    levels[:2, 7] = -128
    levels[2] = np.clip(levels[2], -90, 91)
    levels[2, 0] = 91
    weights = (levels * np.asarray([[0.01], [0.03], [0.2]])).astype(np.float32)
    params = recovered_grid(weights, 0)
    assert params is not None
    assert params.dtype == INT8
    np.testing.assert_array_equal(params.quantize(weights), levels)
    weights[0] *= -1  # level 128 is none of int8
    assert recovered_grid(weights, 0) is None


def test_levels_beyond_int8_are_no_grid() -> None:
    levels = np.random.default_rng(1).integers(-255, 256, (3, 50))
    levels[:, 0] = 255
    assert recovered_grid((levels * np.float32(0.1)).astype(np.float32), 0) is None


def test_a_channel_of_zeros_gets_step_one() -> None:
    weights, levels = on_grid((9, 4), 1)
    weights[:, 2] = 0
    levels[:, 2] = 0
    params = recovered_grid(weights, 1)
    assert params is not None
    assert params.scale[2] == 1.0
    np.testing.assert_array_equal(params.quantize(weights), levels)
    assert recovered_grid(np.zeros((9, 4), np.float32), 1) is None


@pytest.mark.parametrize(
    "channel",
    [
        [1.0] * 9,
        [1.0, -1.0, 0.0] * 3,
        [1.0, 2.0, 1.0, 2.0, 4.0, 2.0, 1.0, 2.0, 1.0],
        [1000.0, *np.random.default_rng(0).normal(size=8)],
        [0.731, 0.0, 0.0],
        [0.731],
    ],
)
def test_too_few_levels_tell_nothing(channel: list[float]) -> None:
    """Each of these fits some grid: a constant, signs, a blur, an outlier among values near 0, a single weight."""
    assert recovered_grid(np.asarray([channel], np.float32), 0) is None


def test_six_levels_in_one_channel_are_enough_and_five_are_not() -> None:
    """Besides 0 and the largest, which lie on every grid that is tried."""
    levels = np.asarray([[127, 0, 0, 10, -23, 37, 51, 51, 77, -127]])
    assert recovered_grid((levels * np.float32(0.01)).astype(np.float32), 0) is None
    levels[0, 1] = 101
    assert recovered_grid((levels * np.float32(0.01)).astype(np.float32), 0) is not None


def test_an_outlier_does_not_make_small_values_zero() -> None:
    weights, _ = on_grid((4, 64), 0)
    weights[0] = np.random.default_rng(0).normal(size=64) * 2e-4
    weights[0, 0] = 1.0
    assert recovered_grid(weights, 0) is None


def test_many_channels_with_few_levels_tell_as_much_as_one_with_many() -> None:
    levels = np.random.default_rng(0).integers(-3, 4, (16, 20))
    levels[:, :3] = [1, 2, 3]
    weights = (levels * np.random.default_rng(1).uniform(0.01, 0.1, (16, 1))).astype(np.float32)
    params = recovered_grid(weights, 0)
    assert params is not None
    np.testing.assert_array_equal(params.quantize(weights), levels)
    assert recovered_grid(weights[:1], 0) is None


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 9999),
    channels=st.integers(1, 12),
    size=st.integers(32, 80),
    span=st.integers(20, 127),
    normalised=st.booleans(),
    whole=st.booleans(),
)
def test_random_integers_are_recovered_up_to_a_common_divisor(
    seed: int, channels: int, size: int, span: int, normalised: bool, whole: bool
) -> None:
    rng = np.random.default_rng(seed)
    levels = rng.integers(-span, span + 1, (channels, size)).astype(np.float32)
    scale = np.float32(10.0 ** rng.uniform(-6, 2)) if whole else (10.0 ** rng.uniform(-6, 2, (channels, 1)))
    weights = (levels * scale).astype(np.float32)
    if normalised:
        gamma, sigma = rng.normal(size=(channels, 1)), rng.uniform(0.1, 3, (channels, 1))
        weights = (weights * gamma.astype(np.float32) / sigma.astype(np.float32)).astype(np.float32)
        levels = levels * np.sign(gamma)
    params = recovered_grid(weights, 0)
    assert params is not None
    found = params.quantize(weights).astype(np.int64)
    ratio = levels.astype(np.int64) // np.where(found == 0, 1, found)
    factor = ratio.max(axis=1, keepdims=True)
    np.testing.assert_array_equal(found * factor, levels)
    shape = (-1, 1) if params.per_channel else ()
    np.testing.assert_allclose(weights / params.scale.reshape(shape), found, rtol=0, atol=2e-3)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 99999),
    channels=st.integers(1, 6),
    size=st.integers(1, 40),
    kind=st.sampled_from(["normal", "uniform", "laplace", "sparse", "heavy"]),
)
def test_random_floats_are_never_taken_for_a_grid(seed: int, channels: int, size: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    shape = (channels, size)
    weights = {
        "normal": lambda: rng.normal(size=shape),
        "uniform": lambda: rng.uniform(-1, 1, shape),
        "laplace": lambda: rng.laplace(size=shape),
        "sparse": lambda: rng.normal(size=shape) * (rng.uniform(size=shape) < 0.1),
        "heavy": lambda: rng.standard_cauchy(shape) ** 3,
    }[kind]()
    assert recovered_grid(weights.astype(np.float32), 0) is None


def test_the_chance_assumed_is_an_upper_bound() -> None:
    """How often random values lie as close to a level as is asked for, over all steps that are tried."""
    rng = np.random.default_rng(0)
    for values in (rng.normal(size=200_000), rng.laplace(size=200_000), rng.uniform(-1, 1, 200_000)):
        for highest in (2, 5, 20, 127):
            levels = np.abs(values / np.quantile(np.abs(values), 0.9999)) * highest
            asked = (np.rint(levels) != 0) & (levels < highest - 0.5)
            assert np.mean(np.abs(levels - np.rint(levels))[asked] < 2e-3) < 1e-2


@pytest.mark.parametrize("top", [127, 100])
def test_a_channel_that_often_reaches_its_largest_is_tried_with_few_steps(
    top: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample must tell the steps apart, or each of a hundred is tried on the whole weight."""
    tested = []

    def count(rows: Floats, steps: Floats) -> Floats:
        tested.append(rows.size)
        return fits(rows, steps)

    fits = recover_weight_grids._fits
    monkeypatch.setattr(recover_weight_grids, "_fits", count)
    weights, _ = on_grid((8, 20_000), 0, top=top)
    assert recovered_grid(weights, 0) is not None
    assert sum(tested) < 6 * weights.size


def test_axes_of_layers() -> None:
    model = layer("y = Gemm <transB = 1> (x, w)", np.ones((2, 2), np.float32))
    assert output_channel_axis(model.graph[0], 2) == 0


MODELS = os.environ.get("QAT2INT8_ZOO", "")
BEFORE = [
    "raise-opset",
    "canonicalize",
    "fold-constants",
    "float-data-movement",
    "gather-weight-scales",
    "gather-output-scales",
    "gather-input-scales",
    "remove-fake-quant",
    "dequantize-weights",
]
FOLDED = {"hand_wfolded": 4, "tf_qat_deconv": 3, "tf_qat_lenet": 4, "tf_qat_mobile": 8}


@pytest.mark.zoo
@pytest.mark.skipif(not MODELS, reason="QAT2INT8_ZOO names no folder of models")
@pytest.mark.parametrize(("name", "count"), FOLDED.items())
def test_exported_models_get_the_grids_of_all_their_weights(name: str, count: int) -> None:
    model = Model.from_proto(onnx.load(Path(MODELS) / f"{name}.onnx"))
    for step in BEFORE:
        find_pass(step)().run(model, CTX)
    assert apply(RecoverWeightGrids(), model).counts["recovered"] == count
    for value, params in model.scales.items():
        array = model.constant(value)
        if array is not None:
            shape = [1] * array.ndim
            if params.axis is not None:
                shape[params.axis] = -1
            levels = array / params.scale.reshape(shape)
            assert np.abs(levels - params.quantize(array)).max() < 2e-4
