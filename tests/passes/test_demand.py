"""Demanded ranges are sound: clamping a tensor to its demand changes no level of the grid behind it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Feeds, run

from qat2int8.ir import UINT8, UNBOUNDED, Interval, Model, QuantParams
from qat2int8.ir.ranges import Ranges
from qat2int8.passes.demand import Demand

STEPS = "int64[4] flat = {1, 8, 2, 4}, int64[2] halves = {1, 3}, int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1}"
BOUNDS = (
    "float rl = {0.5}, float rh = {2.0}, float nl = {-2.0}, float nh = {-0.5}, float cl = {-1.5}, float ch = {4.0}"
)


def model_of(body: str, outputs: str = "float y") -> onnx.ModelProto:
    """``x`` is the tensor asked about, ``r`` lies in [0.5, 2], ``n`` in [-2, -0.5], ``w`` anywhere."""
    return onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18]>\n'
        f"g (float[1,4,4,4] x, float[1,4,4,4] w) => ({outputs}) <{STEPS}, {BOUNDS}> {{\n"
        f"r = Clip(w, rl, rh)\nn = Clip(w, nl, nh)\n{body}\n}}"
    )


def demand_of(body: str, outputs: str = "", **grids: QuantParams) -> Interval:
    """Of ``x``, with ``y`` read by the one graph output unless ``outputs`` says otherwise."""
    model = Model.from_proto(
        model_of(body, outputs) if outputs else model_of(f"{body}\ndone = Identity(y)", "float done")
    )
    for name, params in grids.items():
        model.scales.set(model.values()[name], params)
    return Demand(model, Ranges(model)).of(model.values()["x"])


def close(span: Interval, lo: float, hi: float) -> bool:
    return all(a == b or math.isclose(a, b, abs_tol=1e-4) for a, b in ((span.lo, lo), (span.hi, hi)))


GRID = QuantParams.make(0.1, 100, UINT8)
"""From -10 to 15.5."""

EXACT = {
    "Relu": "y = Relu(x)",
    "Clip": "y = Clip(x, cl, ch)",
    "Clip below": "y = Clip(x, cl)",
    "Clip above": "y = Clip(x, , ch)",
    "Add": "y = Add(x, r)",
    "Add right": "y = Add(r, x)",
    "Add and Relu": "s = Add(x, r)\ny = Relu(s)",
    "Sub": "y = Sub(x, r)",
    "Sub right": "y = Sub(r, x)",
    "Mul": "y = Mul(x, r)",
    "Mul right": "y = Mul(r, x)",
    "Mul by a negative": "y = Mul(x, n)",
    "Mul and a Clip above zero": "s = Mul(x, r)\ny = Clip(s, rl, ch)",
    "Div": "y = Div(x, r)",
    "Neg": "y = Neg(x)",
    "Neg of Relu": "p = Relu(x)\ny = Neg(p)",
    "HardSwish": "y = HardSwish(x)",
    "HardSwish spelt out": "h = HardSigmoid<alpha=0.16666667, beta=0.5>(x)\ny = Mul(x, h)",
    "HardSwish spelt out, right": "h = HardSigmoid<alpha=0.16666667, beta=0.5>(x)\ny = Mul(h, x)",
    "HardSigmoid": "y = HardSigmoid(x)",
    "HardSigmoid and Mul": "h = HardSigmoid(x)\ny = Mul(h, w)",
    "LeakyRelu": "y = LeakyRelu<alpha=0.2>(x)",
    "LeakyRelu steep": "y = LeakyRelu<alpha=3.0>(x)",
    "MaxPool": "y = MaxPool<kernel_shape=[3, 3], pads=[1, 1, 1, 1]>(x)",
    "Reshape": "y = Reshape(x, flat)",
    "Pad": "y = Pad(x, pads)",
    "Concat": "y = Concat<axis=1>(w, x)",
    "Split": "y, z = Split<axis=1, num_outputs=2>(x)",
    "Max": "y = Max(x, n)",
    "Max of three": "y = Max(w, x, n)",
    "Min": "y = Min(x, r)",
    "used by itself and through Relu": "p = Relu(x)\ny = Add(p, x)",
    "subtracted from its own Relu": "p = Relu(x)\ny = Sub(p, x)",
}

WITHIN_ONE_LEVEL = {
    "Sigmoid": "y = Sigmoid(x)",
    "SiLU": "s = Sigmoid(x)\ny = Mul(x, s)",
    "SiLU right": "s = Sigmoid(x)\ny = Mul(s, x)",
}


@pytest.mark.parametrize("name", [*EXACT, *WITHIN_ONE_LEVEL])
@settings(max_examples=15, deadline=None)
@given(
    step=st.floats(0.002, 0.3),
    zero=st.integers(0, 255),
    seed=st.integers(0, 999),
    reach=st.sampled_from([1.0, 5.0, 60.0]),
)
def test_clamping_to_the_demand_changes_no_level(
    name: str, step: float, zero: int, seed: int, reach: float
) -> None:
    body = EXACT.get(name) or WITHIN_ONE_LEVEL[name]
    grid = QuantParams.make(step, zero, UINT8)
    span = demand_of(body, y=grid)
    assert span.lo <= span.hi
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((1, 4, 4, 4)) * reach).astype(np.float32)
    w = rng.standard_normal((1, 4, 4, 4)).astype(np.float32)
    clamped = np.clip(x, span.lo, span.hi).astype(np.float32)
    before, after = levels(body, grid, {"x": x, "w": w}), levels(body, grid, {"x": clamped, "w": w})
    moved = np.abs(before.astype(int) - after.astype(int))
    assert moved.max() <= (1 if name in WITHIN_ONE_LEVEL else 0)


def levels(body: str, grid: QuantParams, feeds: Feeds) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    (y,) = run(model_of(body), feeds)
    quantized: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = grid.quantize(y)
    return quantized


@pytest.mark.parametrize(
    ("name", "lo", "hi"),
    [
        ("Relu", 0, 15.5),
        ("Clip", -1.5, 4),
        ("Clip below", -1.5, 15.5),
        ("Clip above", -10, 4),
        ("Add", -12, 15),
        ("Add and Relu", -2, 15),
        ("Sub", -9.5, 17.5),
        ("Sub right", -15, 12),
        ("Mul", -20, 31),
        ("Mul by a negative", -31, 20),
        ("Mul and a Clip above zero", 0.25, 8),
        ("Div", -20, 31),
        ("Neg", -15.5, 10),
        ("HardSwish", -3, 15.5),
        ("HardSwish spelt out", -3, 15.5),
        ("HardSigmoid", -2.5, 2.5),
        ("LeakyRelu", -50, 15.5),
        ("MaxPool", -10, 15.5),
        ("Concat", -10, 15.5),
        ("Split", -10, 15.5),
        ("Max", -2, 15.5),
        ("Min", -10, 2),
        ("Sigmoid", math.log(0.05 / 0.95), math.log(0.95 / 0.05)),
        ("SiLU", -4.4999, 15.5),
    ],
)
def test_demands_are_tight(name: str, lo: float, hi: float) -> None:
    span = demand_of(EXACT.get(name) or WITHIN_ONE_LEVEL[name], y=GRID)
    tolerance = 0.02 if name == "SiLU" else 1e-4
    assert abs(span.lo - lo) < tolerance, span
    assert abs(span.hi - hi) < tolerance, span


def test_an_extremum_demands_no_more_than_the_grid() -> None:
    assert close(demand_of("y = Max(x, n)", y=QuantParams.make(0.1, 10, UINT8)), -1, 24.5)
    assert close(demand_of("y = Min(x, r)", y=QuantParams.make(0.1, 245, UINT8)), -24.5, 1)


def test_hard_swish_below_three_is_inverted() -> None:
    span = demand_of("y = HardSwish(x)", y=QuantParams.make(1.0 / 255, 0, UINT8))
    # x * (x + 3) / 6 is 1 at 1.3723.
    assert close(span, -3, (math.sqrt(33) - 3) / 2)


@pytest.mark.parametrize(
    "body",
    [
        "o = Exp(x)\ny = Relu(o)",
        "y = Add(x, x)",
        "y = Mul(x, x)",
        "y = Sub(x, x)",
        "y = Mul(x, w)",
        "q = Relu(w)\ny = Mul(x, q)",
        "y = Div(x, w)",
        "y = Div(x, n)",
        "y = Div(r, x)",
        "y = LeakyRelu<alpha=0.0>(x)",
        "y = LeakyRelu<alpha=-0.5>(x)",
        "y = HardSigmoid<alpha=-0.2>(x)",
        "y = AveragePool<kernel_shape=[2, 2]>(x)",
        "y = Clip(w, x)",
        "y, i = MaxPool<kernel_shape=[2, 2]>(x)\no = Cast<to=1>(i)",
        "s = Sigmoid(x)\ny = Mul(w, s)",
        "s = Sigmoid(x)\ny = Mul(x, s)\nz = Mul(w, s)",
        "h = HardSigmoid<alpha=0.2, beta=0.5>(x)\ny = Mul(x, h)",
        "h = HardSigmoid<alpha=0.16666667, beta=0.4>(x)\ny = Mul(x, h)",
        "y = Relu(x)\nz = Exp(x)",
        "s = Sigmoid(w)\ny = Mul(x, s)",
    ],
)
def test_near_misses_demand_everything(body: str) -> None:
    assert demand_of(body, y=GRID) == UNBOUNDED


def test_what_rests_on_the_other_operand_is_lost_with_its_range() -> None:
    assert demand_of("y = Add(x, w)", y=GRID) == UNBOUNDED
    assert close(demand_of("p = Relu(w)\ny = Add(x, p)", y=GRID), -math.inf, 15.5)
    p = QuantParams.make(0.02, 0, UINT8)
    assert close(demand_of("p = Relu(w)\ny = Add(x, p)", y=GRID, p=p), -15.1, 15.5)


def test_a_gate_on_its_own_grid_is_not_the_function_inverted() -> None:
    gate = QuantParams.make(0.5 / 255, 0, UINT8)
    for activation in ("Sigmoid(x)", "HardSigmoid<alpha=0.16666667, beta=0.5>(x)"):
        assert demand_of(f"s = {activation}\ny = Mul(x, s)", y=GRID, s=gate) == UNBOUNDED


def test_a_gate_read_elsewhere_is_demanded_there_too() -> None:
    body = "h = HardSigmoid<alpha=0.16666667, beta=0.5>(x)\ny = Mul(x, h)\nz = Mul(w, h)"
    # The gate alone says [-3, 3], the product [-3, 15.5].
    assert close(demand_of(body, y=GRID), -3, 15.5)


def test_two_readers_demand_the_hull() -> None:
    body = "y = Neg(x)\nz = Relu(x)"
    assert close(demand_of(body, y=GRID, z=QuantParams.make(0.1, 0, UINT8)), -15.5, 25.5)


def test_a_split_demands_the_hull_of_what_is_read() -> None:
    body = "a, b = Split<axis=1, num_outputs=2>(x)\ny = Relu(a)\no = Neg(b)"
    assert close(demand_of(body, "float o, float y", y=GRID, o=GRID), -15.5, 15.5)
    assert close(demand_of("a, b = Split<axis=1, num_outputs=2>(x)\ny = Relu(a)", "float y", y=GRID), 0, 15.5)


def test_a_graph_output_is_demanded_whole() -> None:
    body = "s = Add(x, r)\ny = Relu(s)\nz = Relu(x)"
    assert demand_of(body, "float y, float s", y=GRID, z=GRID).lo == -math.inf
    model = Model.from_proto(model_of(body, "float y, float s"))
    model.scales.set(model.values()["y"], GRID)
    assert Demand(model, Ranges(model)).of(model.values()["s"]) == UNBOUNDED


def test_a_reader_in_a_subgraph_demands_everything() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[4] x, bool flag) => (float[4] z, float[4] y) {
            y = Relu(x)
            z = If (flag) <
                then_branch = t () => (float[4] p) { p = Relu(x) },
                else_branch = e () => (float[4] q) { q = Identity(x) }
            >
        }"""
    model = Model.from_proto(onnx.parser.parse_model(text))
    model.scales.set(model.values()["y"], GRID)
    assert Demand(model, Ranges(model)).of(model.values()["x"]) == UNBOUNDED


@pytest.mark.parametrize(
    "body", ["s = Sigmoid(x)\ny = Mul(x, s)", "h = HardSigmoid<alpha=0.16666667>(x)\ny = Mul(x, h)", "y = Relu(x)"]
)
def test_an_op_of_another_domain_is_not_the_op_of_the_same_name(body: str) -> None:
    model = Model.from_proto(model_of(body))
    model.scales.set(model.values()["y"], GRID)
    for node in model.graph:
        if node.op_type != "Clip":
            node.domain = "my.domain"
            break
    assert Demand(model, Ranges(model)).of(model.values()["x"]) == UNBOUNDED


def test_the_grid_of_the_tensor_itself_is_not_looked_at() -> None:
    assert close(demand_of("y = Relu(x)", y=GRID, x=QuantParams.make(0.01)), 0, 15.5)


def test_a_grid_on_the_way_answers_and_ends_the_search() -> None:
    body = "s = Relu(x)\ny = Neg(s)"
    assert close(demand_of(body, y=GRID, s=QuantParams.make(0.01, 0, UINT8)), 0, 2.55)


def test_a_grid_widened_after_training_demands_what_was_trained() -> None:
    grid = QuantParams.make(0.1, 0, UINT8).with_(trained=Interval(0, 12.7))
    assert close(demand_of("y = Relu(x)", y=grid), 0, 12.7)


def chain(length: int) -> str:
    names = ["x", *(f"t{i}" for i in range(length - 1)), "y"]
    return "\n".join(f"{after} = Neg({before})" for before, after in itertools.pairwise(names))


def test_the_search_gives_up_far_away() -> None:
    assert demand_of(chain(12), y=GRID).bounded
    assert demand_of(chain(13), y=GRID) == UNBOUNDED


def test_the_search_does_not_walk_every_path_of_a_dense_graph() -> None:
    lines, layer = [], "x"
    for depth in range(9):
        lines += [f"p{depth}_{i} = Relu({layer})" for i in range(40)]
        lines.append(f"c{depth} = Concat<axis=1>({', '.join(f'p{depth}_{i}' for i in range(40))})")
        layer = f"c{depth}"
    body = "\n".join([*lines, f"y = Relu({layer})"])
    # 40 ** 9 paths; only that it ends, with a demand that is sound, is asked.
    assert demand_of(body, y=GRID).hi >= 15.5


@pytest.mark.parametrize("scale", [1e-30, 1e-17, 1e-9, 1e10, 1e30])
@pytest.mark.parametrize("name", [*EXACT, *WITHIN_ONE_LEVEL])
def test_extreme_steps_neither_crash_nor_hang(name: str, scale: float) -> None:
    span = demand_of(EXACT.get(name) or WITHIN_ONE_LEVEL[name], y=QuantParams.make(scale, 0, UINT8))
    assert span.lo <= span.hi
