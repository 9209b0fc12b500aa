from __future__ import annotations

import time

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from support import parse

from qat2int8.ir import INT8, ChannelMoments, InvalidModel, Model, QuantParams, VerifyLevel, verify
from qat2int8.ir.verify import weightless, weightless_file

CHAIN = """
g (float[4] x) => (float[4] y) <float[4] w = {1, 2, 3, 4}> {
  [a] t = Add (x, w)
  [b] u = Relu (t)
  [c] y = Neg (u)
}
"""
LEVELS = [level for level in VerifyLevel if level is not VerifyLevel.NONE]


def broken(model: Model, words: str, *levels: VerifyLevel) -> None:
    verify(model, VerifyLevel.NONE)
    for level in levels or LEVELS:
        with pytest.raises(InvalidModel, match=words):
            verify(model, level)


@pytest.mark.parametrize("level", list(VerifyLevel))
def test_a_valid_model_passes(level: VerifyLevel) -> None:
    model = parse(CHAIN)
    model.scales.set(model.values()["t"], QuantParams.make(0.1, 0, INT8))
    verify(model, level, graph_inputs=["x"], graph_outputs=["y"])


def test_input_and_output_names_are_a_contract() -> None:
    model = parse(CHAIN)
    with pytest.raises(InvalidModel, match=r"inputs were \['q'\] and are now \['x'\]"):
        verify(model, VerifyLevel.STRUCTURE, graph_inputs=["q"])
    with pytest.raises(InvalidModel, match="outputs were"):
        verify(model, VerifyLevel.STRUCTURE, graph_outputs=["y", "z"])


def test_two_tensors_of_one_name() -> None:
    model = parse(CHAIN)
    model.graph[1].outputs[0].name = "t"
    broken(model, "two tensors are called 't'")


def test_a_tensor_of_an_input_s_name() -> None:
    model = parse(CHAIN)
    model.graph[1].outputs[0].name = "x"
    broken(model, "two tensors are called 'x'")


def test_a_name_may_be_used_again_in_the_other_branch() -> None:
    verify(
        parse(
            """
            g (float[4] x, bool b) => (float[4] y) {
              y = If (b) <
                then_branch = p () => (float[4] r) { r = Relu (x) },
                else_branch = q () => (float[4] r) { r = Neg (x) }
              >
            }
            """
        ),
        VerifyLevel.CHECKER,
    )


def test_a_tensor_of_a_subgraph_is_not_seen_outside() -> None:
    model = parse(
        """
        g (float[4] x, bool b) => (float[4] y) {
          z = If (b) <
            then_branch = p () => (float[4] r) { r = Relu (x) },
            else_branch = q () => (float[4] s) { s = Neg (x) }
          >
          [last] y = Neg (z)
        }
        """
    )
    inner = next(model.nodes("If")).attributes["then_branch"].as_graph()
    model.graph[1].replace_input_with(0, inner.outputs[0])
    broken(model, "node 'last'", VerifyLevel.STRUCTURE)


def test_an_input_nothing_defines() -> None:
    model = parse(CHAIN)
    model.graph[1].replace_input_with(0, oir.Value(name="ghost"))
    broken(model, r"node 'b' \(Relu\): input 'ghost' is defined nowhere")


def test_an_input_whose_producer_was_removed() -> None:
    model = parse(CHAIN)
    model.graph.remove(model.graph[0])
    broken(model, r"node 'b' \(Relu\): input 't' is defined nowhere")


def test_an_input_inside_a_subgraph_that_nothing_defines() -> None:
    model = parse(
        """
        g (float[4] x, bool b) => (float[4] y) {
          y = If (b) <
            then_branch = p () => (float[4] r) { [inner] r = Relu (x) },
            else_branch = q () => (float[4] s) { s = Neg (x) }
          >
        }
        """
    )
    inner = next(model.nodes("If")).attributes["then_branch"].as_graph()
    inner[0].replace_input_with(0, oir.Value(name="ghost"))
    broken(model, "node 'inner'.*'ghost'")


def test_nodes_out_of_order() -> None:
    model = parse(CHAIN)
    first = model.graph[0]
    model.graph.remove(first)
    model.graph.append(first)
    broken(model, r"node 'b' \(Relu\): input 't' is computed later, by node 'a' \(Add\)")


def test_a_cycle() -> None:
    model = parse(CHAIN)
    model.graph[0].replace_input_with(0, model.graph[1].outputs[0])
    broken(model, "cycle: '[ab]' -> '[ab]' -> '[ab]'")


def test_an_output_nothing_computes() -> None:
    model = parse(CHAIN)
    model.graph.outputs[0] = oir.Value(name="y")
    broken(model, "nothing computes graph output 'y'")


def test_an_initializer_without_a_value() -> None:
    model = parse(CHAIN)
    model.graph.initializers["w"].const_value = None
    broken(model, "initializer 'w' has no value")


def test_a_read_tensor_without_a_name() -> None:
    model = parse(CHAIN)
    model.graph[0].outputs[0].name = None
    broken(model, "no name")


def test_a_grid_of_a_tensor_that_left() -> None:
    model = parse(CHAIN)
    model.scales.set(oir.Value(name="t"), QuantParams.make(0.1, 0, INT8))
    broken(model, "'t' has a grid or statistics but is no longer in the graph")


def test_statistics_of_a_tensor_that_left() -> None:
    model = parse(CHAIN)
    ones = np.ones(4, np.float32)
    model.moments[oir.Value(name="t")] = ChannelMoments(ones, ones, 0, "bn")
    broken(model, "'t' has a grid or statistics")


def test_types_are_the_checker_s_part() -> None:
    model = parse(CHAIN)
    model.graph[1].attributes["nonsense"] = oir.AttrInt64("nonsense", 3)
    verify(model, VerifyLevel.STRUCTURE)
    broken(model, "node 'b' .Relu.: .*nonsense", VerifyLevel.CHECKER, VerifyLevel.NUMERIC)


def test_a_float64_constant_among_floats() -> None:
    model = parse(CHAIN)
    model.graph[0].replace_input_with(1, model.add_initializer("d", np.ones(4)))
    broken(model, "node 'a' .Add.: .*double", VerifyLevel.CHECKER)


HEAVY = """
g (float[600] x, bool b) => (float[600] y) {
  [const] k = Constant ()
  [sum] t = Add (x, k)
  [scaled] u = Mul (t, w)
  [if] y = If (b) <
    then_branch = p () => (float[600] py) { [own] py = Add (u, inner) },
    else_branch = q () => (float[600] qy) { [other] qy = Add (u, k) }
  >
}
"""


def heavy() -> Model:
    """Large tensors wherever a tensor can be: initializer, Constant, initializer of a subgraph."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {HEAVY}')
    weights = [
        onnx.numpy_helper.from_array(np.full(600, value, np.float32), name)
        for value, name in ((1, "w"), (2, ""), (3, "inner"))
    ]
    proto.graph.initializer.append(weights[0])
    proto.graph.node[0].attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(weights[1])
    branch = next(a for a in proto.graph.node[3].attribute if a.name == "then_branch")
    branch.g.initializer.append(weights[2])
    onnx.checker.check_model(proto, full_check=True)
    return Model.from_proto(proto)


@pytest.mark.parametrize("external", [False, True])
def test_the_twin_has_no_weights_and_the_same_verdict(external: bool) -> None:
    model = heavy()
    if external:  # neither file exists: that is not the checker's business
        for name, value in model.graph.initializers.items():
            value.const_value = oir.ExternalTensor(
                "gone", 0, None, oir.DataType.FLOAT, shape=oir.Shape([600]), name=name
            )
    for twin in (weightless(model.ir), weightless_file(model.to_proto())):
        assert twin.ByteSize() < 1500
        assert not twin.graph.initializer
        onnx.checker.check_model(twin, full_check=True)
    verify(model, VerifyLevel.CHECKER)
    model.values()["w"].shape = oir.Shape([601])
    model.graph.initializers["w"].const_value = oir.tensor(np.ones(601, np.float32), name="w")
    broken(model, "'scaled'", VerifyLevel.CHECKER)


def test_the_twin_leaves_the_model_alone() -> None:
    model = heavy()
    before = model.to_proto()
    weightless(model.ir)
    weightless_file(before)
    assert model.to_proto() == before
    model.graph[1].attributes["nonsense"] = oir.AttrInt64("nonsense", 3)
    with pytest.raises(InvalidModel):
        verify(model, VerifyLevel.CHECKER)
    del model.graph[1].attributes["nonsense"]
    assert model.to_proto() == before


def test_structure_is_linear_in_nodes() -> None:
    def seconds(count: int) -> float:
        model = parse("g (float[4] x) => (float[4] y) { y = Relu (x) }")
        graph = model.graph
        value = graph.inputs[0]
        for index in range(count):
            node = oir.node("Neg", [value], name=f"n{index}")
            node.outputs[0].name = f"t{index}"
            graph.insert_before(graph[-1], node)
            value = node.outputs[0]
        best = float("inf")
        for _ in range(7):
            start = time.process_time()
            verify(model, VerifyLevel.STRUCTURE)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(5000) < 20 * seconds(500)
