import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from support import HEADER, TARGET, apply, assert_same_numbers, check_pass, parse, run

from qat2int8.ir import Model
from qat2int8.passes import Context
from qat2int8.passes.canonicalize import Canonicalize
from qat2int8.passes.fake_quant import FakeQuant, fake_quants
from qat2int8.passes.float_data_movement import FloatDataMovement
from qat2int8.passes.fold_constants import FoldConstants

CTX = Context(TARGET)
FEEDS = {
    "x": np.random.default_rng(0).normal(scale=3, size=(1, 2, 4, 4)).astype(np.float32),
    "u": np.arange(0, 64, 2, dtype=np.uint8).reshape(1, 2, 4, 4),
}
PARAMETERS = """float s = {0.5}, float t = {0.25}, uint8 z = {7}, uint8 k = {9}, int64[2] flat = {2, 16},
 int64[1] one = {1}, int64[1] zero = {0}, int64[4] twice = {1, 1, 2, 1}, int64[2] rows = {1, 0},
 float[1] vs = {0.5}, uint8[1] vz = {7}, float[2] cs = {0.5, 0.25}, uint8[2] cz = {7, 8},
 int64[4] wide = {3, 2, 4, 4}, int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1}, float negative = {-0.5},
 uint8[2,4] table = {0, 1, 2, 3, 4, 5, 6, 7}"""


def model_of(body: str, outputs: str = "float[] y") -> Model:
    """A model whose outputs have the shapes that inference finds."""
    text = f"{HEADER} g (float[1,2,4,4] x, uint8[1,2,4,4] u) => ({outputs}) <{PARAMETERS}> {{ {body} }}"
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), strict_mode=True, data_prop=True)
    onnx.checker.check_model(proto, full_check=True)
    return Model.from_proto(proto)


def op_types(model: Model) -> list[str]:
    return [node.op_type for node in model.graph]


def moves(model: Model) -> int:
    """How many dequantizers move, after making sure that no number does."""
    before = model.to_proto()
    moved = apply(FloatDataMovement(), model).counts["dequantizers moved"]
    for expected, actual in zip(run(before, FEEDS), run(model, FEEDS), strict=True):
        np.testing.assert_array_equal(actual, expected)
    return moved


def test_a_pair_with_a_transpose_between_is_a_pair_in_front_of_it() -> None:
    _, result = check_pass(
        FloatDataMovement(),
        """g (float[2,3] x) => (float[3,2] y) <float s = {0.5}, uint8 z = {7}> {
          [q] a = QuantizeLinear (x, s, z)
          [move] b = Transpose <perm = [1, 0]> (a)
          [d] c = DequantizeLinear (b, s, z)
          [relu] y = Relu (c)
        }""",
        """g (float[2,3] x) => (float[3,2] y) <float s = {0.5}, uint8 z = {7}> {
          [q] a = QuantizeLinear (x, s, z)
          [a_dequantized] a_dequantized = DequantizeLinear (a, s, z)
          [move] c = Transpose <perm = [1, 0]> (a_dequantized)
          [relu] y = Relu (c)
        }""",
    )
    assert result.counts == {"dequantizers moved": 1}


@pytest.mark.parametrize(
    "movement",
    [
        "Transpose <perm = [0, 2, 3, 1]> (a)",
        "Reshape (a, flat)",
        "Flatten <axis = 2> (a)",
        "Squeeze (a, zero)",
        "Unsqueeze (a, zero)",
        "MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]> (a)",
        "Slice (a, zero, one, one)",
        "Gather <axis = 1> (a, rows)",
        "Tile (a, twice)",
        "Expand (a, wide)",
        "DepthToSpace <blocksize = 1> (a)",
        "SpaceToDepth <blocksize = 2> (a)",
        "Identity (a)",
        "Concat <axis = 1> (a, b)",
        "Concat <axis = 0> (a, a)",
        "Concat <axis = 1> (a, u)",
    ],
)
def test_every_movement_computes_the_same_on_floats(movement: str) -> None:
    model = model_of(
        f"""a = QuantizeLinear (x, s, z) b = QuantizeLinear (x, t, k)
        [move] c = {movement} d = DequantizeLinear (c, s, z) y = Abs (d)"""
    )
    assert moves(model) == 1
    kept = [node for node in model.graph if node.op_type == movement.split()[0]]
    assert [(node.name, node.outputs[0].name) for node in kept] == [("move", "d")]
    assert all(node.inputs[0].producer().op_type == "DequantizeLinear" for node in kept)  # type: ignore[union-attr]


@pytest.mark.parametrize("parameters", ["s, z", "s", "vs, vz"])
def test_one_scale_in_any_shape_moves(parameters: str) -> None:
    assert moves(model_of(f"a = QuantizeLinear (x, s, z) b = Flatten (a) y = DequantizeLinear (b, {parameters})"))


def test_the_operator_of_the_other_domain_stays_there() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
        g (float[2,3] x) => (float[3,2] y) <float s = {0.5}, uint16 z = {700}> {
          a = com.microsoft.QuantizeLinear (x, s, z)
          b = Transpose (a)
          y = com.microsoft.DequantizeLinear (b, s, z)
        }"""
    )
    assert apply(FloatDataMovement(), model).modified
    assert [(node.domain, node.op_type) for node in model.graph][1] == ("com.microsoft", "DequantizeLinear")


def test_a_chain_is_climbed_to_its_top() -> None:
    model = model_of(
        """a = QuantizeLinear (x, s, z) b = Transpose (a) c = MaxPool <kernel_shape = [2, 2]> (b)
        d = Flatten (c) y = DequantizeLinear (d, s, z)"""
    )
    assert moves(model) == 3
    assert op_types(model) == ["QuantizeLinear", "DequantizeLinear", "Transpose", "MaxPool", "Flatten"]


def test_branches_of_a_chain_share_what_was_dequantized() -> None:
    """The one made for the first branch has moved on by the time the second one asks for it."""
    model = model_of(
        """a = QuantizeLinear (x, s, z) b = Reshape (a, flat) c = Transpose (b) e = Flatten (b)
        y = DequantizeLinear (c, s, z) v = DequantizeLinear (e, s, z)
        f = Flatten (e) w = DequantizeLinear (f, t, z)""",
        "float[] y, float[] v, float[] w",
    )
    assert moves(model) >= 4
    assert op_types(model).count("DequantizeLinear") == 2
    dequantized = {node.inputs[0].name for node in model.graph if node.op_type == "DequantizeLinear"}  # type: ignore[union-attr]
    assert dequantized == {"a"}


def test_all_operands_of_a_concat_are_dequantized_alike() -> None:
    model = model_of(
        """a = QuantizeLinear (x, s, z) b = QuantizeLinear (x, t, k) m = Transpose <perm = [0, 1, 2, 3]> (b)
        c = Concat <axis = 1> (a, m, u) y = DequantizeLinear (c, s, z)"""
    )
    assert moves(model) == 2
    assert op_types(model).count("DequantizeLinear") == 3


def test_integers_that_are_read_otherwise_are_still_moved() -> None:
    model = model_of(
        "a = QuantizeLinear (x, s, z) b = Flatten (a) y = DequantizeLinear (b, s, z) v = Shape (b)",
        "float[] y, int64[] v",
    )
    assert moves(model) == 1
    assert op_types(model).count("Flatten") == 2


def test_integers_that_are_a_graph_output_stay() -> None:
    model = model_of(
        "a = QuantizeLinear (x, s, z) b = Flatten (a) y = DequantizeLinear (b, s, z)", "float[] y, uint8[] b"
    )
    assert moves(model) == 1
    assert op_types(model).count("Flatten") == 2


def test_a_graph_input_of_integers_stays_one() -> None:
    model = model_of("b = Flatten (u) y = DequantizeLinear (b, s, z)")
    assert moves(model) == 1
    assert op_types(model) == ["DequantizeLinear", "Flatten"]


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("b = Relu (x) a = QuantizeLinear (b, s, z) y = DequantizeLinear (a, s, z)", "float[] y"),
        ("b = Gather (table, rows) y = DequantizeLinear (b, s, z)", "float[] y"),
        ("a = QuantizeLinear (x, s, z) b = Pad (a, pads) y = DequantizeLinear (b, s, z)", "float[] y"),
        ("a = QuantizeLinear (x, s, z) b = Clip (a, k) y = DequantizeLinear (b, s, z)", "float[] y"),
        ("b = Reshape (u, flat) y = DequantizeLinear <axis = 0> (b, cs, cz)", "float[] y"),
        ("b = Transpose (u) y = DequantizeLinear <axis = 2> (b, cs, cz)", "float[] y"),
        ("b = MaxPool <kernel_shape = [2, 2]> (u) y = DequantizeLinear (b, negative, z)", "float[] y"),
        ("b = Flatten (u) r = Abs (s) y = DequantizeLinear (b, r, z)", "float[] y"),
        (
            "b, i = MaxPool <kernel_shape = [2, 2]> (u) y = DequantizeLinear (b, s, z)",
            "float[] y, int64[] i",
        ),
        ("r = Relu (x) y = Flatten (r)", "float[] y"),
    ],
)
def test_near_misses_are_left_alone(body: str, outputs: str) -> None:
    assert moves(model_of(body, outputs)) == 0


def test_a_zero_point_that_the_model_computes_stays_where_it_is() -> None:
    model = model_of("b = Flatten (u) r = Identity (z) y = DequantizeLinear (b, s, r)")
    assert not apply(FloatDataMovement(), model).modified


def test_a_movement_of_another_domain_is_none() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17, "my" : 1]> g (uint8[2,3] u) => (float[3,2] y)
        <float s = {0.5}> { b = my.Transpose (u) y = DequantizeLinear (b, s) }"""
    )
    assert not apply(FloatDataMovement(), model).modified


def test_what_is_moved_outside_of_a_branch_is_not_dequantized_in_it() -> None:
    model = parse(
        """g (bool c, uint8[2,3] u) => (float[3,2] y) <float s = {0.5}> {
          b = Transpose (u)
          y = If (c) <
            then_branch = t () => (float[3,2] p) { p = DequantizeLinear (b, s) },
            else_branch = e () => (float[3,2] q) { q = Cast <to = 1> (b) }
          >
        }"""
    )
    assert not apply(FloatDataMovement(), model).modified


def test_many_movements_of_one_tensor_share_one_dequantizer() -> None:
    branches = "\n".join(f"b{i} = Transpose (a) d{i} = DequantizeLinear (b{i}, s, z)" for i in range(20))
    model = model_of(f"a = QuantizeLinear (x, s, z) {branches} y = Sum ({', '.join(f'd{i}' for i in range(20))})")
    assert moves(model) == 20
    assert op_types(model).count("DequantizeLinear") == 1


MODELS = os.environ.get("QAT2INT8_ZOO", "")


@pytest.mark.zoo
@pytest.mark.skipif(not MODELS, reason="QAT2INT8_ZOO names no folder of models")
@pytest.mark.parametrize("path", sorted(Path(MODELS).glob("tf*.onnx")) if MODELS else [], ids=lambda p: p.stem)
def test_exported_models_compute_the_same(path: Path) -> None:
    model = Model.from_proto(onnx.load(path))
    Canonicalize().run(model, CTX)
    FoldConstants().run(model, CTX)
    before, pairs = model.to_proto(), sum(isinstance(fake, FakeQuant) for fake in fake_quants(model))
    moved = apply(FloatDataMovement(), model).modified
    stored = np.load(path.with_suffix(".npz"))
    assert_same_numbers(before, model, {model.graph.inputs[0].name or "": stored["input_0"]}, rtol=0, atol=1e-6)
    assert moved == (sum(isinstance(fake, FakeQuant) for fake in fake_quants(model)) > pairs)
