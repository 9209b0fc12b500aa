from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TARGET, apply, check_pass, graph_text, parse, run

from qat2int8.ir import INT8, Code, Model, PassFailed, QuantParams
from qat2int8.passes import Context
from qat2int8.passes.change_output_dtype import ChangeOutputDtype

ARGMAX = """
g (float[2,4] x) => (int64[2] y) {
  [top] y = ArgMax <axis = 1, keepdims = 0> (x)
}
"""


def test_argmax_becomes_float() -> None:
    model, result = check_pass(
        ChangeOutputDtype("y", "float32"),
        ARGMAX,
        """
        g (float[2,4] x) => (float[2] y) {
          [top] y_before_cast = ArgMax <axis = 1, keepdims = 0> (x)
          [y_cast] y = Cast <to = 1> (y_before_cast)
        }
        """,
    )
    (actual,) = run(model, {"x": np.eye(4, dtype=np.float32)[[2, 1]]})
    assert actual.dtype == np.float32
    assert actual.tolist() == [2.0, 1.0]
    assert result.counts == {"outputs cast": 1}
    (note,) = result.diagnostics
    assert (note.code, note.value) == (Code.OUTPUT_CAST, "y")
    assert "int64" in note.reason
    assert "float32" in note.reason


def test_consumers_inside_keep_the_old_type_even_in_a_subgraph() -> None:
    check_pass(
        ChangeOutputDtype("y", "float16"),
        """
        g (float[2] x, bool b) => (float[2] y, float[2] z, float[2] v) {
          [relu] y = Relu (x)
          [neg] z = Neg (y)
          [if] v = If (b) <
            then_branch = t () => (float[2] tv) { [exp] tv = Exp (y) },
            else_branch = e () => (float[2] ev) { [abs] ev = Abs (y) }
          >
        }
        """,
        """
        g (float[2] x, bool b) => (float16[2] y, float[2] z, float[2] v) {
          [relu] y_before_cast = Relu (x)
          [neg] z = Neg (y_before_cast)
          [if] v = If (b) <
            then_branch = t () => (float[2] tv) { [exp] tv = Exp (y_before_cast) },
            else_branch = e () => (float[2] ev) { [abs] ev = Abs (y_before_cast) }
          >
          [y_cast] y = Cast <to = 10> (y_before_cast)
        }
        """,
    )


def test_an_initializer_as_output() -> None:
    model, _ = check_pass(
        ChangeOutputDtype("w", "int32"),
        "g (float[2] x) => (float[2] y, float[2] w) <float[2] w = {1, 2}> { [add] y = Add (x, w) }",
        """
        g (float[2] x) => (float[2] y, int32[2] w) <float[2] w_before_cast = {1, 2}> {
          [add] y = Add (x, w_before_cast)
          [w_cast] w = Cast <to = 6> (w_before_cast)
        }
        """,
    )
    assert run(model, {"x": np.zeros(2, np.float32)})[1].tolist() == [1, 2]


def test_one_output_of_a_node_with_several() -> None:
    model = parse(
        """
        g (float[6] x) => (float[2] v, int64[2] i) <int64[1] k = {2}> {
          [topk] v, i = TopK (x, k)
        }
        """
    )
    apply(ChangeOutputDtype("i", "int32"), model)
    values, indices = run(model, {"x": np.array([1, 9, 3, 8, 5, 4], np.float32)})
    assert (values.tolist(), indices.tolist(), indices.dtype) == ([9, 8], [1, 3], np.int32)


def test_symbolic_shapes_stay() -> None:
    model = parse('g (float["n",4] x) => (float["n",4] y) { [relu] y = Relu (x) }')
    apply(ChangeOutputDtype("y", "float64"), model)
    assert model.graph.outputs[0].shape == model.graph.inputs[0].shape


def test_names_already_taken_are_not_taken_again() -> None:
    model = parse(
        """
        g (float[2] x) => (float[2] y) {
          [y_cast] y_before_cast = Neg (x)
          [relu] y = Relu (y_before_cast)
        }
        """
    )
    apply(ChangeOutputDtype("y", "float16"), model)
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names) == 3


def test_a_second_type_chains_because_the_first_already_rounded() -> None:
    model = parse("g (float[2] x) => (float[2] y) { [relu] y = Relu (x) }")
    apply(ChangeOutputDtype("y", "int32"), model)
    apply(ChangeOutputDtype("y", "float32"), model)
    assert run(model, {"x": np.array([1.7, 2.2], np.float32)})[0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "pass_", [ChangeOutputDtype(), ChangeOutputDtype("y", "int64"), ChangeOutputDtype("y", "INT64")]
)
def test_nothing_to_do_leaves_the_very_objects(pass_: ChangeOutputDtype) -> None:
    model = parse(ARGMAX)
    ir, before = model.ir, graph_text(model)
    assert not apply(pass_, model).modified
    assert model.ir is ir
    assert graph_text(model) == before


def test_the_grid_stays_with_the_tensor_it_is_of() -> None:
    model = parse("g (float[2] x) => (float[2] y) { [relu] y = Relu (x) }")
    grid = QuantParams.make(0.1, 0, INT8)
    for name in ("x", "y"):
        model.scales.set(model.values()[name], grid)
    apply(ChangeOutputDtype("y", "float16"), model)
    assert {value.name for value in model.scales} == {"x", "y_before_cast"}
    assert all(value in model.scales for value in (model.graph.inputs[0], model.graph[0].outputs[0]))


@pytest.mark.parametrize(
    ("text", "output", "dtype", "words"),
    [
        (ARGMAX, "z", "float32", "no output 'z'.*it has y"),
        (ARGMAX, "x", "float32", "no output 'x'"),
        (ARGMAX, "y", "flaot", "'flaot' is no element type.*float32"),
        (ARGMAX, "y", "complex64", "does not know complex64.*one of bfloat16"),
        (ARGMAX, "y", "float8e4m3fn", "Cast of opset 17"),
        ("g (float[2] x) => (float[2] x) { y = Relu (x) }", "x", "int8", "both must keep the one name"),
        ("g (float[2] x) => (seq(float[2]) y) { y = SequenceConstruct (x) }", "y", "int8", "cannot be cast"),
        ("g (float[2] x) => (optional(float[2]) y) { y = Optional (x) }", "y", "int8", "cannot be cast"),
    ],
)
def test_what_cannot_be_done_is_said(text: str, output: str, dtype: str, words: str) -> None:
    model = parse(text)
    before = graph_text(model)
    with pytest.raises(PassFailed, match=words):
        ChangeOutputDtype(output, dtype).run(model, Context(TARGET))
    assert graph_text(model) == before


DTYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "float64": np.float64,
    "double": np.float64,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "bool": np.bool_,
}
FLOATS = {"float32": 1, "float16": 10, "float64": 11, "int32": 6, "int64": 7, "int8": 3}


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(FLOATS)),
    st.sampled_from(sorted(DTYPES)),
    st.lists(st.integers(0, 100), min_size=3, max_size=3),
    st.sampled_from(["Identity", "Neg"]),
)
def test_any_type_to_any_type_as_numpy_casts(source: str, dtype: str, numbers: list[int], op: str) -> None:
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["t"]), onnx.helper.make_node(op, ["t"], ["y"], name="op")],
        "g",
        [onnx.helper.make_tensor_value_info("x", FLOATS[source], ["n"])],
        [onnx.helper.make_tensor_value_info("y", FLOATS[source], ["n"])],
    )
    imports = [onnx.helper.make_opsetid("", 17)]
    model = Model.from_proto(onnx.helper.make_model(graph, opset_imports=imports, ir_version=8))
    values = np.array(numbers).astype(DTYPES[source])
    feeds: dict[str, Any] = {"x": values if op == "Identity" else -values}
    apply(ChangeOutputDtype("y", dtype), model)
    (actual,) = run(model, feeds)
    assert actual.dtype == DTYPES[dtype]
    np.testing.assert_array_equal(actual, values.astype(DTYPES[dtype]))


def test_bfloat16_keeps_what_bfloat16_can_hold() -> None:
    model = parse("g (float[3] x) => (float[3] y) { [relu] y = Relu (x) }")
    apply(ChangeOutputDtype("y", "bfloat16"), model)
    apply(ChangeOutputDtype("y", "float32"), model)
    (actual,) = run(model, {"x": np.array([1.0, 1.001, 3.0], np.float32)})
    assert actual.tolist() == [1.0, 1.0, 3.0]
