from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as oir
import pytest
from support import TARGET, apply, graph_text, parse, run

from qat2int8.ir import (
    INT8,
    ChannelMoments,
    InvalidModel,
    Model,
    PassFailed,
    QuantParams,
    UnsupportedModel,
    load_model,
    save_model,
)
from qat2int8.ir.graphsurgeon import from_gs, to_gs
from qat2int8.passes import Context
from qat2int8.passes.graphsurgeon_pass import GraphSurgeonPass

TEXT = """
<ir_version: 9, opset_import: ["" : 17, "com.microsoft" : 1], producer_name: "me", producer_version: "2",
 domain: "d", model_version: 7, doc_string: "about", metadata_props: ["k": "v"]>
g (float[1,4] x) => (float[1,4] y) <float[4,4] w, float[4] b = {1, 2, 3, 4}> {
  [mul] t = MatMul (x, w)
  [add] u = Add (t, b)
  [relu] y = Relu (u)
}
"""
W = np.arange(16, dtype=np.float32).reshape(4, 4)


def model_of(text: str = TEXT) -> Model:
    proto = onnx.parser.parse_model(text)
    tensor = next((tensor for tensor in proto.graph.initializer if tensor.name == "w"), None)
    if tensor is None and "w" in text:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(W, "w"))
    elif tensor is not None:
        tensor.CopyFrom(onnx.numpy_helper.from_array(W, "w"))
    proto.graph.node[0].doc_string = "the product"
    proto.graph.node[0].metadata_props.add(key="scope", value="layer1")
    proto.graph.metadata_props.add(key="graph", value="meta")
    info = proto.graph.value_info.add()
    info.CopyFrom(onnx.helper.make_tensor_value_info("t", 1, [1, 4], doc_string="between"))
    info.metadata_props.add(key="value", value="meta")
    return Model.from_proto(proto)


def round_trip(model: Model) -> Model:
    return from_gs(to_gs(model), like=model)


def test_nothing_is_lost_on_the_way() -> None:
    model = model_of()
    before = model.to_proto()
    assert round_trip(model).to_proto() == before
    assert model.to_proto() == before


def test_an_edit_keeps_what_it_does_not_touch() -> None:
    model = model_of()
    before = model.to_proto()
    grid = QuantParams.make(0.1, 0, INT8)
    ones = np.ones(4, np.float32)
    for name in ("x", "t", "u"):
        model.scales.set(model.values()[name], grid)
    model.moments[model.values()["t"]] = ChannelMoments(ones, ones, 1, "bn")
    graph = to_gs(model)
    add = next(node for node in graph.nodes if node.name == "add")
    add.inputs[1].values = add.inputs[1].values * 2
    add.outputs[0].name = "renamed"
    edited = from_gs(graph, like=model)
    assert model.to_proto() == before
    proto = edited.to_proto()
    for field in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        assert getattr(proto, field) == getattr(before, field)
    assert proto.metadata_props == before.metadata_props
    assert proto.opset_import == before.opset_import
    assert proto.graph.metadata_props == before.graph.metadata_props
    assert proto.graph.node[0] == before.graph.node[0]
    assert [i for i in proto.graph.value_info if i.name == "t"] == [
        i for i in before.graph.value_info if i.name == "t"
    ]
    assert {value.name for value in edited.scales} == {"x", "t", "renamed"}
    assert [value.name for value in edited.moments] == ["t"]
    assert edited.constant(edited.graph.initializers["b"]).tolist() == [2, 4, 6, 8]
    x = np.ones((1, 4), np.float32)
    np.testing.assert_array_equal(run(edited, {"x": x})[0], x @ W + [2, 4, 6, 8])


def test_untouched_weights_are_the_same_tensors() -> None:
    model = model_of()
    assert round_trip(model).graph.initializers["w"].const_value is model.graph.initializers["w"].const_value


def test_mapped_weights_stay_mapped(tmp_path: Path) -> None:
    big = parse("g (float[600] x) => (float[600] y) { y = Relu (x) }")
    weight = big.add_initializer("w", np.arange(600, dtype=np.float32))
    node = oir.node("Add", [big.graph.inputs[0], weight])
    node.outputs[0].name = "s"
    big.insert_before(big.graph[0], node)
    big.graph[1].replace_input_with(0, node.outputs[0])
    save_model(big, tmp_path / "m.onnx", external_data=True)
    model = load_model(tmp_path / "m.onnx")
    graph = to_gs(model)
    tensor = from_gs(graph, like=model).graph.initializers["w"].const_value
    assert isinstance(tensor, oir.ExternalTensor)
    assert tensor.raw is None
    np.testing.assert_array_equal(graph.tensors()["w"].values, np.arange(600))  # whatever the working folder is


@pytest.mark.parametrize(
    "dtype",
    [ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2, ml_dtypes.bfloat16],
)
@pytest.mark.parametrize("touch", [False, True])
def test_narrow_types_survive_being_read(dtype: type, touch: bool) -> None:
    model = parse('<ir_version: 10, opset_import: ["" : 21]> g (float[3] x) => (float[3] y) { y = Relu (x) }')
    values = np.array([1, 2, 3]).astype(dtype)
    value = model.add_initializer("w", values)
    node = oir.node("Cast", [value], {"to": 1})
    node.outputs[0].name = "c"
    model.graph.insert_before(model.graph[0], node)
    graph = to_gs(model)
    if touch:
        graph.tensors()["w"].values  # noqa: B018 reading is what used to change them
    edited = from_gs(graph, like=model)
    back = edited.constant(edited.graph.initializers["w"])
    assert back is not None
    assert back.dtype == values.dtype
    np.testing.assert_array_equal(back.astype(np.float32), values.astype(np.float32))


def test_strings_survive_being_read() -> None:
    model = parse('g (float[2] x) => (string[2] y) <string[2] s = {"a", "bc"}> { y = Identity (s) }')
    graph = to_gs(model)
    assert graph.tensors()["s"].values.size == 2
    assert from_gs(graph, like=model).graph.initializers["s"].const_value.string_data() is not None


def test_an_overridable_initializer_stays_an_input() -> None:
    model = parse("g (float[2] x, float[2] w) => (float[2] y) { y = Add (x, w) }")
    value = model.graph.inputs[1]
    value.const_value = oir.tensor(np.ones(2, np.float32), name="w")
    model.graph.register_initializer(value)
    edited = round_trip(model)
    assert [v.name for v in edited.graph.inputs] == ["x", "w"]
    assert "w" in edited.graph.initializers


def test_a_weight_shared_with_branches_is_kept_once() -> None:
    model = parse(
        """
        g (float[2] x, bool b) => (float[2] y) <float[2] w = {1, 2}> {
          [main] t = Add (x, w)
          [if] y = If (b) <
            then_branch = p () => (float[2] py) { [pa] py = Add (t, w) },
            else_branch = q () => (float[2] qy) { [qa] qy = Mul (t, w) }
          >
        }
        """
    )
    model.graph[1].attributes["then_branch"].as_graph()[0].doc_string = "inner"
    edited = round_trip(model)
    assert list(edited.graph.initializers) == ["w"]
    branches = [edited.graph[1].attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    assert [len(branch.initializers) for branch in branches] == [0, 0]
    assert branches[0][0].doc_string == "inner"
    assert graph_text(edited) == graph_text(model)


def test_a_weight_only_branches_read_stays_outside() -> None:
    model = parse(
        """
        g (float[2] x, bool b) => (float[2] y) <float[2] w = {1, 2}> {
          [if] y = If (b) <
            then_branch = p () => (float[2] py) { [pa] py = Add (x, w) },
            else_branch = q () => (float[2] qy) { [qa] qy = Mul (x, w) }
          >
        }
        """
    )
    assert list(round_trip(model).graph.initializers) == ["w"]


def test_functions_pass_through() -> None:
    model = Model.from_proto(
        onnx.parser.parse_model(
            """
            <ir_version: 9, opset_import: ["" : 17, "mine" : 1]>
            g (float[2] x) => (float[2] y) { y = mine.twice (x) }
            <domain: "mine", opset_import: ["" : 17], doc_string: "doubles">
            twice (a) => (b) { b = Add (a, a) }
            """
        )
    )
    assert round_trip(model).to_proto().functions == model.to_proto().functions


def test_nodes_appended_anywhere_are_sorted() -> None:
    model = model_of()
    graph = to_gs(model)
    tensor = gs.Variable("n", np.float32, (1, 4))
    relu = graph.nodes[2]
    graph.nodes.append(gs.Node("Neg", "neg", {}, [relu.inputs[0]], [tensor]))
    relu.inputs[0] = tensor
    assert [node.name for node in from_gs(graph, like=model).graph] == ["mul", "add", "neg", "relu"]


def test_a_cycle_is_an_error_of_ours() -> None:
    model = model_of()
    graph = to_gs(model)
    graph.nodes[0].inputs[0] = graph.nodes[1].outputs[0]
    with pytest.raises(InvalidModel, match="cycle"):
        from_gs(graph, like=model)


def test_two_constants_of_one_name_are_refused() -> None:
    model = model_of()
    graph = to_gs(model)
    graph.nodes[2].op = "Add"
    graph.nodes[2].inputs.append(gs.Constant("b", np.zeros(4, np.float32)))
    with pytest.raises(InvalidModel, match="two tensors are called 'b'"):
        from_gs(graph, like=model)


def test_a_float64_constant_is_refused() -> None:
    model = model_of()
    graph = to_gs(model)
    graph.nodes[1].inputs[1] = gs.Constant("half", np.array([0.5]))
    with pytest.raises(InvalidModel, match="'add'"):
        from_gs(graph, like=model)


def test_an_output_without_a_type_is_an_error_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of()
    graph = to_gs(model)
    graph.outputs[0].dtype = None
    with pytest.raises(InvalidModel, match="cannot export"):
        from_gs(graph, like=model)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("attribute", "words"),
    [
        (oir.AttrInt64s("axes", []), "'axes' of type empty INTS"),
        (oir.AttrTensors("list", [oir.tensor(np.ones(2))]), "'list' of type TENSORS"),
    ],
)
def test_attributes_it_cannot_hold_are_refused(attribute: oir.Attr, words: str) -> None:
    model = model_of()
    model.graph[1].attributes[attribute.name] = attribute
    with pytest.raises(UnsupportedModel, match=rf"node 'add' \(Add\): .*{words}"):
        to_gs(model)


def test_optional_values_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="tensor 'y'"):
        to_gs(parse("g (float[2] x) => (optional(float[2]) y) { y = Optional (x) }"))


# The pass built on it


@dataclass(frozen=True)
class ReluToAbs(GraphSurgeonPass):
    """What a user's snippet looks like."""

    name = "relu-to-abs"

    def edit(self, graph: gs.Graph) -> Mapping[str, int]:
        changed = 0
        for node in graph.nodes:
            if node.op == "Relu":
                node.op = "Abs"
                changed += 1
        return {"replaced": changed}


@dataclass(frozen=True)
class RenamesOutput(GraphSurgeonPass):
    name = "renames-output"

    def edit(self, graph: gs.Graph) -> Mapping[str, int]:
        graph.outputs[0].name = "other"
        return {"renamed": 1}


@dataclass(frozen=True)
class Lies(GraphSurgeonPass):
    name = "lies"

    def edit(self, graph: gs.Graph) -> Mapping[str, int]:
        graph.nodes.clear()
        return {"removed": 0}


def test_a_snippet_is_a_pass() -> None:
    model = model_of()
    ir = model.ir
    model.scales.set(model.values()["t"], QuantParams.make(0.1, 0, INT8))
    result = apply(ReluToAbs(), model)
    assert result.counts == {"replaced": 1}
    assert model.ir is not ir
    assert [node.op_type for node in model.graph] == ["MatMul", "Add", "Abs"]
    assert list(model.scales) == [model.values()["t"]]
    assert model.unique_name("t") == "t_1"


def test_no_count_no_change() -> None:
    model = model_of()
    ir, before = model.ir, model.to_proto()
    assert not Lies().run(model, Context(TARGET)).modified
    assert model.ir is ir
    assert model.to_proto() == before


def test_output_names_are_a_contract() -> None:
    model = model_of()
    ir = model.ir
    with pytest.raises(PassFailed, match="renames-output"):
        RenamesOutput().run(model, Context(TARGET))
    assert model.ir is ir
