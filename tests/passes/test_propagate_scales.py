from __future__ import annotations

import dataclasses
import random

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import TARGET, graph_text

from qat2int8.ir import UINT8, Code, Contract, Interval, Model, OpRule, Provenance, QuantDType, QuantParams
from qat2int8.passes import Context, PassResult
from qat2int8.passes.propagate_scales import PropagateScales

LAYERS = dataclasses.replace(TARGET, ops={"Conv": OpRule(Contract.COMPUTE, weight_axis=0)})
SIGNED = dataclasses.replace(TARGET, activation="int8", zero_point="symmetric")

CONSTANTS = """float zero = {0.0}, float one = {1.0}, float six = {6.0}, int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1},
int64[1] i0 = {0}, int64[1] i1 = {1}, int64[1] i2 = {2}, int64[2] flat = {4, 16}, int64[2] indices = {3, 0},
int64[4] repeats = {1, 2, 1, 1}, int64[5] expanded = {2, 1, 4, 4, 4}, float[4] upscale = {1, 1, 2, 2},
float[8] roi = {0, 0, 0, 0, 1, 1, 1, 1}, float[4,4,1,1] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1},
float[4,4] table = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}"""

G = QuantParams.make(0.1, origin="fake quant 'g'")
H = QuantParams.make(0.2, origin="fake quant 'h'")
DERIVED = QuantParams.make(0.1, source=Provenance.DERIVED, origin="demanded by 'r'")


def model_of(body: str, outputs: str = "float out") -> Model:
    text = body if "out = " in body or outputs != "float out" else f"{body}\nout = Exp(y)"
    return Model.from_proto(
        onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["" : 17]>\n'
            f"g (float[1,4,4,4] a, float[1,4,4,4] b, bool flag) => ({outputs}) <{CONSTANTS}> {{\n"
            f"x = Exp(a)\nu = Exp(b)\n{text}\n}}"
        )
    )


def propagated(
    body: str, outputs: str = "float out", ctx: Context | None = None, **grids: QuantParams
) -> tuple[dict[str, QuantParams], PassResult]:
    """The table after the pass, by name. The graph must not change, nor the table in a second run."""
    model = model_of(body, outputs)
    for name, params in grids.items():
        model.scales.set(model.values()[name], params)
    text = graph_text(model)
    result = settle(model, ctx)
    assert graph_text(model) == text
    return {value.name or "": params for value, params in model.scales.items()}, result


def settle(model: Model, ctx: Context | None = None) -> PassResult:
    ctx = ctx or Context(TARGET)
    result = PropagateScales().run(model, ctx)
    again = PropagateScales().run(model, ctx)
    assert not again.modified
    assert not again.diagnostics
    return result


def grids_of(table: dict[str, QuantParams]) -> dict[str, float]:
    return {name: round(float(params.scale), 6) for name, params in table.items()}


WHOLE = {
    "DepthToSpace": "y = DepthToSpace<blocksize=2>(x)",
    "Flatten": "y = Flatten(x)",
    "Identity": "y = Identity(x)",
    "Reshape": "y = Reshape(x, flat)",
    "SpaceToDepth": "y = SpaceToDepth<blocksize=2>(x)",
    "Squeeze": "y = Squeeze(x, i0)",
    "Transpose": "y = Transpose<perm=[0, 2, 3, 1]>(x)",
    "Unsqueeze": "y = Unsqueeze(x, i0)",
}
SELECTING = {
    "Expand": "y = Expand(x, expanded)",
    "Gather": "y = Gather<axis=1>(x, indices)",
    "MaxPool": "y = MaxPool<kernel_shape=[2, 2]>(x)",
    "Pad": "y = Pad(x, pads)",
    "Pad zero": "y = Pad(x, pads, zero)",
    "Pad edge": 'y = Pad<mode="edge">(x, pads, one)',
    "Resize": 'y = Resize<mode="nearest">(x, , upscale)',
    "Slice": "y = Slice(x, i1, i2)",
    "Split": "y, z = Split<axis=1>(x)",
    "Tile": "y = Tile(x, repeats)",
}
FORWARD_ONLY = {
    "AveragePool": "y = AveragePool<kernel_shape=[2, 2]>(x)",
    "GlobalAveragePool": "y = GlobalAveragePool(x)",
    "Relu": "y = Relu(x)",
    "Clip": "y = Clip(x, zero, six)",
}
NEVER = {
    "Add": "y = Add(x, x)",
    "Sigmoid": "y = Sigmoid(x)",
    "Pad with one": "y = Pad(x, pads, one)",
    "Pad with a computed filler": "f = ReduceMax<keepdims=0>(u)\ny = Pad(x, pads, f)",
    "Resize linear": 'y = Resize<mode="linear">(x, , upscale)',
    "Resize crop": 'y = Resize<coordinate_transformation_mode="tf_crop_and_resize">(x, roi, upscale)',
    "ReduceMax": "y = ReduceMax(x)",
    "MaxPool with indices": "y, i = MaxPool<kernel_shape=[2, 2]>(x)\nj = Cast<to=1>(i)\nout = Add(y, j)",
    "Gather by it": "c = Cast<to=7>(u)\ny = Gather<axis=1>(u, c)",
    "LeakyRelu": "y = LeakyRelu(x)",
}


@pytest.mark.parametrize("name", [*WHOLE, *SELECTING])
def test_movement_carries_a_grid_both_ways(name: str) -> None:
    body = {**WHOLE, **SELECTING}[name]
    forth, result = propagated(body, x=G)
    assert forth["x"].same_grid(G)
    assert forth["y"].same_grid(G)
    assert forth["y"].source is Provenance.TRAINED
    assert forth["y"].origin == G.origin
    assert result.counts == {"propagated": len(forth) - 1}
    back, _ = propagated(body, y=G)
    assert back["x"].same_grid(G)
    assert not result.diagnostics


@pytest.mark.parametrize("name", FORWARD_ONLY)
def test_what_mixes_or_clamps_carries_forward_only(name: str) -> None:
    forth, _ = propagated(FORWARD_ONLY[name], x=QuantParams.make(0.1, 0, UINT8))
    assert forth["y"].same_grid(QuantParams.make(0.1, 0, UINT8))
    back, result = propagated(FORWARD_ONLY[name], y=G)
    assert set(back) == {"y"}
    assert not result.modified


@pytest.mark.parametrize("name", NEVER)
def test_other_nodes_carry_nothing(name: str) -> None:
    assert set(propagated(NEVER[name], x=G)[0]) == {"x"}
    assert set(propagated(NEVER[name], y=G)[0]) == {"y"}


@pytest.mark.parametrize(
    "body", [WHOLE["Flatten"], SELECTING["MaxPool"], FORWARD_ONLY["Relu"], "y = Concat<axis=1>(x)"]
)
def test_an_op_of_another_domain_carries_nothing(body: str) -> None:
    model = model_of(body)
    next(node for node in model.graph if node.outputs[0].name == "y").domain = "my.domain"
    for name in "xy":
        model.scales.set(model.values()[name], G)
        assert not PropagateScales().run(model, Context(TARGET)).modified
        model.scales.discard(model.values()[name])


def test_the_filler_of_an_old_pad_is_an_attribute() -> None:
    for filler, reached in (("0.0", {"x", "y"}), ("1.0", {"x"})):
        model = Model.from_proto(onnx.parser.parse_model(
            '<ir_version: 4, opset_import: ["" : 10]> g (float[4] a) => (float y) '
            f"{{ x = Exp(a)\n y = Pad<pads=[1, 1], value={filler}>(x) }}"
        ))  # fmt: skip
        model.scales.set(model.values()["x"], G)
        PropagateScales().run(model, Context(TARGET))
        assert {value.name for value in model.scales} == reached


# Which grids speak for which elements


@pytest.mark.parametrize("name", SELECTING)
def test_a_selection_says_nothing_of_what_somebody_else_reads(name: str) -> None:
    body = f"{SELECTING[name]}\ne = Exp(x)\nout = Exp(y)"
    assert "x" not in propagated(body, y=G)[0]
    assert propagated(body, x=G)[0]["y"].same_grid(G)


@pytest.mark.parametrize("name", WHOLE)
def test_a_rearrangement_speaks_for_all_elements_whoever_reads_them(name: str) -> None:
    assert "x" in propagated(f"{WHOLE[name]}\ne = Exp(x)\nout = Exp(y)", y=G)[0]


@pytest.mark.parametrize(
    "other",
    [
        'o = Resize<mode="linear">(x, , upscale)',
        "o = Pad(x, pads, one)",
        "o = Slice(x, i0, i1)",
        "c = Cast<to=7>(x)\no = Gather(u, c)",
        "o = Expand(u, x)",
        "o = Relu(x)",
    ],
)
def test_other_readers_are_judged_by_what_they_do_not_by_their_op_type(other: str) -> None:
    body = f"y = MaxPool<kernel_shape=[2, 2]>(x)\n{other}\nout = Exp(y)\np = Exp(o)"
    assert set(propagated(body, y=G)[0]) == {"y"}


def test_a_reader_of_shapes_is_no_movement_of_the_tensor_even_if_it_ends_on_a_grid() -> None:
    body = "y = MaxPool<kernel_shape=[2, 2]>(x)\no = Expand(u, x)\nout = Exp(y)\np = Exp(o)"
    assert "x" not in propagated(body, y=G, o=H)[0]


def test_a_graph_output_is_a_reader() -> None:
    body = "y = MaxPool<kernel_shape=[2, 2]>(x)\nout = Exp(y)"
    assert set(propagated(body, "float out, float x", y=G)[0]) == {"y"}


def test_a_pool_between_two_trained_grids_keeps_both() -> None:
    body = "y = MaxPool<kernel_shape=[2, 2]>(x)"
    table, result = propagated(body, x=H, y=G)
    assert grids_of(table) == {"x": 0.2, "y": 0.1}
    assert not result.diagnostics
    assert grids_of(propagated(body, x=H, y=DERIVED)[0]) == {"x": 0.2, "y": 0.2}
    assert grids_of(propagated("y = Identity(x)", x=H, y=G)[0]) == {"x": 0.2, "y": 0.2}


def test_a_split_takes_back_what_all_of_its_readers_know() -> None:
    body = "y, z = Split<axis=1>(x)\nout = Exp(y)\np = Exp(z)"
    assert set(propagated(body, y=G)[0]) == {"y"}, "z may be larger than y ever was"
    both, result = propagated(body, y=G, z=H)
    assert grids_of(both) == {"y": 0.2, "z": 0.2, "x": 0.2}
    assert [note.value for note in result.diagnostics] == ["y"]


def test_slices_that_all_end_on_grids_speak_for_the_whole() -> None:
    body = "s = Slice(x, i0, i1)\nt = Slice(x, i1, i2)\nf = Flatten(t)\ny = Flatten(s)\nout = Exp(y)\np = Exp(f)"
    assert grids_of(propagated(body, y=G, f=H)[0])["x"] == 0.2
    assert "x" not in propagated(body, y=G)[0]


def test_what_a_concat_gives_completes_a_split_above() -> None:
    body = "y, z = Split<axis=1>(x)\nc = Concat<axis=1>(z, u)\nout = Exp(y)\np = Exp(c)"
    table, _ = propagated(body, y=G, c=H)
    assert grids_of(table) == dict.fromkeys(("x", "y", "z", "u", "c"), 0.2)


def test_a_value_read_in_a_subgraph_is_read() -> None:
    body = """y = MaxPool<kernel_shape=[2, 2]>(x)
        out = Exp(y)
        q = If (flag) <
            then_branch = t () => (float p) { p = Flatten(x) },
            else_branch = e () => (float o) { o = Flatten(u) }
        >
        k = Concat<axis=1>(u, u)
        l = Exp(k)"""
    table, _ = propagated(body, y=G, k=H)
    assert set(table) == {"y", "k"}
    assert set(propagated(body, x=G, u=H)[0]) == {"x", "y", "u", "k"}


# Conflicts


def test_the_stronger_grid_wins_and_a_trained_one_that_loses_is_reported() -> None:
    user = QuantParams.make(0.01, source=Provenance.USER, origin="the user")
    table, result = propagated(WHOLE["Flatten"], x=H, y=user)
    assert grids_of(table) == {"x": 0.01, "y": 0.01}
    (note,) = result.diagnostics
    assert (note.code, note.value) == (Code.SCALE_CONFLICT, "x")
    assert "fake quant 'h'" in note.reason
    assert "the user" in note.reason
    assert note.remedy


def test_a_derived_grid_gives_way_in_silence() -> None:
    table, result = propagated(WHOLE["Flatten"], x=QuantParams.make(9.0, source=Provenance.DERIVED), y=G)
    assert grids_of(table) == {"x": 0.1, "y": 0.1}
    assert not result.diagnostics


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        (G, H),
        # The same largest magnitude: the one that also holds negative numbers is wider.
        (QuantParams.make(12.7 / 255, 0, UINT8), QuantParams.make(0.1)),
        (QuantParams.make(13 / 255, 0, UINT8), QuantParams.make(0.1)),
        (QuantParams.make(0.1, 0, UINT8).with_(trained=Interval(0, 12.7)), QuantParams.make(0.2, -100)),
    ],
)
def test_of_equally_strong_grids_the_widest_wins(narrow: QuantParams, wide: QuantParams, swapped: bool) -> None:
    first, second = (wide, narrow) if swapped else (narrow, wide)
    table, result = propagated(WHOLE["Flatten"], x=first, y=second)
    assert table["x"].same_grid(wide)
    assert table["y"].same_grid(wide)
    assert len(result.diagnostics) == 1


def test_a_pool_with_an_outside_reader_and_a_grid_of_its_own_keeps_it() -> None:
    table, result = propagated(f"{SELECTING['MaxPool']}\ne = Exp(x)\nout = Exp(y)", x=H, y=G)
    assert grids_of(table) == {"x": 0.2, "y": 0.1}
    assert not result.diagnostics


def test_an_agreement_is_no_conflict() -> None:
    _, result = propagated(WHOLE["Flatten"], x=G, y=G.with_(origin="another"))
    assert not result.modified
    assert not result.diagnostics


# Relu and Clip


@pytest.mark.parametrize(
    ("params", "top"),
    [(G, 12.7), (QuantParams.make(0.1, 128, UINT8), 12.7), (QuantParams.make(0.1, 0, QuantDType(4, True)), 0.7)],
)
def test_a_relu_keeps_the_steps_and_drops_what_is_below_zero(params: QuantParams, top: float) -> None:
    y = propagated("y = Relu(x)", x=params)[0]["y"]
    assert (float(y.scale), int(y.zero_point)) == (float(params.scale), 0)
    assert not y.dtype.signed
    assert y.interval.hi == pytest.approx(top)
    values = np.linspace(-20, 20, 401).astype(np.float32)
    relu = np.maximum(params.dequantize(params.quantize(values)), 0)
    np.testing.assert_array_equal(y.dequantize(y.quantize(np.maximum(values, 0))), relu)


def test_behind_a_relu_a_grid_that_nobody_trained_may_use_the_whole_type() -> None:
    y = propagated("y = Relu(x)", x=G.with_(source=Provenance.DERIVED))[0]["y"]
    assert (float(y.scale), int(y.zero_point), y.dtype) == (float(G.scale), 0, UINT8)
    assert y.trained is not None
    assert y.trained.hi == pytest.approx(12.7)


def test_a_target_with_signed_activations_gets_a_grid_it_can_hold() -> None:
    y = propagated("y = Relu(x)", ctx=Context(SIGNED), x=G)[0]["y"]
    assert y.same_grid(G)
    assert SIGNED.lower(y) is not None


@pytest.mark.parametrize(
    "params",
    [QuantParams.make(0.1, 0, QuantDType(16, signed=True)), QuantParams.make([0.1] * 4, axis=1)],
)
def test_a_relu_passes_on_what_uint8_cannot_take(params: QuantParams) -> None:
    assert propagated("y = Relu(x)", x=params)[0]["y"].same_grid(params)


def test_a_clip_whose_bounds_lie_beyond_the_grid_gets_none() -> None:
    assert set(propagated("y = Clip(x, one, six)", x=QuantParams.make(0.001))[0]) == {"x"}


# Concat


def test_a_concat_gives_its_grid_to_inputs_that_have_none() -> None:
    body = "f = Flatten(x)\ng = Flatten(u)\ny = Concat<axis=1>(f, g, table)\nout = Exp(y)"
    assert grids_of(propagated(body, y=G)[0]) == dict.fromkeys(("y", "f", "g", "x", "u"), 0.1)
    assert grids_of(propagated(body, y=G, g=H)[0]) == {"y": 0.1, "f": 0.1, "x": 0.1, "g": 0.2, "u": 0.2}


@pytest.mark.parametrize("reader", ["e = Exp(x)", "e = Flatten(x)"])
def test_a_concat_gives_nothing_to_what_others_read(reader: str) -> None:
    body = f"y = Concat<axis=1>(x, u)\n{reader}\nout = Exp(y)\nk = Exp(e)"
    assert set(propagated(body, y=G)[0]) == {"y", "u"}


def test_a_concat_takes_the_grid_its_inputs_agree_on() -> None:
    body = "y = Concat<axis=1>(x, u)"
    assert propagated(body, x=G, u=G)[0]["y"].same_grid(G)
    assert set(propagated(body, x=G, u=H)[0]) == {"x", "u"}
    assert set(propagated(body, x=G)[0]) == {"x"}
    per_channel = QuantParams.make([0.1] * 4, axis=1)
    assert "y" not in propagated(body, x=per_channel, u=per_channel)[0]
    assert "x" not in propagated(body, y=QuantParams.make([0.1] * 8, axis=1))[0]


def test_nested_concats_are_reached() -> None:
    body = "c = Concat<axis=1>(x, u)\nf = Flatten(c)\nd = Flatten(b)\ny = Concat<axis=1>(f, d)"
    assert set(propagated(body, y=G)[0]) == {"y", "f", "d", "c", "x", "u"} | {"b"}


# Layers left in float


@pytest.mark.parametrize("middle", ["y = MaxPool<kernel_shape=[2, 2]>(x)", "y = Relu(x)", "y = Identity(x)"])
def test_a_grid_nobody_trained_does_not_pull_a_float_layer_into_integers(middle: str) -> None:
    body = f"{middle}\nc = Conv(y, w)\nout = Exp(c)"
    assert set(propagated(body, ctx=Context(LAYERS), x=DERIVED)[0]) == {"x"}
    assert set(propagated(body, ctx=Context(LAYERS), x=G)[0]) == {"x", "y"}
    assert propagated(body, ctx=Context(LAYERS), x=DERIVED, y=G)[0]["y"].same_grid(G)


# Channels


@pytest.mark.parametrize(
    ("body", "axis"),
    [
        ("y = Transpose<perm=[0, 2, 3, 1]>(x)", 3),
        ("y = Transpose<perm=[1, 2, 3, 0]>(x)", 0),
        ("y = Transpose(x)", 2),
        ("y = Identity(x)", 1),
        ("y = MaxPool<kernel_shape=[2, 2]>(x)", 1),
    ],
)
def test_a_channel_axis_moves_with_its_tensor(body: str, axis: int) -> None:
    model = model_of(body)
    onnx_ir_shape = model.values()["a"].shape
    model.values()["x"].shape = onnx_ir_shape
    x, y = model.values()["x"], model.values()["y"]
    params = QuantParams.make([0.1, 0.2, 0.3, 0.4], axis=1)
    model.scales.set(x, params)
    settle(model)
    assert model.scales[y].same_grid(params.with_(axis=axis))
    model.scales.discard(x)
    settle(model)
    assert model.scales[x].same_grid(params)


@pytest.mark.parametrize(
    "body", [WHOLE["Reshape"], WHOLE["Flatten"], SELECTING["Slice"], SELECTING["Pad"], SELECTING["Resize"]]
)
def test_a_channel_axis_that_does_not_survive_is_not_carried(body: str) -> None:
    params = QuantParams.make([0.1, 0.2, 0.3, 0.4], axis=1)
    assert set(propagated(body, x=params)[0]) == {"x"}


def test_beyond_a_lost_channel_axis_the_next_strongest_grid_spreads() -> None:
    params = QuantParams.make([1.0, 2.0, 3.0, 4.0], axis=1)
    body = "t = Identity(x)\nr = Reshape(t, flat)\ny = Identity(r)"
    table, _ = propagated(body, x=params, y=G)
    assert table["t"].same_grid(params)
    assert table["r"].same_grid(G)


def test_a_trained_grid_stays_trained_behind_an_equal_one_that_nobody_trained() -> None:
    narrow = QuantParams.make(0.05, origin="fake quant 'n'")
    table, _ = propagated("t = Identity(x)\nr = Identity(t)\ny = Identity(r)", x=G, t=DERIVED, r=narrow)
    assert (table["r"].source, table["r"].origin) == (G.source, G.origin)
    assert (table["y"].source, table["y"].origin) == (G.source, G.origin)


def test_constants_keep_their_own_grids() -> None:
    body = "t = Transpose<perm=[1, 0]>(table)\ny = MatMul(x, t)\nout = Exp(y)"
    assert set(propagated(body, t=G)[0]) == {"t"}
    params = QuantParams.make([0.1, 0.2, 0.3, 0.4], axis=0)
    assert propagated(body, table=params)[0]["t"].same_grid(params.with_(axis=1))


# Order


NODES = [
    ("p", "p = MaxPool<kernel_shape=[2, 2], pads=[0, 0, 1, 1]>(x)"),
    ("f", "f = Flatten(p)"),
    ("t", "t = Transpose(x)"),
    ("r", "r = Relu(u)"),
    ("s, v", "s, v = Split<axis=1>(r)"),
    ("k", "k = Concat<axis=1>(s, v)"),
    ("m", "m = MaxPool<kernel_shape=[2, 2]>(r)"),
    ("q", "q = GlobalAveragePool(m)"),
    ("i", "i = Identity(q)"),
]
TABLE_NAMES = ["x", "u", "p", "f", "t", "r", "s", "v", "k", "m", "q", "i"]
CHOICES = [G, H, QuantParams.make(0.1, 7, origin="z"), QuantParams.make(0.05, 0, UINT8, origin="w"), DERIVED]


@settings(max_examples=60, deadline=None)
@example({"f": G, "p": DERIVED, "x": CHOICES[3], "t": G}, 0)
@example({"f": G, "p": DERIVED, "x": CHOICES[3], "t": G}, 1)
@given(
    grids=st.dictionaries(st.sampled_from(TABLE_NAMES), st.sampled_from(CHOICES), max_size=6),
    seed=st.integers(0, 10**6),
)
def test_neither_names_nor_the_order_of_nodes_matter(grids: dict[str, QuantParams], seed: int) -> None:
    plain = table_of(NODES, {name: name for name in TABLE_NAMES}, grids)
    rng = random.Random(seed)
    shuffled: list[tuple[str, str]] = []
    waiting, known = list(NODES), {"x", "u"}
    while waiting:
        ready = [n for n in waiting if n[1].split("(")[-1].strip(")").split(", ")[0] in known or n[0] == "k"]
        ready = [n for n in ready if n[0] != "k" or {"s", "v"} <= known]
        node = rng.choice(ready)
        waiting.remove(node)
        shuffled.append(node)
        known |= set(node[0].split(", "))
    names = [f"n{i}" for i in range(len(TABLE_NAMES))]
    rng.shuffle(names)
    assert table_of(shuffled, dict(zip(TABLE_NAMES, names, strict=True)), grids) == plain


def table_of(
    nodes: list[tuple[str, str]], rename: dict[str, str], grids: dict[str, QuantParams]
) -> dict[str, tuple[str, str]]:
    outputs = "float t, float f, float k, float i"
    model = model_of("\n".join(text for _, text in nodes), outputs)
    values = {name: model.values()[name] for name in TABLE_NAMES}
    for name, value in values.items():
        value.name = rename[name]
    # The order in which a table was filled is no more than an order.
    for name in sorted(grids, key=lambda key: rename[key]):
        model.scales.set(values[name], grids[name])
    PropagateScales().run(model, Context(TARGET))
    assert not PropagateScales().run(model, Context(TARGET)).modified
    return {
        name: (str(model.scales[value]), model.scales[value].origin)
        for name, value in values.items()
        if value in model.scales
    }
