from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from support import TARGET, apply, check_pass, run

from qat2int8.ir import Model
from qat2int8.passes import Context
from qat2int8.passes.pad_channels import PadChannels

GRID = (0.05, 3)


class Network:
    """Convs on integers in a row."""

    def __init__(self, seed: int = 0, channels: int = 4) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.outputs: list[Any] = []
        self.step = self.constant("s", np.float32(GRID[0]))
        self.zero = self.constant("z", np.uint8(GRID[1]))
        self.shape = [1, channels, 6, 6]

    def constant(self, name: str, array: Any) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"n_{name}", **attributes))
        return name

    def conv(
        self,
        name: str,
        source: str,
        shape: tuple[int, ...],
        *,
        per_channel: bool = True,
        zero: int = 0,
        bias: bool = True,
        clip: bool = False,
        **attributes: Any,
    ) -> str:
        """A Conv that reads the integers ``source``; returns its own."""
        outputs = shape[0]
        size = (outputs,) if per_channel else ()
        scale = self.rng.uniform(0.002, 0.01, size).astype(np.float32)
        levels = self.rng.integers(-127, 128, shape).astype(np.int8)
        parameters = [self.constant(f"{name}_s", scale), self.constant(f"{name}_z", np.full(size, zero, np.int8))]
        x = self.node("DequantizeLinear", [source, self.step, self.zero], f"{name}_x")
        w = self.node("DequantizeLinear", [self.constant(f"{name}_w", levels), *parameters], f"{name}_wd", axis=0)
        operands = [x, w]
        if bias:
            added = self.constant(f"{name}_b", self.rng.integers(-2000, 2000, (outputs,)).astype(np.int32))
            parameters = [
                self.constant(f"{name}_bs", scale * np.float32(GRID[0])),
                self.constant(f"{name}_bz", np.zeros(size, np.int32)),
            ]
            operands.append(self.node("DequantizeLinear", [added, *parameters], f"{name}_bd", axis=0))
        y = self.node("Conv", operands, f"{name}_y", **attributes)
        if clip:
            bounds = [self.constant(f"{name}_{i}", np.float32(bound)) for i, bound in enumerate((0.5, 6))]
            y = self.node("Clip", [y, *bounds], f"{name}_c")
        return self.node("QuantizeLinear", [y, self.step, self.zero], f"{name}_q")

    def output(self, name: str, element: int = TensorProto.UINT8) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, element, [f"{name}{i}" for i in range(4)]))

    def model(self) -> Model:
        image = helper.make_tensor_value_info("q", TensorProto.UINT8, self.shape)
        graph = helper.make_graph(self.nodes, "g", [image], self.outputs, self.initializers)
        return Model.from_proto(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        )

    def feeds(self) -> dict[str, Any]:
        return {"q": self.rng.integers(0, 256, self.shape).astype(np.uint8)}


def block(channels: int = 12, **depthwise: Any) -> Network:
    """Dense, depthwise, dense."""
    network = Network()
    a = network.conv("a", "q", (channels, 4, 1, 1))
    b = network.conv("b", a, (channels, 1, 3, 3), **{"group": channels, "pads": [1, 1, 1, 1]} | depthwise)
    network.output(network.conv("c", b, (5, channels, 1, 1)))
    return network


def shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """The shape of every Conv's weight."""
    found = {}
    for node in model.nodes("Conv"):
        assert node.inputs[1] is not None
        weight = node.inputs[1].producer()
        assert weight is not None
        levels = model.constant(weight.inputs[0])
        assert levels is not None
        found[node.outputs[0].name or ""] = levels.shape
    return found


def same(network: Network, padded: Model) -> None:
    feeds = network.feeds()
    for optimize in (False, True):
        expected, actual = run(network.model(), feeds, optimize=optimize), run(padded, feeds, optimize=optimize)
        for one, other in zip(expected, actual, strict=True):
            np.testing.assert_array_equal(other, one)


def test_every_layer_that_sees_the_channels_gets_zeros() -> None:
    before = """
    g (uint8[1,1,2,2] q) => (float[1,1,2,2] y)
    <float s = {0.5}, uint8 z = {3}, int8 wz = {0}, float ws = {1},
     int8[3] wz3 = {0, 0, 5}, float[3] ws3 = {1, 2, 4},
     int8[3,1,1,1] a = {1, 2, 3}, int32[3] b = {7, 8, 9}, float[3] bs = {0.5, 1, 2}, int32[3] bz = {0, 0, 0},
     int8[3,1,1,1] d = {4, 5, 6}, int8[1,3,1,1] c = {7, 8, 9}> {
      [xq] x = DequantizeLinear (q, s, z)
      [ad] af = DequantizeLinear <axis = 0> (a, ws3, wz3)
      [bd] bf = DequantizeLinear <axis = 0> (b, bs, bz)
      [first] h = Conv (x, af, bf)
      [hq] hi = QuantizeLinear (h, s, z)
      [hd] hf = DequantizeLinear (hi, s, z)
      [dd] df = DequantizeLinear (d, ws, wz)
      [middle] k = Conv <group = 3> (hf, df)
      [kq] ki = QuantizeLinear (k, s, z)
      [kd] kf = DequantizeLinear (ki, s, z)
      [cd] cf = DequantizeLinear (c, ws, wz)
      [last] y = Conv (kf, cf)
    }
    """
    after = """
    g (uint8[1,1,2,2] q) => (float[1,1,2,2] y)
    <float s = {0.5}, uint8 z = {3}, int8 wz = {0}, float ws = {1},
     int8[3] wz3 = {0, 0, 5}, float[3] ws3 = {1, 2, 4},
     int8[3,1,1,1] a = {1, 2, 3}, int32[3] b = {7, 8, 9}, float[3] bs = {0.5, 1, 2}, int32[3] bz = {0, 0, 0},
     int8[3,1,1,1] d = {4, 5, 6}, int8[1,3,1,1] c = {7, 8, 9},
     float[4] a_scale = {1, 2, 4, 4}, int8[4] a_zero_point = {0, 0, 5, 5}, int8[4,1,1,1] a_laid_out = {1, 2, 3, 5},
     float[4] b_scale = {0.5, 1, 2, 2}, int32[4] b_zero_point = {0, 0, 0, 0}, int32[4] b_laid_out = {7, 8, 9, 0},
     float d_scale = {1}, int8 d_zero_point = {0}, int8[4,1,1,1] d_laid_out = {4, 5, 6, 0},
     int8[1,4,1,1] c_laid_out = {7, 8, 9, 0}> {
      [xq] x = DequantizeLinear (q, s, z)
      [a_laid_out_DequantizeLinear] a_laid_out_dequantized
        = DequantizeLinear <axis = 0> (a_laid_out, a_scale, a_zero_point)
      [b_laid_out_DequantizeLinear] b_laid_out_dequantized
        = DequantizeLinear <axis = 0> (b_laid_out, b_scale, b_zero_point)
      [first] h = Conv (x, a_laid_out_dequantized, b_laid_out_dequantized)
      [hq] hi = QuantizeLinear (h, s, z)
      [hd] hf = DequantizeLinear (hi, s, z)
      [d_laid_out_DequantizeLinear] d_laid_out_dequantized
        = DequantizeLinear (d_laid_out, d_scale, d_zero_point)
      [middle] k = Conv <group: int = 4> (hf, d_laid_out_dequantized)
      [kq] ki = QuantizeLinear (k, s, z)
      [kd] kf = DequantizeLinear (ki, s, z)
      [c_laid_out_DequantizeLinear] c_laid_out_dequantized = DequantizeLinear (c_laid_out, ws, wz)
      [last] y = Conv (kf, c_laid_out_dequantized)
    }
    """
    _, result = check_pass(PadChannels(multiple=4), before, after)
    assert result.counts == {"padded": 1}


@pytest.mark.parametrize("dense", [{"zero": 5}, {"per_channel": False}, {"bias": False}, {"clip": True}])
def test_the_numbers_stay_the_same_whatever_the_layers_are_like(dense: dict[str, Any]) -> None:
    network = Network()
    a = network.conv("a", "q", (12, 4, 3, 3), pads=[1, 1, 1, 1], **dense)
    b = network.conv("b", a, (12, 1, 3, 3), group=12, pads=[1, 1, 1, 1], **{"clip": True} | dense | {"zero": 0})
    network.output(network.conv("c", b, (5, 12, 3, 3), pads=[0, 1, 1, 0], **dense))
    padded = network.model()
    assert apply(PadChannels(), padded).counts == {"padded": 1}
    assert shapes(padded) == {"a_y": (16, 4, 3, 3), "b_y": (16, 1, 3, 3), "c_y": (5, 16, 3, 3)}
    same(network, padded)


def test_all_readers_are_padded_through_depthwise_layers_in_a_row() -> None:
    network = Network()
    a = network.conv("a", "q", (24, 4, 1, 1))
    b = network.conv("b", a, (24, 1, 3, 3), group=24)
    c = network.conv("c", b, (24, 1, 3, 3), group=24)
    for name, source in (("d", a), ("e", b), ("f", c)):
        network.output(network.conv(name, source, (3, 24, 1, 1)))
    padded = network.model()
    apply(PadChannels(), padded)
    assert {shape[0] if name[0] in "abc" else shape[1] for name, shape in shapes(padded).items()} == {32}
    same(network, padded)


def read_by_an_add() -> Network:
    network = block()
    x = network.node("DequantizeLinear", ["b_q", "s", "z"], "x2")
    network.output(network.node("Add", [x, x], "sum"), TensorProto.FLOAT)
    return network


def read_in_float() -> Network:
    network = block()
    network.output(network.node("Neg", ["b_x"], "negated"), TensorProto.FLOAT)
    return network


def shown(name: str, element: int = TensorProto.UINT8) -> Network:
    network = block()
    network.output(name, element)
    return network


def two_in_a_group() -> Network:
    network = Network()
    a = network.conv("a", "q", (12, 4, 1, 1))
    b = network.conv("b", a, (12, 2, 3, 3), group=6)
    c = network.conv("c", b, (12, 1, 3, 3), group=12)
    network.output(network.conv("d", c, (5, 12, 1, 1)))
    return network


def two_from_each() -> Network:
    network = Network()
    a = network.conv("a", "q", (12, 4, 1, 1))
    b = network.conv("b", a, (24, 1, 3, 3), group=12)
    network.output(network.conv("c", b, (5, 24, 1, 1)))
    return network


def no_depthwise() -> Network:
    network = Network()
    a = network.conv("a", "q", (12, 4, 1, 1))
    network.output(network.conv("b", a, (5, 12, 1, 1)))
    return network


def unknown_weight() -> Network:
    network = Network()
    a = network.conv("a", "q", (12, 4, 1, 1))
    b = network.conv("b", a, (12, 1, 3, 3), group=12)
    x = network.node("DequantizeLinear", [b, "s", "z"], "x2")
    w = network.constant("wf", np.ones((5, 12, 1, 1), np.float32))
    network.output(network.node("Conv", [x, w], "y"), TensorProto.FLOAT)
    return network


@pytest.mark.parametrize(
    "network",
    [
        block(16),
        block(7),
        block(zero=4),
        read_by_an_add(),
        read_in_float(),
        shown("a_q"),
        shown("b_y", TensorProto.FLOAT),
        shown("b_x", TensorProto.FLOAT),
        two_in_a_group(),
        two_from_each(),
        no_depthwise(),
        unknown_weight(),
    ],
    ids=[
        "a multiple already",
        "too few channels",
        "a zero point in the depthwise weight",
        "an Add",
        "a reader of floats",
        "integers that are a graph output",
        "floats that are a graph output",
        "dequantized floats that are a graph output",
        "two channels to a group",
        "two outputs from each channel",
        "no depthwise layer",
        "a float weight",
    ],
)
def test_other_channels_are_left_alone(network: Network) -> None:
    assert not PadChannels().run(network.model(), Context(TARGET)).modified


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_random_networks_keep_their_numbers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    network = Network(seed)
    source, channels = "q", 4
    for index in range(int(rng.integers(1, 3))):
        hidden = int(rng.integers(8, 40))
        options = {name: bool(rng.integers(2)) for name in ("per_channel", "bias", "clip")}
        zero = int(rng.integers(-9, 9))
        source = network.conv(f"a{index}", source, (hidden, channels, 1, 1), zero=zero, **options)
        for depth in range(int(rng.integers(1, 3))):
            source = network.conv(
                f"b{index}{depth}", source, (hidden, 1, 3, 3), group=hidden, pads=[1, 1, 1, 1], **options
            )
        channels = int(rng.integers(1, 9))
        source = network.conv(f"c{index}", source, (channels, hidden, 1, 1), zero=zero, **options)
    network.output(source)
    padded = network.model()
    apply(PadChannels(), padded)
    same(network, padded)
