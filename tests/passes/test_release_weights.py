import ml_dtypes
import numpy as np
import pytest
from onnx import numpy_helper
from support import apply, graph_text, parse, run

from qat2int8.ir import Model
from qat2int8.passes.release_weights import ReleaseWeights

X = {"x": np.linspace(-2, 2, 16).reshape(4, 4).astype(np.float32)}


def product(body: str, constants: str) -> Model:
    return parse(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[4,4] x) => (float[4,2] y) <{constants}> {{ {body} [mm] y = MatMul (x, d) }}"""
    )


REFUSED = {
    "step per block": product(
        "[dq] d = DequantizeLinear <axis = 0, block_size = 2> (w, s, z)",
        "int8[4,2] w = {1,2,3,4,5,6,7,8}, float[2,2] s = {0.5,1,0.25,3}, int8[2,2] z = {1,0,2,0}",
    ),
    "16 bits": product(
        "[dq] d = DequantizeLinear (w, s, z)", "int16[4,2] w = {1,2,3,4,5,600,7,8}, float s = {0.1}, int16 z = {3}"
    ),
    "quantized on the way": product(
        "[q] q = QuantizeLinear (w, s, z) [dq] d = DequantizeLinear (q, s, z)",
        "float[4,2] w = {0.1,2,3,4,5,600,7,8}, float s = {0.1}, int16 z = {0}",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_weight_is_the_float_it_stands_for(name: str) -> None:
    model = REFUSED[name]
    expected = run(model, X)[0]
    assert apply(ReleaseWeights(), model).counts == {"released": 1}
    assert [node.op_type for node in model.graph] == ["MatMul"]
    assert len(model.graph.initializers) == 1
    np.testing.assert_array_equal(run(model, X, optimize=True)[0], expected)


def test_a_weight_of_float8_too() -> None:
    model = product(
        "[dq] d = DequantizeLinear (w, s, z)", "int16[4,2] w = {1,2,3,4,5,600,7,8}, float s = {0.1}, int16 z = {3}"
    ).to_proto()
    for tensor in model.graph.initializer:
        if tensor.name != "s":
            shape = (4, 2) if tensor.name == "w" else ()
            levels = np.full(shape, 3.25 if shape else 0).astype(ml_dtypes.float8_e4m3fn)
            tensor.CopyFrom(numpy_helper.from_array(levels, tensor.name))
    released = Model.from_proto(model)
    assert apply(ReleaseWeights(), released).counts == {"released": 1}
    np.testing.assert_array_equal(run(released, X)[0], run(model, X)[0])


@pytest.mark.parametrize(
    "model",
    [
        product("[dq] d = DequantizeLinear (w, s)", "int8[4,2] w = {1,2,3,4,5,6,7,8}, float s = {0.5}"),
        parse(
            """<ir_version: 10, opset_import: ["" : 21]>
            g (float[2] x) => (float[2] y) <float s = {0.5}, int16 z = {0}> {
              q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z) }"""
        ),
    ],
    ids=["an integer weight of a kernel", "an activation"],
)
def test_others_stay(model: Model) -> None:
    before = graph_text(model)
    assert not apply(ReleaseWeights(), model).modified
    assert graph_text(model) == before
