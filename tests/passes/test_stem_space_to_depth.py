import numpy as np
import pytest
from support import TARGET, apply, parse, run

from qat2int8.ir import Model
from qat2int8.passes import Context
from qat2int8.passes.stem_space_to_depth import StemSpaceToDepth


def stem(
    kernel: tuple[int, int] = (7, 7),
    pads: tuple[int, int, int, int] = (3, 3, 3, 3),
    size: tuple[object, object] = (16, 20),
    *,
    channels: int = 3,
    attributes: str = "strides = [2,2]",
) -> Model:
    rng = np.random.default_rng(0)
    count = 2 * channels * kernel[0] * kernel[1]
    weights = ", ".join(str(w) for w in rng.integers(-127, 128, count))
    return parse(
        f"""
        g (uint8[N,{channels},{size[0]},{size[1]}] q) => (float[N,2,H,W] y)
        <float s = {{0.5}}, uint8 z = {{117}}, int8[2,{channels},{kernel[0]},{kernel[1]}] w = {{{weights}}},
         float[2] ws = {{1, 2}}, int8[2] wz = {{0, 0}}, float[2] b = {{1, 2}}> {{
          [dq] x = DequantizeLinear (q, s, z)
          [dw] wd = DequantizeLinear <axis = 0> (w, ws, wz)
          [conv] y = Conv <pads = [{", ".join(map(str, pads))}], {attributes}> (x, wd, b)
        }}
        """
    )


@pytest.mark.parametrize(
    ("kernel", "pads"),
    [
        ((7, 7), (3, 3, 3, 3)),
        ((5, 5), (2, 2, 2, 2)),
        ((6, 5), (2, 1, 2, 1)),
        ((7, 7), (2, 2, 3, 3)),
        ((8, 6), (0, 1, 1, 0)),
    ],
)
def test_the_numbers_stay_the_same(kernel: tuple[int, int], pads: tuple[int, int, int, int]) -> None:
    model = stem(kernel, pads)
    before = model.to_proto()
    assert apply(StemSpaceToDepth(), model).counts == {"folded": 1}
    conv = model.graph[-1]
    assert tuple(conv.attributes.get_ints("strides")) == (1, 1)
    assert "SpaceToDepth" in [node.op_type for node in model.graph]
    q = np.random.default_rng(1).integers(0, 256, (2, 3, 16, 20)).astype(np.uint8)
    np.testing.assert_array_equal(run(model, {"q": q})[0], run(before, {"q": q})[0])


@pytest.mark.parametrize(
    "model",
    [
        stem((3, 3), (1, 1, 1, 1)),
        stem(attributes="strides = [1,1]"),
        stem(attributes="strides = [2,1]"),
        stem(attributes="strides = [2,2], dilations = [2,2]", size=(32, 32)),
        stem(size=(15, 20)),
        stem(size=("H0", 20)),
        stem(channels=4),
    ],
    ids=["small kernel", "stride 1", "uneven stride", "dilated", "odd height", "unknown height", "four channels"],
)
def test_other_convolutions_are_left_alone(model: Model) -> None:
    assert not StemSpaceToDepth().run(model, Context(TARGET)).modified


def photograph(outputs: int = 16, perm: str = "0,3,1,2", zero: int = 0) -> Model:
    """A stem whose image has its channels last."""
    weights = np.random.default_rng(0).integers(-127, 128, outputs * 27)
    shape = {"0,3,1,2": "N,16,20,3", "0,2,1,3": "N,16,3,20"}[perm]
    return parse(
        f"""
        g (uint8[{shape}] q) => (float[N,{outputs},H,W] y)
        <float s = {{0.5}}, uint8 z = {{117}}, float ws = {{1}}, int8 wz = {{{zero}}},
         int8[{outputs},3,3,3] w = {{{", ".join(map(str, weights))}}}, uint8[N,3,16,20] qt> {{
          [t] qt = Transpose <perm = [{perm}]> (q)
          [dq] x = DequantizeLinear (qt, s, z)
          [dw] wd = DequantizeLinear <axis = 0> (w, ws, wz)
          [conv] y = Conv <pads = [0,0,1,1], strides = [2,2]> (x, wd)
        }}
        """
    )


@pytest.mark.parametrize("zero", [0, -7])
def test_a_small_kernel_is_folded_where_channels_lie_last(zero: int) -> None:
    model = photograph(zero=zero)
    before = model.to_proto()
    assert apply(StemSpaceToDepth(), model).counts == {"folded": 1}
    q = np.random.default_rng(1).integers(0, 256, (2, 16, 20, 3)).astype(np.uint8)
    np.testing.assert_array_equal(run(model, {"q": q})[0], run(before, {"q": q})[0])


@pytest.mark.parametrize(
    "model", [photograph(8), photograph(perm="0,2,1,3")], ids=["few outputs", "another transpose"]
)
def test_other_small_kernels_are_left_alone(model: Model) -> None:
    assert not StemSpaceToDepth().run(model, Context(TARGET)).modified
