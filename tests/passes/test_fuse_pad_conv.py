import numpy as np
import pytest
from support import TARGET, apply, assert_same_numbers, check_pass, parse

from qat2int8.ir import UINT8, QuantParams
from qat2int8.passes import Context
from qat2int8.passes.fuse_pad_conv import FusePadConv

GRID = QuantParams.make(0.25, 3, UINT8)
OTHER = QuantParams.make(0.5, 3, UINT8)


def padded(
    pads: str = "0,0,1,2,0,0,3,4",
    *,
    pad: str = "Pad (x, p)",
    conv: str = "Conv (a, w)",
    extra: str = "",
    outputs: str = "",
    header: str = "",
) -> str:
    count = pads.count(",") + 1
    return f"""{header} g (float[1,1,5,5] x) => (float[1,1,H,W] y{outputs})
    <int64[{count}] p = {{{pads}}}, float[1,1,2,2] w = {{1,2,3,4}}, float zero = {{0}}, float one = {{1}},
     int64[2] axes = {{2,-1}}> {{
      {extra} [pad] a = {pad} [conv] y = {conv}
    }}"""


def test_the_pads_go_into_the_convolution() -> None:
    model, result = check_pass(
        FusePadConv(),
        padded(conv="Conv <pads = [1,1,1,1], strides = [2,2]> (a, w)"),
        padded(conv="Conv <pads = [2,3,4,5], strides = [2,2]> (x, w)").replace("[pad] a = Pad (x, p)", ""),
        scales={"a": GRID},
    )
    assert result.counts == {"fused": 1}
    assert model.scales[model.values()["x"]].same_grid(GRID)


@pytest.mark.parametrize(
    "text",
    [
        padded(),
        padded(pad="Pad (x, p, zero)", conv='Conv <auto_pad = "VALID"> (a, w)'),
        padded("0,0,0,1,0,0,0,1", conv="Conv <pads = [0,1,0,2], dilations = [2,2]> (a, w)"),
        padded("1,2,3,4", pad="Pad (x, p, zero, axes)", header='<ir_version: 8, opset_import: ["" : 18]>'),
    ],
    ids=["plain", "valid", "dilated", "axes"],
)
def test_the_numbers_stay_the_same(text: str) -> None:
    model = parse(text)
    before = model.to_proto()
    assert apply(FusePadConv(), model).counts == {"fused": 1}
    x = np.random.default_rng(0).standard_normal((1, 1, 5, 5)).astype(np.float32)
    assert_same_numbers(before, model, {"x": x})


@pytest.mark.parametrize(
    "text",
    [
        padded(pad="Pad (x, p, one)"),
        padded(pad='Pad <mode = "edge"> (x, p)'),
        padded(pad='Pad <mode = "reflect"> (x, p)'),
        padded("0,1,1,2,0,0,3,4").replace("float[1,1,2,2] w = {1,2,3,4}", "float[1,2,2,2] w = {1,2,3,4,5,6,7,8}"),
        padded("0,0,-1,0,0,0,0,0"),
        padded(conv='Conv <auto_pad = "SAME_UPPER"> (a, w)'),
        padded(conv="MaxPool <kernel_shape = [2,2]> (a)"),
        padded(outputs=", float[1,1,u,v] a"),
        padded(conv="Conv (x, w) [n] z = Abs (a)", outputs=", float[1,1,u,v] z"),
        padded().replace("int64[8] p = {0,0,1,2,0,0,3,4}, ", "").replace("x)", "x, int64[8] p)", 1),
    ],
    ids=[
        "ones",
        "edge",
        "reflect",
        "channels too",
        "cut",
        "padded by itself",
        "a pool",
        "graph output",
        "another reader",
        "computed pads",
    ],
)
def test_other_pads_stay(text: str) -> None:
    assert not FusePadConv().run(parse(text), Context(TARGET)).modified


@pytest.mark.parametrize(
    ("extra", "before", "fused"),
    [("", {"x": GRID, "a": GRID}, 1), ("", {"x": GRID}, 1), ("", {"x": OTHER, "a": GRID}, 0)],
    ids=["the same", "only in front", "another one"],
)
def test_the_grid_decides(extra: str, before: dict[str, QuantParams], fused: int) -> None:
    model = parse(padded(extra=extra))
    for name, params in before.items():
        model.scales.set(model.values()[name], params)
    assert apply(FusePadConv(), model).counts == {"fused": fused}
    assert model.scales[model.values()["x"]].same_grid(before["x"])


def test_a_tensor_that_others_read_in_float_gets_no_grid() -> None:
    model = parse(padded(extra="[n] z = Abs (x)", outputs=", float[1,1,5,5] z"))
    model.scales.set(model.values()["a"], GRID)
    assert not apply(FusePadConv(), model).modified
