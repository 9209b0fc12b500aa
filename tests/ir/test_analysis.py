from support import parse

from qat2int8.ir import dataflow, find_cycle, integer_islands

DIAMOND = """
g (float[n4] x, bool b) => (float[n4] y) {
  [a] t = Relu (x)
  [l] u = Neg (t)
  [r] v = Exp (t)
  [if] w = If (b) <
    then_branch = p () => (float[n4] pw) { [in] pw = Add (u, v) },
    else_branch = q () => (float[n4] v2) { v2 = Identity (v) }
  >
  [z] y = Abs (w)
}
"""


def edges(text: str) -> set[tuple[str, str]]:
    return {(a.name, b.name) for a, b in dataflow(parse(text).graph).edges}


def test_dataflow_follows_tensors_into_subgraphs() -> None:
    assert edges(DIAMOND) == {("a", "l"), ("a", "r"), ("l", "if"), ("r", "if"), ("if", "z")}


def test_a_branch_that_only_returns_an_outer_tensor_reads_it() -> None:
    model = parse(DIAMOND)
    branch = next(model.nodes("If")).attributes["else_branch"].as_graph()
    branch.remove(branch[0]) if not branch[0].outputs[0].uses() else None
    branch.outputs[:] = [model.values()["u"]]
    assert ("l", "if") in {(a.name, b.name) for a, b in dataflow(model.graph).edges}


def test_nodes_without_neighbours_are_there() -> None:
    view = dataflow(parse("g (float[n4] x) => (float[n4] y, float[n4] z) { y = Relu (x) z = Neg (x) }").graph)
    assert (len(view), view.number_of_edges()) == (2, 0)


def test_no_cycle() -> None:
    assert find_cycle(parse(DIAMOND).graph) == []


def test_a_cycle_in_order() -> None:
    model = parse(DIAMOND)
    named = {node.name: node for node in model.graph}
    named["a"].replace_input_with(0, named["z"].outputs[0])
    cycle = [node.name for node in find_cycle(model.graph)]
    assert cycle[0] in cycle
    start = cycle.index("a")
    turned = cycle[start:] + cycle[:start]
    assert turned in (["a", "l", "if", "z"], ["a", "r", "if", "z"])


def test_islands_are_connected_and_in_order() -> None:
    model = parse(
        """
        g (float[n4] x) => (float[n4] y, float[n4] k) {
          [n1] a = Relu (x)
          [n2] b = Relu (a)
          [cut] c = Neg (b)
          [n3] d = Relu (c)
          [n4] e = Relu (b)
          [n5] y = Add (d, x)
          [n6] k = Relu (e)
        }
        """
    )
    islands = integer_islands(model, lambda node: node.op_type != "Neg")
    assert [sorted(node.name for node in island) for island in islands] == [["n1", "n2", "n4", "n6"], ["n3", "n5"]]
    assert integer_islands(model, lambda node: False) == []
