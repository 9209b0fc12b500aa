import numpy as np
import numpy.typing as npt
import pytest
from support import TARGET, apply, check_pass, parse, run

from qat2int8.ir import Model
from qat2int8.passes import Context
from qat2int8.passes.pad_stem_channels import PadStemChannels

MODEL = """
g (uint8[1,{channels},2,2] q) => (float[1,2,2,2] y)
<float s = {{0.5}}, uint8 z = {{128}}, int8[2,{depth},1,1] w = {{{weights}}},
 float[2] ws = {{1, 2}}, int8[2] wz = {{{zeros}}}> {{
  [dq] x = DequantizeLinear (q, s, z)
  [dw] wd = DequantizeLinear <axis = 0> (w, ws, wz)
  [conv] y = Conv {attributes} (x, wd)
}}
"""


def model(channels: int = 3, depth: int = 3, zeros: str = "0, 0", attributes: str = "") -> Model:
    weights = ", ".join(str(i + 1) for i in range(2 * depth))
    text = MODEL.format(channels=channels, depth=depth, weights=weights, zeros=zeros, attributes=attributes)
    return parse(" ".join(text.split()))


def integers(channels: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (1, channels, 2, 2)).astype(np.uint8)


def test_a_stem_gets_a_fourth_channel_of_zero_points_and_zero_weights() -> None:
    _, result = check_pass(
        PadStemChannels(),
        """
        g (uint8[1,3,2,2] q) => (float[1,1,2,2] y)
        <float s = {0.5}, uint8 z = {128}, int8[1,3,1,1] w = {1, 2, 3}, float ws = {1}, int8 wz = {0}> {
          [dq] x = DequantizeLinear (q, s, z)
          [dw] wd = DequantizeLinear <axis = 0> (w, ws, wz)
          [conv] y = Conv (x, wd)
        }
        """,
        """
        g (uint8[1,3,2,2] q) => (float[1,1,2,2] y)
        <float s = {0.5}, uint8 z = {128}, int8[1,3,1,1] w = {1, 2, 3}, float ws = {1}, int8 wz = {0},
         int64[8] conv_pads = {0, 0, 0, 0, 0, 1, 0, 0}, int8[1,4,1,1] w_stem = {1, 2, 3, 0}> {
          [conv_Pad] q_padded = Pad (q, conv_pads, z)
          [q_padded_DequantizeLinear] q_padded_dequantized = DequantizeLinear (q_padded, s, z)
          [w_stem_DequantizeLinear] w_stem_dequantized = DequantizeLinear <axis = 0> (w_stem, ws, wz)
          [conv] y = Conv (q_padded_dequantized, w_stem_dequantized)
        }
        """,
    )
    assert result.counts == {"padded": 1}


@pytest.mark.parametrize(("channels", "zeros"), [(4, "0, 0"), (8, "0, 0"), (4, "5, 5")])
def test_the_numbers_stay_the_same(channels: int, zeros: str) -> None:
    padded = model(zeros=zeros, attributes="<pads = [1,1,1,1], strides = [2,2], kernel_shape = [1,1]>")
    before = padded.to_proto()
    assert apply(PadStemChannels(channels=channels), padded).counts == {"padded": 1}
    assert padded.graph[-1].inputs[1] is not None
    feeds = {"q": integers(3)}
    np.testing.assert_array_equal(run(padded, feeds)[0], run(before, feeds)[0])


@pytest.mark.parametrize(
    "stem",
    [
        {"channels": 4, "depth": 4},
        {"channels": 1, "depth": 1},
        {"channels": 6, "depth": 3, "attributes": "<group = 2>"},
        {"zeros": "0, 3"},
    ],
    ids=["four channels", "one channel", "grouped", "weights with two zero points"],
)
def test_other_convolutions_are_left_alone(stem: dict[str, object]) -> None:
    assert not PadStemChannels().run(model(**stem), Context(TARGET)).modified  # type: ignore[arg-type]


def test_a_tensor_that_others_read_keeps_its_three_channels() -> None:
    shared = parse(
        " ".join(
            MODEL.format(channels=3, depth=3, weights="1, 2, 3, 4, 5, 6", zeros="0, 0", attributes="")
            .replace("(float[1,2,2,2] y)", "(float[1,2,2,2] y, float[1,3,2,2] copy)")
            .replace("[conv]", "[copied] copy = Neg (x) [conv]")
            .split()
        )
    )
    before = shared.to_proto()
    apply(PadStemChannels(), shared)
    for expected, actual in zip(run(before, {"q": integers(3)}), run(shared, {"q": integers(3)}), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(("perm", "shape", "padded"), [("0,3,1,2", "1,2,2,3", 0), ("0,2,1,3", "1,2,3,2", 1)])
def test_an_image_with_its_channels_last_is_left_alone(perm: str, shape: str, padded: int) -> None:
    text = (
        MODEL.format(channels=3, depth=3, weights="1, 2, 3, 4, 5, 6", zeros="0, 0", attributes="")
        .replace("uint8[1,3,2,2] q", f"uint8[{shape}] q")
        .replace("DequantizeLinear (q,", "DequantizeLinear (qt,")
        .replace("[dq]", f"[t] qt = Transpose <perm = [{perm}]> (q) [dq]")
    )
    assert PadStemChannels().run(parse(" ".join(text.split())), Context(TARGET)).counts == {"padded": padded}
