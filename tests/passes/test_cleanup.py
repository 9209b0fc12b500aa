import numpy as np
from support import apply, check_pass, graph_text, named, parse

from qat2int8.ir import ChannelMoments, Model, QuantParams
from qat2int8.passes.cleanup import Cleanup


def changes(counts: dict[str, int]) -> dict[str, int]:
    return {what: count for what, count in counts.items() if count}


def test_what_nobody_reads_goes_and_equal_constants_become_one() -> None:
    _, result = check_pass(
        Cleanup(),
        """
        g (float[2] x, float[2] unread) => (float[2] y)
          <float[2] a = {1, 2}, float[2] b = {1, 2}, float[2] c = {3, 4}> {
          [dead] d = Neg (x)
          [deader] e = Neg (d)
          [add] f = Add (x, a)
          [mul] y = Mul (f, b)
        }
        """,
        """
        g (float[2] x, float[2] unread) => (float[2] y) <float[2] a = {1, 2}>
          { [add] f = Add (x, a) [mul] y = Mul (f, a) }
        """,
    )
    assert changes(dict(result.counts)) == {
        "initializers shared": 1,
        "nodes removed": 2,
        "initializers removed": 1,
    }


def test_a_clean_model_is_left_alone() -> None:
    model = parse("g (float[2] x) => (float[2] y) <float[2] a = {1, 2}> { y = Add (x, a) }")
    before = graph_text(model)
    assert not apply(Cleanup(), model).modified
    assert graph_text(model) == before


def test_constants_that_differ_in_shape_type_or_sign_of_zero_are_not_one() -> None:
    model = parse(
        "g (float[2] x) => (float[2] y)"
        "<float[2] a = {0, 0}, float[1, 2] b = {0, 0}, float[2] c = {-0.0, 0}, int32[2] d = {0, 0}>"
        "{ e = Add (x, a) f = Mul (e, c) h = Squeeze (b) i = Add (f, h) j = Cast <to = 1> (d) y = Add (i, j) }"
    )
    assert not apply(Cleanup(), model).modified
    assert len(model.graph.initializers) == 4


def test_large_constants_are_not_compared() -> None:
    model = parse(
        "g (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2}>"
        "{ c = Add (x, a) y = Add (c, b) }"
    )
    assert not apply(Cleanup(share_up_to=1), model).modified
    assert apply(Cleanup(share_up_to=2), model).counts["initializers shared"] == 1


def two_weights() -> Model:
    return parse(
        "g (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2}>"
        "{ c = Add (x, a) y = Mul (c, b) }"
    )


def test_equal_weights_on_different_grids_are_not_one() -> None:
    for other in (None, QuantParams.make(0.25), QuantParams.make(0.5, 1)):
        model = two_weights()
        values = model.values()
        model.scales.set(values["a"], QuantParams.make(0.5))
        if other is not None:
            model.scales.set(values["b"], other)
        assert not apply(Cleanup(), model).modified
        assert model.scales.get(values["b"]) is other


def test_equal_weights_on_equal_grids_are_one() -> None:
    model = two_weights()
    for name in "ab":
        model.scales.set(model.values()[name], QuantParams.make(0.5))
    result = apply(Cleanup(), model)
    assert changes(dict(result.counts)) == {"initializers shared": 1, "table entries removed": 1}
    assert [v.name for v in model.scales] == ["a"]


def test_a_constant_that_is_an_output_keeps_its_name() -> None:
    model = parse(
        "g (float[2] x) => (float[2] y, float[2] b) <float[2] a = {1, 2}, float[2] b = {1, 2}>"
        "{ c = Add (x, a) y = Mul (c, b) }"
    )
    assert not apply(Cleanup(), model).modified


def test_tables_forget_what_left_the_graph_and_nothing_else() -> None:
    model = parse(
        """
        g (float[2] x, bool flag, float[2] unread) => (float[2] y)
          <float[2] a = {1, 2}, float[2] unused = {1, 3}> {
          dead = Neg (x)
          t = Add (x, a)
          y = If (flag) <
            then_branch = t1 () => (float[2] p) { p = Neg (t) },
            else_branch = e1 () => (float[2] q) { q = Abs (t) }
          >
        }
        """
    )
    values, grid = model.values(), QuantParams.make(0.5)
    inner = next(node for node in model.graph.all_nodes() if node.op_type == "Abs").outputs[0]
    for value in (*values.values(), inner):
        model.scales.set(value, grid)
        model.moments[value] = ChannelMoments(np.zeros(2, np.float32), np.ones(2, np.float32), 0, "test")
    result = apply(Cleanup(), model)
    assert result.counts["table entries removed"] == 4
    kept = {"x", "flag", "unread", "a", "t", "y", "q"}
    assert {v.name for v in model.scales} == kept
    assert {v.name for v in model.moments} == kept


def test_dead_nodes_inside_a_subgraph_go() -> None:
    model = parse(
        """
        g (float[2] x, bool flag) => (float[2] y) {
          y = If (flag) <
            then_branch = t1 () => (float[2] p) { dead = Exp (x) p = Neg (x) },
            else_branch = e1 () => (float[2] q) { q = Abs (x) }
          >
        }
        """
    )
    assert changes(dict(apply(Cleanup(), model).counts)) == {"nodes removed": 1}


def test_unused_opsets_and_functions_go() -> None:
    model = parse(
        """
        <ir_version: 8, opset_import: ["" : 17, "local" : 1, "unused" : 3]>
        g (float[2] x) => (float[2] y) { y = Neg (x) }
        <domain: "local", opset_import: ["" : 17]>
        twice (a) => (b) { b = Add (a, a) }
        """
    )
    result = apply(Cleanup(), model)
    assert model.ir.opset_imports == {"": 17}
    assert changes(dict(result.counts)) == {"functions removed": 1, "opset imports removed": 3}


def test_a_function_in_use_stays() -> None:
    model = parse(
        """
        <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[2] x) => (float[2] y) { y = local.twice (x) }
        <domain: "local", opset_import: ["" : 17]>
        twice (a) => (b) { b = Add (a, a) }
        """
    )
    assert not apply(Cleanup(), model).modified


def test_optional_outputs_nobody_reads_are_trimmed() -> None:
    model = parse(
        "g (float[1, 1, 4, 4] x) => (float[1, 1, 3, 3] y) { y, indices = MaxPool <kernel_shape = [2, 2]> (x) }"
    )
    assert changes(dict(apply(Cleanup(), model).counts)) == {"slots trimmed": 1}
    assert named(next(iter(model.graph)).outputs) == ["y"]


def test_shapes_recorded_for_vanished_tensors_go() -> None:
    proto = parse("g (float[2] x) => (float[2] y) { dead = Exp (x) y = Neg (x) }").to_proto()
    for name in ("dead", "never_existed"):
        proto.graph.value_info.add().CopyFrom(proto.graph.input[0])
        proto.graph.value_info[-1].name = name
    model = Model.from_proto(proto)
    apply(Cleanup(), model)
    assert [info.name for info in model.to_proto().graph.value_info] == []


def test_names_of_what_was_removed_are_free_again() -> None:
    model = parse("g (float[2] x) => (float[2] y) { dead = Exp (x) y = Neg (x) }")
    assert model.unique_name("dead") == "dead_1"
    apply(Cleanup(), model)
    assert model.unique_name("dead") == "dead"
