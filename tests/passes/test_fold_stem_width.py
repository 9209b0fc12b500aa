from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TARGET, apply, check_pass, parse, run

from qat2int8.ir import UINT8, Model, QuantParams
from qat2int8.ir.scale_table import TrainedTensor
from qat2int8.passes import Context
from qat2int8.passes.fold_stem_width import FoldStemWidth

MODEL = """
g (uint8[N,{height},{width},3] q) => (uint8[a,b,c,d] y)
<float s = {{0.05}}, uint8 z = {{7}}, int8[{m},3,{kernel}] w = {{{weights}}},
 float[{m}] ws = {{{scales}}}, int8[{m}] wz = {{{zeros}}}, int32[{m}] b = {{{biases}}},
 float[{m}] bs = {{{bias_scales}}}, int32[{m}] bz = {{{bias_zeros}}}, float low = {{0}}, float high = {{6}}> {{
  [t] p = Transpose <perm = {perm}> (q)
  [dq] x = DequantizeLinear (p, s, z)
  [dw] wd = DequantizeLinear <axis = 0> (w, ws, wz)
  [db] bd = DequantizeLinear <axis = 0> (b, bs, bz)
  [conv] c = Conv <{attributes}> (x, wd{bias})
  [clip] r = Clip (c, low, high)
  [quantize] {result} = QuantizeLinear (r, s, z)
  {tail}
}}
"""
TAIL = "[back] k = DequantizeLinear (i, s, z) [neg] n = Neg (k) [again] y = QuantizeLinear (n, s, z)"


def model(
    *,
    height: int = 6,
    width: int = 8,
    outputs: int = 2,
    kernel: tuple[int, int] = (3, 3),
    zero: int = 0,
    pads: tuple[int, ...] = (0, 0, 1, 1),
    strides: tuple[int, int] = (2, 2),
    perm: str = "[0,3,1,2]",
    bias: bool = True,
    seed: int = 0,
    **text: str,
) -> Model:
    rng = np.random.default_rng(seed)
    scales = rng.uniform(0.01, 0.02, outputs).astype(np.float32)

    def listed(array: Any) -> str:
        return ", ".join(str(one) for one in np.asarray(array).reshape(-1).tolist())

    fields = {
        "height": height,
        "width": width,
        "m": outputs,
        "kernel": f"{kernel[0]},{kernel[1]}",
        "weights": listed(rng.integers(-128, 128, (outputs, 3, *kernel))),
        "scales": listed(scales),
        "zeros": listed(np.full(outputs, zero)),
        "biases": listed(rng.integers(-900, 900, outputs)),
        "bias_scales": listed(scales * np.float32(0.05)),
        "bias_zeros": listed(np.zeros(outputs, int)),
        "perm": perm,
        "attributes": f"pads = {list(pads)}, strides = {list(strides)}",
        "bias": ", bd" if bias else "",
        "result": "i",
        "tail": TAIL,
    }
    return parse(" ".join(MODEL.format(**fields | text).split()))


def same(before: Any, after: Model, shape: tuple[int, ...] = (2, 6, 8, 3)) -> None:
    feeds = {"q": np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)}
    for optimize in (False, True):
        expected, actual = run(before, feeds, optimize=optimize), run(after, feeds, optimize=optimize)
        np.testing.assert_array_equal(actual[0], expected[0])


def test_four_pixels_become_one_and_two_outputs_too() -> None:
    before = """
    g (uint8[1,1,8,3] q) => (float[1,1,1,4] y)
    <float s = {0.5}, uint8 z = {7}, int8[1,3,1,2] w = {1, 2, 3, 4, 5, 6}, float ws = {1}, int8 wz = {-9}> {
      [t] p = Transpose <perm = [0,3,1,2]> (q)
      [dq] x = DequantizeLinear (p, s, z)
      [dw] wd = DequantizeLinear (w, ws, wz)
      [conv] c = Conv <strides = [2,2]> (x, wd)
      [quantize] i = QuantizeLinear (c, s, z)
      [back] y = DequantizeLinear (i, s, z)
    }
    """
    after = """
    g (uint8[1,1,8,3] q) => (float[1,1,1,4] y)
    <float s = {0.5}, uint8 z = {7}, int8[1,3,1,2] w = {1, 2, 3, 4, 5, 6}, float ws = {1}, int8 wz = {-9},
     int64[4] p_sizes = {0, 0, 2, 12}, float w_scale = {1}, int8 w_zero_point = {-9},
     int8[2,12,1,1] w_laid_out = {1, 3, 5, 2, 4, 6, -9, -9, -9, -9, -9, -9,
                                  -9, -9, -9, -9, -9, -9, 1, 3, 5, 2, 4, 6},
     int64[4] i_sizes = {0, 0, 4, 1}> {
      [p_blocks_Reshape] p_blocks = Reshape (q, p_sizes)
      [p_block_planes_Transpose] p_block_planes = Transpose <perm: ints = [0,3,1,2]> (p_blocks)
      [p_blocks_dequantized_DequantizeLinear] p_blocks_dequantized = DequantizeLinear (p_block_planes, s, z)
      [w_laid_out_DequantizeLinear] w_laid_out_dequantized = DequantizeLinear (w_laid_out, w_scale, w_zero_point)
      [conv] c = Conv <strides: ints = [2,1], pads: ints = [0,0,0,0], kernel_shape: ints = [1,1]>
        (p_blocks_dequantized, w_laid_out_dequantized)
      [quantize] i_pairs = QuantizeLinear (c, s, z)
      [i_rows_Transpose] i_rows = Transpose <perm: ints = [0,2,3,1]> (i_pairs)
      [i_pixels_Reshape] i_pixels = Reshape (i_rows, i_sizes)
      [i_planes_Transpose] i = Transpose <perm: ints = [0,3,1,2]> (i_pixels)
      [back] y = DequantizeLinear (i, s, z)
    }
    """
    _, result = check_pass(FoldStemWidth(most_channels=2), before, after)
    assert result.counts == {"folded": 1}


@pytest.mark.parametrize("most_channels", [0, 32])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"zero": 5},
        {"pads": (1, 1, 1, 1)},
        {"pads": (1, 1, 0, 0)},
        {"kernel": (3, 1), "pads": (0, 0, 0, 0)},
        {"kernel": (3, 4), "pads": (1, 1, 1, 1)},
        {"kernel": (1, 3), "strides": (1, 2)},
        {"outputs": 1, "bias": False},
        {"height": 7, "width": 12},
    ],
)
def test_the_numbers_stay_the_same(options: dict[str, Any], most_channels: int) -> None:
    folded = model(**options)
    before = folded.to_proto()
    assert apply(FoldStemWidth(most_channels=most_channels), folded).counts == {"folded": 1}
    same(before, folded, (2, options.get("height", 6), options.get("width", 8), 3))


@pytest.mark.parametrize(
    "options",
    [
        {"perm": "[0,3,2,1]", "height": 8},
        {"width": 10},
        {"pads": (0, 0, 1, 0), "kernel": (3, 4)},
        {"strides": (2, 1)},
        {"kernel": (3, 5), "pads": (0, 2, 1, 1)},
        {"attributes": 'strides = [2, 2], auto_pad = "SAME_UPPER"'},
        {"attributes": "strides = [2, 2], pads = [1, 1, 1, 1], dilations = [1, 2]"},
        {"width": "W"},
        {"result": "y", "tail": ""},
        {"tail": "[n] m = Neg (r) [again] y = QuantizeLinear (m, s, z)"},
    ],
    ids=[
        "another order of axes",
        "a width that is no multiple of four",
        "an odd number of outputs",
        "another stride",
        "a wide kernel",
        "automatic padding",
        "a dilated kernel",
        "an unknown width",
        "integers that are a graph output",
        "a reader of floats",
    ],
)
def test_other_convolutions_are_left_alone(options: dict[str, Any]) -> None:
    assert not FoldStemWidth().run(model(**options), Context(TARGET)).modified


@pytest.mark.parametrize(
    ("width", "outputs", "pixels"), [(16, 8, 4), (16, 9, 2), (16, 40, 2), (12, 8, 2)], ids=str
)
def test_four_outputs_are_computed_at_once_where_they_are_narrow_and_fit(
    width: int, outputs: int, pixels: int
) -> None:
    folded = model(width=width, outputs=outputs)
    apply(FoldStemWidth(), folded)
    assert folded.values()["w_laid_out"].shape == (pixels * outputs, 6 * pixels, 3, 2)


def test_a_reader_of_the_image_and_two_of_the_result_see_what_they_saw() -> None:
    tail = f"{TAIL.replace('y =', 'o =')} [max] e = Max (i, o) [d] f = DequantizeLinear (e, s, z) "
    tail += "[pool] g1 = GlobalMaxPool (x) [add] h = Add (f, g1) [last] y = QuantizeLinear (h, s, z)"
    folded = model(outputs=3, tail=tail)
    before = folded.to_proto()
    assert apply(FoldStemWidth(), folded).counts == {"folded": 1}
    same(before, folded)


def test_what_the_integers_were_in_the_source_goes_to_the_pixels() -> None:
    folded = model()
    trained = TrainedTensor("c", "i", QuantParams.make(0.05, 7, UINT8))
    folded.scales.trace(folded.values()["i"], trained)
    apply(FoldStemWidth(), folded)
    assert [(value.name, tensor) for value, tensor in folded.scales.traces()] == [("i", trained)]
    assert folded.values()["i"].producer().op_type == "Transpose"  # type: ignore[union-attr]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_random_stems_keep_their_numbers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kernel = (int(rng.integers(1, 4)), int(rng.integers(1, 5)))
    pads = tuple(int(pad) for pad in rng.integers(0, 3, 4))
    shape = (int(rng.integers(1, 3)), int(rng.integers(4, 9)), 4 * int(rng.integers(1, 5)), 3)
    folded = model(
        height=shape[1],
        width=shape[2],
        outputs=int(rng.integers(1, 6)),
        kernel=kernel,
        pads=pads,
        zero=int(rng.integers(-20, 20)),
        strides=(int(rng.integers(1, 3)), 2),
        bias=bool(rng.integers(2)),
        seed=seed,
    )
    before = folded.to_proto()
    outputs = (shape[2] + pads[1] + pads[3] - kernel[1]) // 2 + 1
    assert bool(apply(FoldStemWidth(), folded).counts["folded"]) == (outputs % 2 == 0)
    same(before, folded, shape)
