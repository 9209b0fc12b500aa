from support import TARGET, apply, check_pass, named, parse

from qat2int8.ir import Code, Model
from qat2int8.passes import Context
from qat2int8.passes.canonicalize import Canonicalize


def test_constants_become_initializers_and_identities_vanish() -> None:
    _, result = check_pass(
        Canonicalize(),
        """
        g (float[4] x) => (float[4] y) {
          c = Constant <value = float[4] {1, 2, 3, 4}> ()
          d = Identity (c)
          [add] y = Add (x, d)
        }
        """,
        "g (float[4] x) => (float[4] y) <float[4] c = {1, 2, 3, 4}> { [add] y = Add (x, c) }",
    )
    assert result.counts["constants lifted"] == 1


def test_nodes_without_a_name_get_one() -> None:
    model = parse("g (float[4] x) => (float[4] y) { t = Relu (x) y = Neg (t) }")
    assert apply(Canonicalize(), model).counts["nodes named"] == 2
    assert named(model.graph) == ["Relu_t", "Neg_y"]


def test_an_initializer_that_is_also_an_input_is_frozen_and_reported() -> None:
    proto = parse("g (float[4] x) => (float[4] y) <float[4] w = {1, 2, 3, 4}> { [add] y = Add (x, w) }").to_proto()
    weight = proto.graph.input.add()
    weight.CopyFrom(proto.graph.input[0])
    weight.name = "w"
    model = Model.from_proto(proto)
    result = Canonicalize().run(model, Context(TARGET))
    assert named(model.graph.inputs) == ["x"]
    assert [(d.code, d.value) for d in result.diagnostics] == [(Code.INITIALIZER_INPUT_FROZEN, "w")]
