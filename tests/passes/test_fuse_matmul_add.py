import numpy as np
from support import apply, assert_same_numbers, check_pass, parse

from qat2int8.passes.fuse_matmul_add import FuseMatmulAdd

INITS = "<float[2, 3] w = {1, 2, 3, 4, 5, 6}, float[3] b = {7, 8, 9}>"


def test_two_dimensions_become_a_gemm() -> None:
    _, result = check_pass(
        FuseMatmulAdd(),
        f"g (float[N, 2] x) => (float[N, 3] y) {INITS} {{ [mm] c = MatMul (x, w) [add] y = Add (c, b) }}",
        f"g (float[N, 2] x) => (float[N, 3] y) {INITS} {{ [mm] y = Gemm (x, w, b) }}",
    )
    assert dict(result.counts) == {"fused": 1, "flattened": 0}


def test_more_dimensions_are_flattened_and_restored() -> None:
    text = f"g (float[N, 5, 2] x) => (float[N, 5, 3] y) {INITS} {{ [mm] c = MatMul (x, w) [add] y = Add (b, c) }}"
    model = parse(text)
    before = model.to_proto()
    assert dict(apply(FuseMatmulAdd(), model).counts) == {"fused": 0, "flattened": 1}
    assert [n.op_type for n in model.graph] == ["Reshape", "Gemm", "Reshape"]
    assert_same_numbers(before, model, {"x": np.random.default_rng(0).normal(size=(4, 5, 2)).astype(np.float32)})
