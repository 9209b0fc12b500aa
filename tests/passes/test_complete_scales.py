from __future__ import annotations

import dataclasses
import math
from itertools import chain

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as oir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TARGET, graph_text, run

from qat2int8.ir import UINT8, Code, Contract, Interval, Model, OpRule, Provenance, QuantParams
from qat2int8.ir.model import ChannelMoments
from qat2int8.passes import Context, PassResult
from qat2int8.passes.complete_scales import CompleteScales

ACTIVATIONS = ("Relu", "Clip")
OPS = {
    "Conv": OpRule(Contract.COMPUTE, absorbs=ACTIVATIONS, weight_axis=0),
    "Gemm": OpRule(Contract.COMPUTE, absorbs=ACTIVATIONS, weight_axis=1, float_output=True),
    "MatMul": OpRule(Contract.COMPUTE, weight_axis=1, float_output=True, data_inputs=(0, 1)),
    "Add": OpRule(Contract.ELEMENTWISE, absorbs=ACTIVATIONS, data_inputs=(0, 1)),
    "Mul": OpRule(Contract.ELEMENTWISE, absorbs=ACTIVATIONS, data_inputs=(0, 1)),
    "GlobalAveragePool": OpRule(Contract.ELEMENTWISE),
    "Concat": OpRule(Contract.ELEMENTWISE, data_inputs=(-1,)),
    "Sigmoid": OpRule(Contract.ELEMENTWISE),
    "MaxPool": OpRule(Contract.MOVEMENT),
    "Reshape": OpRule(Contract.MOVEMENT),
    "Flatten": OpRule(Contract.MOVEMENT),
    "Split": OpRule(Contract.MOVEMENT),
}
CTX = Context(dataclasses.replace(TARGET, ops=OPS))

X = QuantParams.make(0.05, 0, UINT8, origin="x")
R = QuantParams.make(4.0 / 255, 0, UINT8, origin="r")
"""From 0 to 4."""
Y = QuantParams.make(6.0 / 255, 0, UINT8, origin="y")
"""From 0 to 6."""
W = QuantParams.make(0.01)

HEAD = "float[1,4,4,4] x, float[1,4,4,4] a, bool flag"
EYE = "{" + ", ".join("1" if i == j else "0" for i in range(4) for j in range(4)) + "}"


def model_of(body: str, outputs: str = "float out") -> Model:
    """``c = Conv(x, w)`` is there already, and ``r = Relu(a)``."""
    return Model.from_proto(
        onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["" : 17]>\n'
            f"g ({HEAD}) => ({outputs}) <float[4,4,1,1] w = {EYE}, "
            f"float[4,4,1,1] v = {EYE}, float[4,4] m = {EYE}> {{\n"
            f"c = Conv(x, w)\nr = Relu(a)\n{body}\n}}"
        )
    )


def completed(
    body: str,
    *,
    outputs: str = "float out",
    moments: dict[str, tuple[list[float], list[float]]] | None = None,
    sigmas: float = 6.0,
    **grids: QuantParams,
) -> tuple[dict[str, QuantParams], PassResult]:
    """What the pass added to the table, by name, with ``x``, ``w`` and ``v`` on grids from the start."""
    model = model_of(body, outputs)
    values = model.values()
    for name, params in {"x": X, "w": W, "v": W, **grids}.items():
        model.scales.set(values[name], params)
    for name, (mean, std) in (moments or {}).items():
        model.moments[values[name]] = ChannelMoments(
            np.array(mean, np.float32), np.array(std, np.float32), 1, f"BatchNormalization 'bn_{name}'"
        )
    before, text = set(model.scales), graph_text(model)
    result = CompleteScales(sigmas).run(model, CTX)
    assert graph_text(model) == text
    assert all(value in model.scales for value in before)
    again = CompleteScales(sigmas).run(model, CTX)
    assert not again.modified, "the second run derived more"
    assert again.diagnostics == result.diagnostics
    added = {value.name or "": params for value, params in model.scales.items() if value not in before}
    assert result.counts == {"derived": len(added)}
    assert all(params.source in (Provenance.DERIVED, Provenance.TRAINED) for params in added.values())
    return added, result


def holds(params: QuantParams, lo: float, hi: float, *, shifts: int = 1) -> bool:
    """Whether the grid covers [lo, hi] and not more, up to the shift that puts zero on a level.

    With ``shifts`` > 1, up to that of as many grids, one built on the range of another.
    """
    step, span = float(params.scale), params.interval
    assert step == pytest.approx((max(hi, 0) - min(lo, 0)) / 255, rel=1e-4 if shifts == 1 else shifts / 255)
    return max(abs(span.lo - min(lo, 0)), abs(span.hi - max(hi, 0))) <= 0.51 * shifts * step


RESIDUAL = "s = Add(c, r)\ny = Relu(s)\nout = Exp(y)"


def test_a_residual_block_demands_what_its_end_can_tell_apart() -> None:
    added, result = completed(RESIDUAL, r=R, y=Y)
    assert set(added) == {"c"}
    assert holds(added["c"], -4, 6)
    assert added["c"].source is Provenance.DERIVED
    assert added["c"].origin == "lower end demanded behind it; upper end demanded behind it"
    assert not result.diagnostics


def test_statistics_narrow_the_demand() -> None:
    added, _ = completed(RESIDUAL, r=R, y=Y, moments={"c": ([0, 0.5], [0.25, 0.5])})
    assert holds(added["c"], -2.5, 3.5)
    assert "BatchNormalization 'bn_c'" in added["c"].origin
    added, _ = completed(RESIDUAL, r=R, y=Y, moments={"c": ([0, 0], [0.25, 5])})
    assert holds(added["c"], -4, 6)
    added, _ = completed(RESIDUAL, r=R, y=Y, moments={"c": ([1.5, 1], [1, 0.5])})
    assert holds(added["c"], -4, 6)
    added, _ = completed(RESIDUAL, r=R, y=Y, moments={"c": ([3.0], [0.75])})
    assert holds(added["c"], -1.5, 6)
    assert added["c"].origin == "lower end from BatchNormalization 'bn_c'; upper end demanded behind it"


@pytest.mark.parametrize("sigmas", [1.0, 3.0, 6.0])
def test_sigmas_says_how_much_of_the_statistics_to_hold(sigmas: float) -> None:
    added, _ = completed(RESIDUAL, r=R, y=Y, moments={"c": ([0], [0.5])}, sigmas=sigmas)
    assert holds(added["c"], -0.5 * sigmas, 0.5 * sigmas)


def test_the_default_is_six_sigmas() -> None:
    assert CompleteScales().sigmas == 6.0


def test_a_projection_block_bounds_one_branch_by_the_other() -> None:
    body = "d = Conv(a, v)\ns = Add(c, d)\ny = Relu(s)\nout = Exp(y)"
    added, _ = completed(body, a=X, y=Y, moments={"d": ([0], [0.5])})
    # c may take back what d adds; d, then, has its statistics.
    assert holds(added["c"], -3, 9)
    assert holds(added["d"], -3, 3)
    none, result = completed(body, a=X, y=Y)
    assert not none, "each branch might undo the other"
    assert {note.value for note in result.diagnostics} == {"c", "d"}


def test_a_pool_behind_an_untrained_relu_gets_the_forward_range() -> None:
    body = "s = Add(c, r)\ny = Relu(s)\np = GlobalAveragePool(y)\nf = Flatten(p)\nout = Gemm(f, m)"
    grid = QuantParams.make(0.01, 0, UINT8)
    added, _ = completed(body, r=R, p=grid, f=grid, m=W, moments={"c": ([0], [0.5])})
    assert set(added) == {"c", "y"}
    assert holds(added["y"], 0, 7)
    # What the Relu drops is not demanded: -4 + 4 is its zero, and the statistics end before that.
    assert holds(added["c"], -3, 3)


def test_hard_swish_demands_nothing_below_minus_three() -> None:
    grid = QuantParams.make(6.375 / 255, 15, UINT8)
    added, _ = completed("y = HardSwish(c)\nout = Exp(y)", y=grid)
    assert holds(added["c"], -3, 6)
    # 3 is a whole number of steps for the gate: 84 of them.
    added, _ = completed("h = HardSigmoid<alpha=0.16666667, beta=0.5>(c)\ny = Mul(c, h)\nout = Exp(y)", y=grid)
    assert holds(added["c"], -3, 171 * 3 / 84)
    assert added["h"].same_grid(QuantParams.make(1 / 168, 0, UINT8))


def test_squeeze_and_excitation() -> None:
    body = "h = HardSigmoid<alpha=0.16666667, beta=0.5>(c)\ny = Mul(r, h)\nout = Exp(y)"
    added, _ = completed(body, r=R, y=Y)
    assert holds(added["c"], -3, 128 * 3 / 127)


def test_a_gate_that_would_be_coarse_gets_a_grid_of_its_own() -> None:
    body = "h = HardSigmoid<alpha=0.16666667, beta=0.5>(c)\ny = Mul(c, h)\nout = Exp(y)"
    added, _ = completed(body, c=QuantParams.make(1, 128, UINT8), y=Y)
    assert holds(added["h"], 0, 1)


def test_a_gate_gets_the_range_of_its_function() -> None:
    body = "h = Sigmoid(c)\ny = Mul(r, h)\nout = Exp(y)"
    added, result = completed(body, r=R, y=Y, moments={"c": ([0], [1])})
    assert set(added) == {"c", "h"}
    # Six sigmas of c end inside; the Sigmoid of what c was seen to be is 0.0025 to 0.9975.
    assert holds(added["h"], 0, 1 / (1 + math.exp(-6)))
    assert not result.diagnostics


def test_a_grid_derived_behind_a_tensor_bounds_it() -> None:
    body = "h = Sigmoid(c)\nd = Conv(a, v)\ny = Mul(d, h)\nout = Exp(y)"
    added, _ = completed(body, a=X, y=Y, moments={"d": ([0], [0.5])})
    # Nothing but h's grid says which c can be told apart: half a step from 0 and from 1.
    assert holds(added["h"], 0, 1)
    bound = math.log(255 * 2 - 1)
    assert holds(added["c"], -bound, bound)


def test_a_chain_of_sums_is_bounded_from_one_to_the_next() -> None:
    body = "s = Add(c, r)\nt = Add(s, r)\nu = Add(t, r)\nz = Relu(c)\nout = Exp(u)\nend = Exp(z)"
    added, _ = completed(body, outputs="float out, float end", r=R, moments={"c": ([0], [1])})
    assert holds(added["s"], -6, 10, shifts=4)
    assert holds(added["t"], -6, 14, shifts=4)
    assert holds(added["u"], -6, 18, shifts=4)


def test_an_operand_of_an_integer_sum_gets_a_grid() -> None:
    body = "q = Softmax(a)\ns = Add(c, q)\ny = Relu(s)\nout = Exp(y)"
    added, _ = completed(body, y=Y)
    assert holds(added["q"], 0, 1)
    assert holds(added["c"], -1, 6)


def test_a_concat_gets_the_union_of_its_inputs() -> None:
    body = "k = Concat<axis=1>(c, r)\nout = Exp(k)"
    added, _ = completed(body, r=R, moments={"c": ([0], [0.5])})
    assert holds(added["k"], -3, 4, shifts=2)


def test_movement_lies_on_the_grid_of_its_input() -> None:
    body = "p, q = Split<axis=1>(c)\nf = MaxPool<kernel_shape=[2, 2]>(p)\nout = Exp(f)\nend = Exp(q)"
    added, _ = completed(body, outputs="float out, float end", moments={"c": ([0], [0.5])})
    assert set(added) == {"c", "p", "q", "f"}
    assert all(params.same_grid(added["c"]) for params in added.values())


def test_movement_into_a_graph_output_is_left_alone() -> None:
    added, _ = completed("p = Flatten(c)\nout = Exp(p)", outputs="float out, float p", moments={"c": ([0], [0.5])})
    assert set(added) == {"c"}


def test_movement_of_what_no_integer_kernel_computes_is_left_alone() -> None:
    assert not completed("f = Flatten(r)\nout = Exp(f)\nend = Exp(c)", r=R)[0]


def test_sums_of_what_no_integer_kernel_computes_are_left_alone() -> None:
    added, _ = completed("q = Softmax(a)\ns = Add(q, r)\ny = Relu(s)\nout = Exp(y)\nend = Exp(c)", r=R, c=X)
    assert not added


# What is never invented


STATISTICS = {"c": ([0.0], [0.5])}


@pytest.mark.parametrize(
    "layer",
    [
        "d = Conv(c, v)\nout = Exp(d)",
        "k = Relu(c)\nd = Conv(k, v)\nout = Exp(d)",
        "f = Flatten(r)\nt = MatMul(m, c)\nout = Exp(t)",
    ],
)
def test_the_input_of_a_layer_is_not_invented(layer: str) -> None:
    added, result = completed(layer, moments=STATISTICS, m=W)
    assert not added
    (note,) = result.diagnostics
    assert note.code is Code.SCALE_MISSING
    assert "without a fake quant" in note.reason
    assert note.value == ("k" if "k = " in layer else "c")


def test_nor_is_it_through_movement() -> None:
    body = "p = MaxPool<kernel_shape=[2, 2]>(c)\nd = Conv(p, v)\nout = Exp(d)"
    added, _ = completed(body, moments=STATISTICS)
    assert "p" not in added


def test_a_graph_output_is_not_invented() -> None:
    added, result = completed("out = Exp(c)", outputs="float out, float c", moments=STATISTICS)
    assert not added
    assert not result.diagnostics
    assert not completed("s = Add(c, r)\nout = Relu(s)", r=R, moments=STATISTICS)[0].keys() & {"out", "s"}


@pytest.mark.parametrize(
    "head", ["o = MatMul(x, m)\nout = Exp(o)", "f = Flatten(x)\no = Gemm(x, m)\nout = Exp(o)"]
)
def test_a_head_that_can_end_in_float_does(head: str) -> None:
    added, result = completed(f"{head}\nend = Exp(c)", m=W, c=X, moments={"o": ([0], [1])})
    assert not added
    assert not result.diagnostics


@pytest.mark.parametrize("missing", ["x", "w"])
def test_a_layer_without_grids_on_what_it_reads_asks_for_none(missing: str) -> None:
    model = model_of(RESIDUAL)
    for name, params in {"x": X, "w": W, "r": R, "y": Y}.items():
        if name != missing:
            model.scales.set(model.values()[name], params)
    result = CompleteScales().run(model, CTX)
    assert not result.modified
    assert not result.diagnostics


def test_what_nothing_bounds_gets_a_reason_and_a_remedy() -> None:
    added, result = completed("s = Add(c, r)\nout = Exp(s)", r=R)
    assert not added
    (note,) = result.diagnostics
    assert (note.code, note.value, note.pass_name) == (Code.SCALE_MISSING, "c", "complete-scales")
    assert note.node == model_of(RESIDUAL).graph[0].name
    assert note.remedy


def test_trained_grids_are_not_touched() -> None:
    trained = QuantParams.make(3.0)
    model = model_of(RESIDUAL)
    for name, params in {"x": X, "w": W, "r": R, "y": Y, "c": trained}.items():
        model.scales.set(model.values()[name], params)
    assert not CompleteScales().run(model, CTX).modified
    assert model.scales[model.values()["c"]] is trained


# Corners of arithmetic


def test_a_tensor_that_is_always_zero_gets_a_step() -> None:
    added, _ = completed(RESIDUAL, r=R, y=Y, moments={"c": ([0.0], [0.0])})
    assert 0 < float(added["c"].scale) < 1e-6


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e30])
def test_tiny_and_huge_grids_give_finite_steps(size: float) -> None:
    added, _ = completed(RESIDUAL, r=QuantParams.make(size, 0, UINT8), y=QuantParams.make(size, 0, UINT8))
    assert np.isfinite(added["c"].scale)
    assert float(added["c"].scale) > 0


def test_a_derived_grid_starts_a_clamped_tensor_at_zero() -> None:
    added, _ = completed("y = Relu(c)\nk = Add(y, r)\nout = Exp(k)", r=R, moments={"c": ([1], [0.5])})
    assert int(added["y"].zero_point) == 0
    assert added["y"].interval.lo == 0


# Soundness on random residual nets


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    blocks=st.integers(1, 3),
    reach=st.sampled_from([0.3, 1.0, 20.0]),
    steps=st.tuples(st.floats(0.005, 0.1), st.floats(0.005, 0.1)),
)
def test_derived_grids_move_the_quantized_sum_by_no_more_than_their_own_rounding(
    seed: int, blocks: int, reach: float, steps: tuple[float, float]
) -> None:
    rng = np.random.default_rng(seed)
    grids = [QuantParams.make(step, 0, UINT8) for step in steps]
    lines = list(
        chain.from_iterable(
            (f"c{i} = Conv(x, w{i})", f"s{i} = Add(c{i}, y{i})", f"y{i + 1} = Relu(s{i})") for i in range(blocks)
        )
    )
    weights = {f"w{i}": (rng.standard_normal((4, 4, 1, 1)) * reach).astype(np.float32) for i in range(blocks)}
    outputs = ", ".join(f"float {kind}{i + (kind == 'y')}" for i in range(blocks) for kind in "cy")
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]>\n'
        f"g (float[1,4,4,4] x, float[1,4,4,4] a) => ({outputs.replace('float c', 'float e')}) {{\n"
        + "y0 = Relu(a)\n"
        + "\n".join([*lines, *(f"e{i} = Identity(c{i})" for i in range(blocks))])
        + "\n}"
    )
    for name, weight in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    keep = [node for node in bare.graph.node if node.op_type != "Identity"]
    del bare.graph.node[:], bare.graph.output[:]
    bare.graph.node.extend([*keep, onnx.helper.make_node("Exp", [f"y{blocks}"], ["out"])])
    bare.graph.output.append(onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None))
    model = Model.from_proto(bare)
    values = model.values()
    for name in ("x", *weights):
        model.scales.set(values[name], X)
    for i in range(blocks + 1):
        model.scales.set(values[f"y{i}"], grids[i % 2])
    CompleteScales().run(model, CTX)

    feeds = {
        "x": rng.standard_normal((1, 4, 4, 4)).astype(np.float32),
        "a": (rng.standard_normal((1, 4, 4, 4)) * 9).astype(np.float32),
    }
    sums = dict(zip([output.name for output in proto.graph.output], run(proto, feeds), strict=True))
    residual = np.maximum(feeds["a"], 0)
    for i in range(blocks):
        here, there = grids[i % 2], grids[(i + 1) % 2]
        derived = model.scales[values[f"c{i}"]]
        r = rounded(here, residual)
        exact = there.quantize(np.maximum(sums[f"e{i}"] + r, 0)).astype(int)
        ours = there.quantize(np.maximum(rounded(derived, sums[f"e{i}"]) + r, 0)).astype(int)
        # Rounding c moves the sum by half of its step at most, clamping it by nothing.
        allowed = math.floor(float(derived.scale) / 2 / float(there.scale) + 1e-3) + 1
        assert np.abs(exact - ours).max() <= allowed
        if here.interval.hi <= there.interval.hi * 0.99:
            assert allowed == 1
        residual = there.dequantize(exact)


def rounded(params: QuantParams, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return params.dequantize(params.quantize(values))


def test_the_demand_is_worth_its_place() -> None:
    """Half of the demanded range is not enough: the property above can fail."""
    span = Interval(-2, 3)
    half = CTX.target.grid_for(span, source=Provenance.DERIVED, origin="")
    c, r = np.array([-4.0, 6.0], np.float32), np.array([4.0, 0.0], np.float32)
    exact, ours = Y.quantize(np.maximum(c + r, 0)), Y.quantize(np.maximum(rounded(half, c) + r, 0))
    assert np.abs(exact.astype(int) - ours.astype(int)).max() > 50


def test_it_scales_with_the_number_of_blocks() -> None:
    visits = []
    for blocks in (40, 400):
        body = "\n".join(f"s{i} = Add({'c' if i == 0 else f's{i - 1}'}, r)" for i in range(blocks))
        model = model_of(f"{body}\nout = Exp(s{blocks - 1})")
        values = model.values()
        for name, params in {"x": X, "w": W, "r": R}.items():
            model.scales.set(values[name], params)
        model.moments[values["c"]] = ChannelMoments(np.zeros(4, np.float32), np.ones(4, np.float32), 1, "bn")
        counter = Counter(model)
        CompleteScales().run(model, CTX)
        visits.append(counter.reads)
        assert values[f"s{blocks - 1}"] in model.scales
    assert visits[1] < 15 * visits[0]


class Counter:
    """Counts how often the scale table is read."""

    def __init__(self, model: Model) -> None:
        self.reads = 0
        get = model.scales.get

        def counted(value: oir.Value | None) -> QuantParams | None:
            self.reads += 1
            return get(value)

        model.scales.get = counted  # type: ignore[method-assign]
