"""Ranges are sound: whatever onnxruntime computes from inputs within their ranges lies inside."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import run

from qat2int8.ir import UINT8, UNBOUNDED, Interval, Model, QuantDType, QuantParams
from qat2int8.ir.model import ChannelMoments
from qat2int8.ir.ranges import _TRANSFER, Ranges, hard_sigmoid_coefficients, moments_interval

SHAPE = (1, 4, 4, 4)
A, B = Interval(-2, 3), Interval(-1, 4)

NODES: dict[str, str | tuple[str, int]] = {
    "Abs": "y = Abs(a)",
    "Add": "y = Add(a, b)",
    "AveragePool": "y = AveragePool<kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1>(a)",
    "Clip": "y = Clip(a, bl, bh)",
    "Concat": "y = Concat<axis=1>(a, b, a)",
    "DepthToSpace": "y = DepthToSpace<blocksize=2>(a)",
    "Div": "y = Div(a, b)",
    "Dropout": "y = Dropout(a)",
    "Erf": "y = Erf(a)",
    "Expand": "y = Expand(a, expanded)",
    "Flatten": "y = Flatten(a)",
    "Gather": "y = Gather<axis=1>(a, indices)",
    "Gelu": ("y = Gelu(a)", 20),
    "Gelu tanh": ('y = Gelu<approximate="tanh">(a)', 20),
    "GlobalAveragePool": "y = GlobalAveragePool(a)",
    "GlobalMaxPool": "y = GlobalMaxPool(a)",
    "HardSigmoid": "y = HardSigmoid<alpha=0.3, beta=0.4>(a)",
    "HardSigmoid falling": "y = HardSigmoid<alpha=-0.3, beta=0.4>(a)",
    "HardSwish": "y = HardSwish(a)",
    "Identity": "y = Identity(a)",
    "LeakyRelu": "y = LeakyRelu<alpha=0.2>(a)",
    "LeakyRelu steep": "y = LeakyRelu<alpha=2.5>(a)",
    "LeakyRelu flat": "y = LeakyRelu<alpha=0.0>(a)",
    "LeakyRelu folding": "y = LeakyRelu<alpha=-0.5>(a)",
    "LogSoftmax": "y = LogSoftmax<axis=1>(a)",
    "Max": "y = Max(a, b)",
    "MaxPool": "y = MaxPool<kernel_shape=[3, 3], pads=[1, 1, 1, 1]>(a)",
    "Min": "y = Min(a, b)",
    "Mul": "y = Mul(a, b)",
    "Mul square": "y = Mul(a, a)",
    "Neg": "y = Neg(a)",
    "Pad": "y = Pad(a, pads, filler)",
    "Pad plain": "y = Pad(a, pads)",
    "Pad reflect": 'y = Pad<mode="reflect">(a, pads)',
    "ReduceMax": "y = ReduceMax<axes=[1]>(a)",
    "ReduceMean": "y = ReduceMean<axes=[2, 3]>(a)",
    "ReduceMin": "y = ReduceMin<axes=[1]>(a)",
    "Relu": "y = Relu(a)",
    "Reshape": "y = Reshape(a, flat)",
    "Resize": 'y = Resize<mode="nearest">(a, , upscale)',
    "Resize linear": 'y = Resize<mode="linear">(a, , upscale)',
    "Resize cubic": 'y = Resize<mode="cubic">(a, , upscale)',
    "Resize crop": 'y = Resize<coordinate_transformation_mode="tf_crop_and_resize", '
    "extrapolation_value=77.0>(a, roi, upscale)",
    "Sigmoid": "y = Sigmoid(a)",
    "Slice": "y = Slice(a, one, two)",
    "Softmax": "y = Softmax<axis=1>(a)",
    "SpaceToDepth": "y = SpaceToDepth<blocksize=2>(a)",
    "Split": "z, y = Split<axis=1>(a)",
    "Sqrt": "n = Abs(a)\ny = Sqrt(n)",
    "Squeeze": "y = Squeeze(a, zero)",
    "Sub": "y = Sub(a, b)",
    "Tanh": "y = Tanh(a)",
    "Tile": "y = Tile(a, repeats)",
    "Transpose": "y = Transpose<perm=[0, 2, 3, 1]>(a)",
    "Unsqueeze": "y = Unsqueeze(a, zero)",
}


def model_of(body: str | tuple[str, int], a: Interval = A, b: Interval = B) -> onnx.ModelProto:
    """``a`` and ``b`` are graph inputs clamped to their intervals, unbounded where an interval is."""
    text, opset = body if isinstance(body, tuple) else (body, 17)

    def bound(name: str, value: float) -> str:
        return f"float {name} = {{{value!r}}}" if math.isfinite(value) else ""

    bounds = {"al": a.lo, "ah": a.hi, "bl": b.lo, "bh": b.hi}
    given_bounds = [bound(n, v) for n, v in bounds.items() if math.isfinite(v)]
    names = {n: n if math.isfinite(v) else "" for n, v in bounds.items()}
    constants = ", ".join(
        [
            *given_bounds,
            "float filler = {7.5}, int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1}, int64[2] flat = {4, 16}",
            "int64[5] expanded = {2, 1, 4, 4, 4}, int64[2] indices = {3, 0}, int64[4] repeats = {1, 2, 1, 1}",
            "float[4] upscale = {1, 1, 2, 2}, float[8] roi = {0, 0, -1, -1, 1, 1, 2, 2}",
            "int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}",
        ]
    )
    return onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]>\n'
        f"g (float[1,4,4,4] u, float[1,4,4,4] v) => (float y) <{constants}> {{\n"
        f"a = Clip(u, {names['al']}, {names['ah']})\nb = Clip(v, {names['bl']}, {names['bh']})\n{text}\n}}"
    )


def range_of(body: str | tuple[str, int], a: Interval = A, b: Interval = B) -> Interval:
    model = Model.from_proto(model_of(body, a, b))
    return Ranges(model).raw(model.values()["y"])


def close(interval: Interval, lo: float, hi: float, tolerance: float = 1e-6) -> bool:
    return all(
        x == y or math.isclose(x, y, rel_tol=tolerance, abs_tol=tolerance)
        for x, y in ((interval.lo, lo), (interval.hi, hi))
    )


def test_the_table_of_nodes_covers_every_transfer_rule() -> None:
    assert {name.split()[0] for name in NODES} == set(_TRANSFER)


numbers = st.floats(-8, 8, width=16)
intervals = st.tuples(numbers, numbers).map(lambda ends: Interval(min(ends), max(ends)))


@pytest.mark.parametrize("name", NODES)
@settings(max_examples=12, deadline=None)
@given(a=intervals, b=intervals, seed=st.integers(0, 999))
def test_no_output_leaves_its_range(name: str, a: Interval, b: Interval, seed: int) -> None:
    proto = model_of(NODES[name], a, b)
    model = Model.from_proto(proto)
    span = Ranges(model).raw(model.values()["y"])
    assert span.lo <= span.hi, "an end that is no number compares with nothing"
    rng = np.random.default_rng(seed)
    # Uniform over the range, and its ends: that is where a wrong rule shows.
    feeds = {
        key: rng.choice([rng.uniform(i.lo - 0.1, i.hi + 0.1, SHAPE), rng.choice([i.lo, i.hi], SHAPE)]).astype("f")
        for key, i in (("u", a), ("v", b))
    }
    with np.errstate(all="ignore"):
        (y,) = run(proto, feeds)
    y = y[~np.isnan(y)]
    slack = 1e-5 * (1.0 + np.abs(y))
    assert np.all(y >= span.lo - slack)
    assert np.all(y <= span.hi + slack)


@pytest.mark.parametrize("name", NODES)
@pytest.mark.parametrize("a", [UNBOUNDED, Interval(-math.inf, 2), Interval(-1, math.inf)], ids=str)
@pytest.mark.parametrize("b", [UNBOUNDED, Interval(0, 0), Interval(1, math.inf)], ids=str)
def test_infinities_never_make_a_nan(name: str, a: Interval, b: Interval) -> None:
    span = range_of(NODES[name], a, b)
    assert span.lo <= span.hi


@pytest.mark.parametrize(
    ("name", "lo", "hi"),
    [
        ("Abs", 0, 3),
        ("Add", -3, 7),
        ("AveragePool", -2, 3),
        ("Clip", -1, 3),
        ("Concat", -2, 4),
        ("Gelu", -0.169971, 2.995951),
        ("Gelu tanh", -0.170041, 2.996363),
        ("HardSigmoid", 0, 1),
        ("HardSwish", -0.375, 3),
        ("LeakyRelu", -0.4, 3),
        ("LeakyRelu steep", -5, 3),
        ("LeakyRelu flat", 0, 3),
        ("LogSoftmax", -math.inf, 0),
        ("Max", -1, 4),
        ("Min", -2, 3),
        ("Mul", -8, 12),
        ("Mul square", 0, 9),
        ("Neg", -3, 2),
        ("Pad", -2, 7.5),
        ("Pad plain", -2, 3),
        ("Pad reflect", -2, 3),
        ("Relu", 0, 3),
        ("Resize linear", -2, 3),
        ("Resize cubic", -math.inf, math.inf),
        ("Resize crop", -math.inf, math.inf),
        ("LeakyRelu folding", -math.inf, math.inf),
        ("Sigmoid", 0.1192029, 0.9525741),
        ("Softmax", 0, 1),
        ("Split", -2, 3),
        ("Sub", -6, 4),
        ("Tanh", math.tanh(-2), math.tanh(3)),
        ("Div", -math.inf, math.inf),
        ("MaxPool", -2, 3),
    ],
)
def test_ranges_are_tight(name: str, lo: float, hi: float) -> None:
    assert close(range_of(NODES[name]), lo, hi), range_of(NODES[name])


def test_division_by_a_range_away_from_zero() -> None:
    assert close(range_of("y = Div(a, b)", b=Interval(2, 4)), -1, 1.5)
    assert close(range_of("y = Div(a, b)", b=Interval(-4, -2)), -1.5, 1)


def test_a_clip_whose_bounds_cross_yields_the_upper_one() -> None:
    assert range_of("y = Clip(a, filler, bh)") == Interval(4, 4)


def test_a_clip_with_computed_bounds() -> None:
    # The lower bound lies in [0, 5]; where it exceeds the upper one, -1 wins.
    body = "low = Sigmoid(v)\nhigh = Neg(low)\ny = Clip(a, low, high)"
    assert close(range_of(body), -1, 0)
    assert range_of("y = Clip(a, v, bh)") == Interval(-2, 4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('<ir_version: 4, opset_import: ["" : 6]> g (float[2] u) => (float y) '
         "{ y = Clip<min=-1.0, max=6.0>(u) }", Interval(-1, 6)),
        ('<ir_version: 4, opset_import: ["" : 6]> g (float[2] u) => (float y) '
         "{ a = Relu(u)\n y = Clip<max=6.0>(a) }", Interval(0, 6)),
        ('<ir_version: 4, opset_import: ["" : 10]> g (float[2] u) => (float y) '
         "{ a = Clip<min=1.0, max=2.0>(u)\n y = Pad<pads=[1, 1], value=9.0>(a) }", Interval(1, 9)),
    ],
)  # fmt: skip
def test_older_opsets_keep_bounds_and_fillers_in_attributes(text: str, expected: Interval) -> None:
    model = Model.from_proto(onnx.parser.parse_model(text))
    assert Ranges(model).raw(model.values()["y"]) == expected


def test_a_dropout_in_training_mode_scales_up() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[2] u, bool mode) => (float y) <float ratio = {0.5}, bool t = {1}, bool f = {0}> {
            a = Sigmoid(u)
            off = Dropout(a, ratio, f)
            on = Dropout(a, ratio, t)
            open = Dropout(a, ratio, mode)
            y = Sum(off, on, open)
        }"""
    model = Model.from_proto(onnx.parser.parse_model(text))
    ranges, values = Ranges(model), model.values()
    assert ranges.raw(values["off"]) == Interval(0, 1)
    assert ranges.raw(values["on"]) == ranges.raw(values["open"]) == UNBOUNDED


@pytest.mark.parametrize(
    "body",
    ["y = Exp(a)", "y = MatMul(a, b)", "y, i = MaxPool<kernel_shape=[1, 1]>(a)\nz = Cast<to=1>(i)"],
)
def test_what_no_rule_knows_is_unbounded(body: str) -> None:
    model = Model.from_proto(model_of(body))
    name = "i" if "i = " in body else "y"
    assert Ranges(model).raw(model.values()[name]) == UNBOUNDED


def test_graph_inputs_and_absent_inputs_are_unbounded() -> None:
    model = Model.from_proto(model_of("y = Relu(a)"))
    ranges = Ranges(model)
    assert ranges.raw(model.values()["u"]) == ranges.raw(None) == ranges.seen(None) == UNBOUNDED


@pytest.mark.parametrize("op", ["Relu", "Add"])
def test_an_op_of_another_domain_is_not_the_op_of_the_same_name(op: str) -> None:
    model = Model.from_proto(model_of("y = Relu(a)"))
    model.graph[-1].domain = "my.domain"
    model.graph[-1].op_type = op
    model.moments[model.values()["a"]] = moments([0], [1])
    assert Ranges(model, 6.0).raw(model.values()["y"]) == UNBOUNDED


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        ([-1.0, 2.5], Interval(-1, 2.5)),
        ([math.nan, 1.0], UNBOUNDED),
        ([-math.inf, 0.0], Interval(-math.inf, 0.0)),
        ([-math.inf], UNBOUNDED),
        ([math.inf], UNBOUNDED),
        ([], UNBOUNDED),
    ],
)
def test_constants(array: list[float], expected: Interval) -> None:
    model = Model.from_proto(model_of("y = Relu(a)"))
    constant = model.add_initializer("c", np.array(array, np.float32))
    assert Ranges(model).raw(constant) == expected


def test_integer_constants_are_unbounded_because_integers_wrap_and_truncate() -> None:
    model = Model.from_proto(model_of("y = Relu(a)"))
    assert Ranges(model).raw(model.values()["zero"]) == UNBOUNDED


# Grids


def test_consumers_see_a_tensor_saturated_to_its_grid() -> None:
    model = Model.from_proto(model_of("y = Relu(a)", UNBOUNDED))
    a = model.values()["a"]
    model.scales.set(a, QuantParams.make(0.5, 0))
    assert Ranges(model).seen(a) == Interval(-64, 63.5)
    assert Ranges(model).raw(a) == UNBOUNDED
    assert Ranges(model).raw(model.values()["y"]) == Interval(0, 63.5)


def test_a_grid_widened_after_training_is_seen_as_trained() -> None:
    model = Model.from_proto(model_of("y = Relu(a)", UNBOUNDED))
    a = model.values()["a"]
    model.scales.set(a, QuantParams.make(0.5, 0, UINT8).with_(trained=Interval(0, 63.5)))
    assert Ranges(model).seen(a) == Interval(0, 63.5)


@settings(max_examples=60, deadline=None)
@given(a=intervals, step=st.floats(0.01, 3), zero=st.integers(-128, 127), bits=st.sampled_from([4, 8]))
def test_rounding_to_a_grid_stays_inside_of_what_consumers_see(
    a: Interval, step: float, zero: int, bits: int
) -> None:
    dtype = QuantDType(bits, signed=True)
    params = QuantParams.make(step, max(min(zero, dtype.qmax), dtype.qmin), dtype)
    model = Model.from_proto(model_of("y = Relu(a)", a))
    value = model.values()["a"]
    model.scales.set(value, params)
    seen = Ranges(model).seen(value)
    values = np.linspace(a.lo, a.hi, 50).astype(np.float32)
    rounded = params.dequantize(params.quantize(values))
    assert np.all((rounded >= seen.lo - 1e-4) & (rounded <= seen.hi + 1e-4))
    assert params.interval.contains(seen)


def test_zero_stays_the_lower_end_on_any_grid() -> None:
    model = Model.from_proto(model_of("y = Relu(a)", Interval(0, 1)))
    a = model.values()["a"]
    model.scales.set(a, QuantParams.make(0.3, 7))
    assert Ranges(model).seen(a).lo == 0.0


def test_refresh_reads_the_grids_written_since() -> None:
    model = Model.from_proto(model_of("y = Relu(a)", UNBOUNDED))
    ranges = Ranges(model)
    model.scales.set(model.values()["a"], QuantParams.make(1.0, 0))
    assert ranges.raw(model.values()["y"]) == Interval(0, math.inf)
    ranges.refresh(model.graph[-1])
    assert ranges.raw(model.values()["y"]) == Interval(0, 127)


# Statistics


def moments(mean: list[float], std: list[float], axis: int = 1) -> ChannelMoments:
    return ChannelMoments(np.array(mean, np.float32), np.array(std, np.float32), axis, "BatchNormalization 'b'")


def test_statistics_bound_only_who_asks_for_them() -> None:
    model = Model.from_proto(model_of("y = Exp(a)"))
    y = model.values()["y"]
    model.moments[y] = moments([0, 10], [1, 2])
    assert Ranges(model).raw(y) == UNBOUNDED
    assert Ranges(model, 3.0).raw(y) == Interval(-3, 16)


def test_statistics_and_proof_intersect_and_proof_wins() -> None:
    model = Model.from_proto(model_of("y = Relu(a)"))
    y = model.values()["y"]
    model.moments[y] = moments([1], [0.5])
    assert Ranges(model, 4.0).raw(y) == Interval(0, 3)
    model.moments[y] = moments([9], [0.5])
    assert Ranges(model, 4.0).raw(y) == Interval(0, 3)


def sum_of(left: ChannelMoments, right: ChannelMoments) -> Interval:
    model = Model.from_proto(model_of("p = Exp(a)\nq = Exp(b)\ny = Add(p, q)"))
    values = model.values()
    model.moments[values["p"]], model.moments[values["q"]] = left, right
    before = dict(model.moments)
    span = Ranges(model, 1.0).raw(values["y"])
    assert model.moments == before, "the model's own statistics were changed"
    return span


def test_statistics_add_channel_by_channel() -> None:
    # Hulls would add to [-2 + -12, 12 + 2].
    assert sum_of(moments([-1, 10], [1, 2]), moments([1, -10], [1, 2])) == Interval(-4, 4)


@pytest.mark.parametrize("right", [moments([1, -10], [1, 2], axis=2), moments([1], [1])])
def test_statistics_of_unlike_channels_do_not_add(right: ChannelMoments) -> None:
    left = moments([-1, 10], [1, 2])
    expected = moments_interval(left, 1.0) + moments_interval(right, 1.0)
    assert sum_of(left, right) == expected


def test_statistics_of_unequal_ranks_do_not_add() -> None:
    model = Model.from_proto(model_of("p = Exp(a)\nq = Squeeze(b, zero)\nr = Exp(q)\ny = Add(p, r)"))
    values = model.values()
    values["p"].shape, values["r"].shape = oir.Shape([1, 4, 4, 4]), oir.Shape([4, 4, 4])
    model.moments[values["p"]] = moments([0, 10, 0, 0], [1] * 4)
    model.moments[values["r"]] = moments([0, -10, 0, 0], [1] * 4)
    assert Ranges(model, 1.0).raw(values["y"]) == Interval(-12, 12)


def test_a_tensor_added_to_itself_doubles() -> None:
    model = Model.from_proto(model_of("p = Exp(a)\ny = Add(p, p)"))
    model.moments[model.values()["p"]] = moments([1, -1], [1, 2])
    assert Ranges(model, 2.0).raw(model.values()["y"]) == Interval(-10, 6)


def test_hard_sigmoid_has_onnx_defaults() -> None:
    model = Model.from_proto(model_of("y = HardSigmoid(a)"))
    assert hard_sigmoid_coefficients(model.graph[-1]) == (0.2, 0.5)
