from support import check_pass

from qat2int8.passes.fuse_conv_relu import FuseConvRelu

CONV = "float[2, 1, 1, 1] w = {3, 4}"


def test_max_with_zero_is_a_relu() -> None:
    check_pass(
        FuseConvRelu(),
        "g (float[4] x) => (float[4] y) <float zero = {0}> { [m] y = Max (x, zero) }",
        "g (float[4] x) => (float[4] y) <float zero = {0}> { [m] y = Relu (x) }",
    )


def test_a_relu_moves_in_front_of_the_pool() -> None:
    check_pass(
        FuseConvRelu(),
        f"""
        g (float[1, 1, 4, 4] x) => (float[1, 2, 2, 2] y) <{CONV}> {{
          [conv] c = Conv (x, w)
          [pool] p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c)
          [relu] y = Relu (p)
        }}
        """,
        f"""
        g (float[1, 1, 4, 4] x) => (float[1, 2, 2, 2] y) <{CONV}> {{
          [conv] c = Conv (x, w)
          [relu] c_clamped = Relu (c)
          [pool] y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c_clamped)
        }}
        """,
    )
