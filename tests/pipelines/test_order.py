"""The order of passes is checked by facts before any of them runs."""

from __future__ import annotations

import onnx
import pytest
from support import TARGET, parse

from qat2int8.ir import Fact, Model, PipelineError
from qat2int8.passes import Context, Pass, PassResult
from qat2int8.passes.canonicalize import Canonicalize
from qat2int8.pipelines.order import check_order, facts_after, facts_of
from qat2int8.pipelines.spec import Fixpoint

NOTHING: frozenset[Fact] = frozenset()


class Idle(Pass):
    name = "idle"

    def run(self, model: Model, ctx: Context) -> PassResult:
        return PassResult()


class Gather(Idle):
    name = "gather"
    provides = frozenset({Fact.WEIGHT_SCALES})


class Spoil(Idle):
    name = "spoil"
    invalidates = frozenset({Fact.WEIGHT_SCALES})


class Insert(Idle):
    name = "insert"
    requires = frozenset({Fact.WEIGHT_SCALES})


class Renew(Idle):
    name = "renew"
    requires = frozenset({Fact.WEIGHT_SCALES})
    provides = frozenset({Fact.WEIGHT_SCALES})
    invalidates = frozenset({Fact.WEIGHT_SCALES})


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[Pass]]:
    known: dict[str, type[Pass]] = {"gather": Gather, "insert": Insert, "spoil": Spoil}
    monkeypatch.setattr("qat2int8.pipelines.order.all_passes", lambda: known)
    return known


def refusal(*passes: Pass | Fixpoint[Pass], facts: frozenset[Fact] = NOTHING) -> str:
    with pytest.raises(PipelineError) as caught:
        check_order(passes, facts)
    return str(caught.value)


def test_a_requirement_that_holds_is_accepted() -> None:
    check_order((Gather(), Idle(), Insert()), NOTHING)
    check_order((Insert(),), frozenset({Fact.WEIGHT_SCALES}))
    check_order((Gather(), Spoil(), Gather(), Insert()), NOTHING)


def test_a_requirement_nothing_provides_names_the_pass_that_would(registry: object) -> None:
    assert refusal(Idle(), Insert()) == (
        "insert (position 2) requires weight-scales, which nothing before it provides (put gather before it)"
    )


def test_a_provider_that_comes_too_late_is_to_be_moved(registry: object) -> None:
    assert refusal(Insert(), Idle(), Gather()) == (
        "insert (position 1) requires weight-scales, which nothing before it provides "
        "(move gather (position 3) before it)"
    )


def test_a_requirement_that_was_taken_away_names_the_taker(registry: object) -> None:
    assert refusal(Gather(), Spoil(), Idle(), Insert()) == (
        "insert (position 4) requires weight-scales, which spoil at position 2 invalidates (put gather between)"
    )


def test_the_last_taker_is_named_and_every_provider_offered(registry: dict[str, type[Pass]]) -> None:
    registry["renew"] = Renew
    assert refusal(Gather(), Spoil(), Gather(), Spoil(), Insert()) == (
        "insert (position 5) requires weight-scales, which spoil at position 4 invalidates "
        "(put gather or renew between)"
    )


def test_a_pass_is_not_its_own_remedy(registry: dict[str, type[Pass]]) -> None:
    registry.clear()
    registry["renew"] = Renew
    assert refusal(Renew()).endswith("which nothing before it provides (no known pass provides it)")


def test_a_pass_may_take_and_give_the_same_fact() -> None:
    check_order((Gather(), Renew(), Insert()), NOTHING)
    assert facts_after((Gather(), Renew()), NOTHING) == {Fact.WEIGHT_SCALES}


def test_a_fixpoint_is_checked_for_its_second_round(registry: object) -> None:
    check_order((Gather(), Fixpoint((Insert(), Idle()))), NOTHING)
    assert refusal(Gather(), Fixpoint((Insert(), Spoil()))) == (
        "insert (position 2) requires weight-scales, which spoil at position 3 invalidates (put gather after it)"
    )
    check_order((Gather(), Fixpoint((Insert(), Spoil(), Gather()))), NOTHING)


def test_positions_count_through_a_fixpoint(registry: object) -> None:
    assert refusal(Fixpoint((Idle(), Idle())), Spoil(), Insert()).startswith("insert (position 4) ")


FLOAT = "g (float[1,2] x) => (float[1,2] y) <float[1,2] w = {1, 2}> { [a] y = Add (x, w) }"


def test_a_float_model_without_constants_has_float_weights_and_no_fake_quant() -> None:
    assert facts_of(parse(FLOAT)) == {
        Fact.FLOAT_WEIGHTS,
        Fact.NO_FAKE_QUANT,
        Fact.CONSTANTS_LIFTED,
        Fact.BN_FOLDED,
    }


@pytest.mark.parametrize(
    ("text", "lacks"),
    [
        (
            "g (float[2] x) => (float[2] y) <float s = {0.5}, int8 z = {0}> "
            "{ q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z) }",
            {Fact.FLOAT_WEIGHTS, Fact.NO_FAKE_QUANT},
        ),
        (
            '<ir_version: 8, opset_import: ["" : 17, "qonnx.custom_op.general" : 1]> '
            "g (float[2] x, float s) => (float[2] y) { y = qonnx.custom_op.general.Quant (x, s) }",
            {Fact.FLOAT_WEIGHTS, Fact.NO_FAKE_QUANT},
        ),
        (
            "g (int8[1,2] x, int8[2,1] w) => (int32[1,1] y) { y = MatMulInteger (x, w) }",
            {Fact.FLOAT_WEIGHTS, Fact.NO_FAKE_QUANT},
        ),
        (
            "g (float[2] x) => (float[2] y) { c = Constant <value_float = 1.0> () y = Add (x, c) }",
            {Fact.CONSTANTS_LIFTED},
        ),
        ("g (float[2] x) => (float[2] y) { y = Identity (x) }", {Fact.CONSTANTS_LIFTED}),
        (
            "g (float[1,1,2,2] x, float[1] s) => (float[1,1,2,2] y) { y = BatchNormalization (x, s, s, s, s) }",
            {Fact.BN_FOLDED},
        ),
        (
            "g (bool c, float[2] x) => (float[2] y) { y = If (c) <"
            "then_branch = t () => (float[2] a) { k = Constant <value_float = 1.0> () a = Add (x, k) },"
            "else_branch = e () => (float[2] b) { b = Neg (x) }> }",
            {Fact.CONSTANTS_LIFTED},
        ),
    ],
)
def test_what_a_model_lacks(text: str, lacks: set[Fact]) -> None:
    everything = facts_of(parse(FLOAT))
    model = Model.from_proto(onnx.parser.parse_model(text)) if text.startswith("<") else parse(text)
    assert facts_of(model) == everything - lacks


def test_constants_inside_a_function_are_not_lifted() -> None:
    model = Model.from_proto(
        onnx.parser.parse_model(
            """
            <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
            g (float[2] x) => (float[2] y) { [f] y = local.Twice (x) }
            <domain: "local", opset_import: ["" : 17]>
            Twice (a) => (b) { c = Constant <value_float = 2.0> () b = Mul (a, c) }
            """
        )
    )
    assert Fact.CONSTANTS_LIFTED not in facts_of(model)


def test_an_initializer_that_is_an_input_is_no_lifted_constant() -> None:
    proto = parse(FLOAT).to_proto()
    proto.graph.input.add().CopyFrom(proto.graph.input[0])
    proto.graph.input[1].name = "w"
    assert Fact.CONSTANTS_LIFTED not in facts_of(Model.from_proto(proto))


def test_scales_are_never_taken_for_gathered() -> None:
    assert facts_of(parse(FLOAT)).isdisjoint({Fact.WEIGHT_SCALES, Fact.INPUT_SCALES, Fact.OUTPUT_SCALES})


def test_what_canonicalize_provides_holds_after_it() -> None:
    model = parse("g (float[2] x) => (float[2] y) { c = Constant <value_float = 1.0> () y = Add (x, c) }")
    Canonicalize().run(model, Context(TARGET))
    assert Canonicalize.provides <= facts_of(model)
