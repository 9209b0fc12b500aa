import numpy as np
import pytest
from support import apply, parse

from qat2int8.passes.fold_constants import FoldConstants


def test_a_computed_zero_point_becomes_an_initializer() -> None:
    model = parse(
        """
        g (float[2,3] x) => (float[2,3] y) <int64[1] n = {3}, float[3] s = {1, 2, 3}> {
          [shape] zeros = ConstantOfShape (n)
          [cast] zp = Cast <to = 3> (zeros)
          [q] q = QuantizeLinear <axis = 1> (x, s, zp)
          [dq] y = DequantizeLinear <axis = 1> (q, s, zp)
        }
        """
    )
    assert apply(FoldConstants(), model).counts["folded"] == 2
    assert [node.op_type for node in model.graph] == ["QuantizeLinear", "DequantizeLinear"]
    zero_point = model.graph[0].inputs[2]
    assert zero_point is not None
    assert zero_point.name == "zp"
    np.testing.assert_array_equal(model.constant(zero_point), np.zeros(3, np.int8))


@pytest.mark.parametrize(
    "body",
    [
        "[dq] w = DequantizeLinear (q, s) [add] y = Add (x, w)",
        "[neg] y = Neg (x)",
        "[like] r = RandomNormalLike (s) [add] y = Add (x, r)",
    ],
    ids=["dequantize", "depends on an input", "random"],
)
def test_what_is_not_constant_or_says_something_stays(body: str) -> None:
    model = parse(f"g (float[3] x) => (float[3] y) <uint8[3] q = {{1, 2, 3}}, float s = {{0.5}}> {{ {body} }}")
    assert not apply(FoldConstants(), model).modified


def test_a_graph_output_that_is_constant_stays_computed() -> None:
    model = parse(
        "g (float[2] x) => (float[2] y, float[2] z) <float[2] c = {1, 2}> { [a] y = Add (x, c) [b] z = Neg (c) }"
    )
    assert not apply(FoldConstants(), model).modified


def test_a_result_over_the_limit_stays() -> None:
    text = """
    g (float[1] x) => (float[N] y) <int64[1] n = {1000}> {
      [shape] zeros = ConstantOfShape (n)
      [add] y = Add (x, zeros)
    }
    """
    assert not apply(FoldConstants(size_limit=999), parse(text)).modified
    assert apply(FoldConstants(size_limit=1000), parse(text)).counts["folded"] == 1
