import numpy as np
import pytest
from support import apply, assert_same_numbers, check_pass, parse

from qat2int8.ir import INT8, QuantParams
from qat2int8.passes.fuse_conv_bias import FuseConvBias


@pytest.mark.parametrize("shape", ["1, 2, 1, 1", "2, 1, 1"])
@pytest.mark.parametrize("order", ["c, k", "k, c"])
def test_an_added_constant_becomes_the_bias(shape: str, order: str) -> None:
    text = f"""
    g (float[N, 1, 4, 4] x) => (float[N, 2, 4, 4] y)
      <float[2, 1, 1, 1] w = {{3, 4}}, float[{shape}] k = {{5, 6}}>
      {{ [conv] c = Conv (x, w) [add] y = Add ({order}) }}
    """
    check_pass(
        FuseConvBias(),
        text,
        f"""
        g (float[N, 1, 4, 4] x) => (float[N, 2, 4, 4] y)
          <float[2, 1, 1, 1] w = {{3, 4}}, float[{shape}] k = {{5, 6}}, float[2] "conv.bias" = {{5, 6}}>
          {{ [conv] y = Conv (x, w, "conv.bias") }}
        """,
    )
