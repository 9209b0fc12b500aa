"""The manager runs passes in order and checks each against its own word."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from support import TARGET, graph_text, parse

from qat2int8.ir import (
    INT8,
    ChannelMoments,
    Code,
    Fact,
    InvalidModel,
    Model,
    PassFailed,
    PipelineError,
    Provenance,
    QuantParams,
    UnsupportedModel,
)
from qat2int8.ir.verify import VerifyLevel
from qat2int8.passes import Context, Numerics, Pass, PassResult
from qat2int8.pipelines.manager import MAX_ROUNDS, PassRun, Position, run_pipeline
from qat2int8.pipelines.numeric_check import NumericCheck, compare
from qat2int8.pipelines.observers import Quiet
from qat2int8.pipelines.spec import Fixpoint, PassSpec, PipelineSpec

CTX = Context(TARGET)
CHAIN = """
g (float[4] x) => (float[4] y) <float[4] w = {1, 2, 3, 4}> {
  [a] t = Add (x, w)
  [b] u = Neg (t)
  [c] y = Neg (u)
}
"""


@dataclass(frozen=True)
class Do(Pass):
    """Does what a test wants done."""

    name = "do"
    action: Callable[[Model], object] = lambda model: None
    count: int = 0

    def run(self, model: Model, ctx: Context) -> PassResult:
        self.action(model)
        return PassResult({"done": self.count})


class DropOneNeg(Pass):
    """Removes one Neg a run: does not settle in one round."""

    name = "drop-one-neg"
    numerics = Numerics.QUANTIZING
    invalidates = frozenset({Fact.BN_FOLDED})
    provides = frozenset({Fact.PROPAGATED})

    def run(self, model: Model, ctx: Context) -> PassResult:
        for node in model.nodes("Neg"):
            model.bypass(node)
            note = self.note(Code.NODE_SKIPPED, "a Neg was dropped", node=node.name)
            return PassResult({"dropped": 1}, (note,))
        return PassResult({"dropped": 0})


class Events(Quiet):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def before(self, model: Model, pass_: Pass, position: Position) -> None:
        self.seen.append(f"before {pass_.name} {position}")

    def after(self, model: Model, run: PassRun) -> None:
        self.seen.append(f"after {run.name}")

    def failed(self, model: Model, pass_: Pass, position: Position, error: Exception) -> None:
        self.seen.append(f"failed {pass_.name}: {error}")

    def finished(self, model: Model, run: object) -> None:
        self.seen.append("finished")


def scale_weights(factor: float) -> Callable[[Model], object]:
    def action(model: Model) -> None:
        value = model.graph.initializers["w"]
        value.const_value = oir.tensor(np.float32([1, 2, 3, 4]) * np.float32(factor), name="w")

    return action


def test_passes_run_in_order_and_report() -> None:
    model, events = parse(CHAIN), Events()
    run = run_pipeline(model, (DropOneNeg(), Do(), DropOneNeg(), DropOneNeg()), CTX, observers=[events])
    assert [(r.name, r.result.modified, str(r.position)) for r in run.runs] == [
        ("drop-one-neg", True, "position 1"),
        ("do", False, "position 2"),
        ("drop-one-neg", True, "position 3"),
        ("drop-one-neg", False, "position 4"),
    ]
    assert graph_text(model) == graph_text(
        parse("g (float[4] x) => (float[4] y) <float[4] w = {1, 2, 3, 4}> { [a] y = Add (x, w) }")
    )
    assert run.changed
    assert run.counts == {"drop-one-neg": {"dropped": 2}}
    assert [d.node for d in run.diagnostics] == ["b", "c"]
    assert all(r.seconds >= 0 for r in run.runs)
    assert events.seen[:3] == ["before drop-one-neg position 1", "after drop-one-neg", "before do position 2"]
    assert events.seen[-1] == "finished"


def test_facts_at_the_end_come_with_the_run() -> None:
    run = run_pipeline(parse(CHAIN), (DropOneNeg(),), CTX, facts=frozenset({Fact.BN_FOLDED, Fact.FLOAT_WEIGHTS}))
    assert run.facts == {Fact.PROPAGATED, Fact.FLOAT_WEIGHTS}


def test_a_spec_is_built_and_run() -> None:
    run = run_pipeline(parse(CHAIN), PipelineSpec((PassSpec("canonicalize"),) * 2), CTX)
    assert [PassSpec.of(r.pass_) for r in run.runs] == [PassSpec("canonicalize")] * 2
    assert not run.runs[1].result.modified


def test_a_pipeline_in_the_wrong_order_runs_nothing() -> None:
    @dataclass(frozen=True)
    class Needy(Do):
        name = "needy"
        requires = frozenset({Fact.WEIGHT_SCALES})

    model, events = parse(CHAIN), Events()
    with pytest.raises(PipelineError, match=r"needy \(position 2\) requires weight-scales"):
        run_pipeline(model, (DropOneNeg(), Needy()), CTX, observers=[events])
    assert events.seen == []
    assert len(list(model.nodes("Neg"))) == 2
    run_pipeline(model, (Needy(),), CTX, facts=frozenset({Fact.WEIGHT_SCALES}))


def test_a_fixpoint_runs_until_a_whole_round_changes_nothing() -> None:
    run = run_pipeline(parse(CHAIN), (Do(), Fixpoint((DropOneNeg(), Do()))), CTX)
    assert [(r.name, str(r.position)) for r in run.runs] == [
        ("do", "position 1"),
        ("drop-one-neg", "position 2, round 1"),
        ("do", "position 3, round 1"),
        ("drop-one-neg", "position 2, round 2"),
        ("do", "position 3, round 2"),
        ("drop-one-neg", "position 2, round 3"),
        ("do", "position 3, round 3"),
    ]
    assert run.runs[0].position.total == 3


def test_a_fixpoint_that_does_not_settle_names_who_is_to_blame() -> None:
    calls: list[int] = []
    restless = Do(lambda model: calls.append(1), count=1)
    with pytest.raises(PassFailed, match=r"position 2: the fixpoint does not settle: do still changed") as caught:
        run_pipeline(parse(CHAIN), (DropOneNeg(), Fixpoint((DropOneNeg(), restless))), CTX)
    assert "drop-one-neg" not in caught.value.what
    assert len(calls) == MAX_ROUNDS


def test_an_error_of_a_pass_gets_its_name_and_position() -> None:
    def refuse(model: Model) -> None:
        raise UnsupportedModel("cannot do this", where="node 'a'", remedy="try that")

    events = Events()
    with pytest.raises(UnsupportedModel) as caught:
        run_pipeline(parse(CHAIN), (DropOneNeg(), Do(refuse)), CTX, observers=[events])
    assert str(caught.value) == "do (position 2): node 'a': cannot do this (try that)"
    assert events.seen[-1] == f"failed do: {caught.value}"


def test_a_crash_of_a_pass_is_a_failure_with_the_crash_behind_it() -> None:
    def crash(model: Model) -> None:
        raise KeyError("w")

    events = Events()
    with pytest.raises(
        PassFailed, match=r"do \(position 1\): failed unexpectedly: KeyError: 'w'.*--debug"
    ) as caught:
        run_pipeline(parse(CHAIN), (Do(crash),), CTX, observers=[events])
    assert isinstance(caught.value.__cause__, KeyError)
    assert events.seen[-1].startswith("failed do")


def test_an_interrupt_is_not_taken_for_a_crash() -> None:
    def interrupt(model: Model) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_pipeline(parse(CHAIN), (Do(interrupt),), CTX)


def set_grid(model: Model) -> None:
    params = QuantParams.make(0.5, 0, INT8, source=Provenance.USER, origin="test")
    model.scales.set(model.values()["t"], params)


def set_moments(model: Model) -> None:
    ones = np.ones(4, np.float32)
    model.moments[model.values()["t"]] = ChannelMoments(ones, ones, 0, "test")


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.bypass(next(model.nodes("Neg"))),
        lambda model: setattr(next(model.nodes("Neg")), "name", "other"),
        lambda model: model.add_initializer("v", np.float32([1])),
        scale_weights(2),
        lambda model: next(model.nodes("Add")).attributes.add(oir.AttrInt64("flag", 1)),
        lambda model: next(model.nodes("Neg")).replace_input_with(0, model.graph.inputs[0]),
        set_grid,
        set_moments,
    ],
)
def test_a_change_that_is_not_counted_is_a_lie(change: Callable[[Model], object]) -> None:
    with pytest.raises(PassFailed, match=r"do \(position 1\): changed the model but counted no change"):
        run_pipeline(parse(CHAIN), (Do(change),), CTX, verify=VerifyLevel.STRUCTURE)
    run_pipeline(parse(CHAIN), (Do(change),), CTX, verify=VerifyLevel.NONE)
    run_pipeline(parse(CHAIN), (Do(change, count=1),), CTX, verify=VerifyLevel.STRUCTURE)


def rename_output(model: Model) -> None:
    model.graph.outputs[0].name = "z"


def dangle(model: Model) -> None:
    model.graph.remove(next(model.nodes("Add")))


def misspell(model: Model) -> None:
    next(model.nodes("Neg")).op_type = "Negg"


@pytest.mark.parametrize(
    ("damage", "level"),
    [(rename_output, VerifyLevel.STRUCTURE), (dangle, VerifyLevel.STRUCTURE), (misspell, VerifyLevel.CHECKER)],
)
def test_a_pass_that_damages_the_model_is_caught_at_once(
    damage: Callable[[Model], object], level: VerifyLevel
) -> None:
    events = Events()
    with pytest.raises(InvalidModel, match=r"^do \(position 1\): "):
        run_pipeline(parse(CHAIN), (Do(damage, count=1), DropOneNeg()), CTX, verify=level, observers=[events])
    assert [line.split()[0] for line in events.seen] == ["before", "failed"]
    run_pipeline(parse(CHAIN), (Do(damage, count=1),), CTX, verify=VerifyLevel.NONE)


def drop_input(model: Model) -> None:
    model.graph.inputs.pop()


def test_an_input_with_a_default_may_become_a_constant_and_no_other_may_go() -> None:
    text = "g (float[4] x, float[4] w, float[4] v) => (float[4] y) { [a] t = Add (x, w) [b] y = Add (t, v) }"
    proto = parse(text).to_proto()
    for name in "wv":
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(4, np.float32), name))
    model = Model.from_proto(proto)
    run_pipeline(model, (Do(), Do(drop_input, count=1), Do(drop_input, count=1), Do()), CTX)
    assert [value.name for value in model.graph.inputs] == ["x"]
    unused = parse("g (float[4] x, float[4] w) => (float[4] y) { [a] y = Neg (x) }")
    with pytest.raises(InvalidModel, match=r"do \(position 1\): the graph's inputs were \['x', 'w'\]"):
        run_pipeline(unused, (Do(drop_input, count=1),), CTX)


def test_the_checker_is_the_default_level() -> None:
    with pytest.raises(InvalidModel):
        run_pipeline(parse(CHAIN), (Do(misspell, count=1),), CTX)


def test_names_a_pass_gave_are_known_to_the_next() -> None:
    names: list[str] = []

    def by_hand(model: Model) -> None:
        model.unique_name("seen")
        next(model.nodes("Neg")).name = "taken"

    run_pipeline(
        parse(CHAIN), (Do(by_hand, count=1), Do(lambda model: names.append(model.unique_name("taken")))), CTX
    )
    assert names == ["taken_1"]


# -- numbers --------------------------------------------------------------------------------------------------


def numeric(*passes: Pass, text: str = CHAIN) -> None:
    run_pipeline(parse(text), passes, CTX, verify=VerifyLevel.NUMERIC)


class Close(Do):
    name = "close"
    numerics = Numerics.CLOSE


class Quantizing(Do):
    name = "quantizing"
    numerics = Numerics.QUANTIZING


def test_numbers_are_held_to_the_word_of_the_pass() -> None:
    numeric(Do(scale_weights(1 + 1e-6), count=1), Close(scale_weights(1.0005), count=1))
    numeric(Quantizing(scale_weights(1.2), count=1))
    with pytest.raises(
        PassFailed, match=r"do \(position 1\): output 'y' moved by 0\.000\d+ of its range.* 1e-05 of exact"
    ):
        numeric(Do(scale_weights(1.0005), count=1))
    with pytest.raises(PassFailed, match=r"close \(position 1\): output 'y' moved by .* 0\.001 of close"):
        numeric(Close(scale_weights(1.2), count=1))
    with pytest.raises(PassFailed, match=r"quantizing \(position 1\): output 'y' kept -?\d+\.\d dB SQNR"):
        numeric(Quantizing(scale_weights(-1), count=1))


def test_each_pass_is_compared_with_the_one_before_it() -> None:
    numeric(Quantizing(scale_weights(1.2), count=1), Do(scale_weights(1.2), count=1))


def test_a_model_that_no_longer_runs_is_the_fault_of_the_pass() -> None:
    check = NumericCheck.of(parse(CHAIN))
    assert isinstance(check, NumericCheck)
    broken = parse(CHAIN)
    misspell(broken)
    with pytest.raises(PassFailed, match="no longer runs"):
        check.check(broken, Numerics.QUANTIZING)


def test_symbolic_dimensions_get_a_size_the_model_runs_with() -> None:
    flexible = "g (float[N,2] x) => (float[N,2] y) { [a] y = Neg (x) }"
    even = "g (float[N] x) => (float[2] y) <int64[1] two = {2}> { [a] y = Reshape (x, two) }"
    for text in (flexible, even):
        assert isinstance(NumericCheck.of(parse(text)), NumericCheck)


def test_an_input_is_spread_over_the_quantizer_that_reads_it() -> None:
    # Drawn from [-1, 1] every element would be rounded to 0, and no change behind it would show.
    text = """
    g (float[64] x) => (float[64] y) <float s = {100}, uint8 z = {128}, float[1] w = {1}> {
      q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) [m] y = Mul (d, w)
    }
    """

    def double(model: Model) -> None:
        model.graph.initializers["w"].const_value = oir.tensor(np.float32([2]), name="w")

    with pytest.raises(PassFailed, match="moved"):
        numeric(Close(double, count=1), text=text)


def test_inputs_of_every_kind_are_drawn() -> None:
    text = """
    g (uint8[2] i, bool[2] b, float16[2] h, int64[1] n, float[2] x) => (float[2] y, float[1] z) {
      f = Cast <to = 1> (i) g = Cast <to = 1> (b) k = Cast <to = 1> (h)
      s = Add (f, g) t = Add (s, k) y = Add (t, x) z = Gather (y, n)
    }
    """
    assert isinstance(NumericCheck.of(parse(text)), NumericCheck)


def test_custom_ops_lower_the_level_with_one_warning() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17, "acme" : 1]> '
        "g (float[4] x) => (float[4] y) { [p] t = acme.Polish (x) [n] y = Neg (t) }"
    )
    model = Model.from_proto(proto)
    model.values()["t"].type, model.values()["t"].shape = model.values()["x"].type, oir.Shape([4])
    run = run_pipeline(model, (Do(), DropOneNeg()), CTX, verify=VerifyLevel.NUMERIC)
    assert [d.code for d in run.diagnostics] == [Code.UNSUPPORTED_OP, Code.NODE_SKIPPED]
    assert "onnxruntime cannot run this model" in run.diagnostics[0].reason


def array(*values: float, dtype: str = "float32") -> np.ndarray:
    return np.asarray(values, dtype)


@pytest.mark.parametrize(
    ("before", "after", "numerics", "problem"),
    [
        (array(1, 2), array(1, 2, 3), Numerics.QUANTIZING, "has shape"),
        (array(1, 2), array(1, np.nan), Numerics.QUANTIZING, "infinite or undefined"),
        (array(1, np.inf), array(1, 5), Numerics.EXACT, ""),
        (array(np.nan), array(5), Numerics.EXACT, ""),
        (array(100, 0), array(100, 5e-4), Numerics.EXACT, ""),
        (array(100, 0), array(100, 5e-3), Numerics.EXACT, "moved by 5e-05"),
        (array(0, 0), array(0, 0), Numerics.EXACT, ""),
        (array(0, 0), array(0, 1), Numerics.EXACT, "moved"),
        (array(0, 0), array(0, 0), Numerics.QUANTIZING, ""),
        (array(0, 0), array(0, 1), Numerics.QUANTIZING, "-inf dB"),
        (array(3, 4), array(3, 4.0 + 1.57), Numerics.QUANTIZING, ""),
        (array(3, 4), array(3, 4.0 + 1.60), Numerics.QUANTIZING, "9.9 dB"),
        (array(1, 2, dtype="int64"), array(1, 3, dtype="int64"), Numerics.EXACT, "changed in 1 of 2"),
        (array(1, 2, dtype="uint8"), array(0, 3, dtype="uint8"), Numerics.CLOSE, ""),
        (array(1, 2, dtype="uint8"), array(1, 4, dtype="uint8"), Numerics.CLOSE, "more than one level in 50.0%"),
        (array(0, dtype="uint8"), array(255, dtype="uint8"), Numerics.QUANTIZING, ""),
        (array(1), array(9, dtype="uint8"), Numerics.EXACT, ""),
        (array(1), array(9, dtype="float16"), Numerics.EXACT, "moved"),
        (np.zeros((0,), np.float32), np.zeros((0,), np.float32), Numerics.EXACT, ""),
        (np.zeros((0,), np.uint8), np.zeros((0,), np.uint8), Numerics.CLOSE, ""),
        (np.array(["a"], object), np.array(["b"], object), Numerics.EXACT, ""),
    ],
)
def test_compare(before: np.ndarray, after: np.ndarray, numerics: Numerics, problem: str) -> None:
    found = compare(before, after, numerics)
    assert (problem in found) if problem else not found


class OnSomeTargets(DropOneNeg):
    """As above, where the target asks for it."""

    name = "drop-on-some-targets"
    per_target = True


def test_a_pass_that_pays_on_some_targets_runs_where_one_asks_for_it() -> None:
    asking = Context(dataclasses.replace(TARGET, rewrites=(OnSomeTargets.name,)))
    for ctx, runs, left_out in ((CTX, 1, ("drop-on-some-targets",)), (asking, 3, ())):
        events = Events()
        steps = (OnSomeTargets(), DropOneNeg(), OnSomeTargets())
        run = run_pipeline(parse(CHAIN), steps, ctx, observers=[events])
        assert len(run.runs) == runs
        assert run.left_out == left_out
        assert sum(event.startswith("before") for event in events.seen) == runs
