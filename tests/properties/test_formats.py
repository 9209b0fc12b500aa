"""Whatever stands between Dequantize and Quantize: as operators on integers it computes the same, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from support import apply, run

from qat2int8.ir import Model
from qat2int8.passes import Context
from qat2int8.passes.lower_to_qoperators import LowerToQoperators
from qat2int8.passes.raise_qoperators import RaiseQoperators
from qat2int8.pipelines.certificate import certify
from qat2int8.pipelines.target_files import load_target

CTX = Context(load_target("ort-x86"))
SIDE = 6


@dataclass
class Graph:
    """A graph under construction: images on grids, by the names of their integers, with their channels."""

    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    images: dict[str, int] = field(default_factory=dict)
    grids: dict[str, tuple[str, str]] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)

    def constant(self, array: npt.ArrayLike) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, op_type: str, inputs: list[str], **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=f"n{len(self.nodes)}", **attributes))
        return name

    def grid(self) -> tuple[str, str]:
        """A scale from 0.01 to 0.3 and any zero point."""
        scale = np.float32(10 ** self.rng.uniform(-2, -0.5))
        return self.constant(scale), self.constant(np.uint8(self.rng.integers(0, 256)))

    def read(self, image: str) -> str:
        return self.node("DequantizeLinear", [image, *self.grids[image]])

    def write(self, value: str, channels: int, grid: tuple[str, str] | None = None) -> None:
        grid = grid or self.grid()
        image = self.node("QuantizeLinear", [value, *grid])
        self.images[image], self.grids[image] = channels, grid

    def weight(self, shape: tuple[int, ...], axis: int | None, step: str) -> tuple[str, str | None]:
        """A weight with a step per channel of ``axis`` or one in all, and a bias or none."""
        channels = shape[axis or 0] if axis is not None else ()
        steps = (10 ** self.rng.uniform(-3, -1.5, channels)).astype(np.float32)
        axes = {} if axis is None else {"axis": axis}
        levels = self.constant(self.rng.integers(-128, 128, shape).astype(np.int8))
        zeros = np.zeros_like(steps, np.int8)
        weight = self.node("DequantizeLinear", [levels, self.constant(steps), self.constant(zeros)], **axes)
        if self.rng.random() < 0.3:
            return weight, None
        data = next(numpy_helper.to_array(tensor) for tensor in self.constants if tensor.name == step)
        size = shape[axis] if axis is not None else shape[0]
        bias = self.constant(self.rng.integers(-20000, 20000, size).astype(np.int32))
        axes = {} if axis is None else {"axis": 0}
        read = [bias, self.constant(np.asarray(data * steps, np.float32))]
        return weight, self.node("DequantizeLinear", read, **axes)

    def to_model(self) -> onnx.ModelProto:
        shape = [1, self.images["x"], SIDE, SIDE]
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.UINT8, shape)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self.outputs],
            self.constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def conv(graph: Graph, image: str) -> None:
    channels, grouped = graph.images[image], graph.rng.random() < 0.3
    outputs = channels if grouped else int(graph.rng.integers(1, 6))
    kernel = int(graph.rng.choice([1, 3]))
    shape = (outputs, 1 if grouped else channels, kernel, kernel)
    weight, bias = graph.weight(shape, graph.rng.choice([0, None]), graph.grids[image][0])
    inputs = [graph.read(image), weight, *([] if bias is None else [bias])]
    pads = [kernel // 2] * 4
    graph.write(graph.node("Conv", inputs, group=channels if grouped else 1, pads=pads), outputs)


def join(graph: Graph, image: str) -> None:
    """With another image of as many channels, or itself, or a constant per channel."""
    channels = graph.images[image]
    others = [other for other, count in graph.images.items() if count == channels]
    if graph.rng.random() < 0.3:
        levels = graph.constant(graph.rng.integers(0, 256, (1, channels, 1, 1)).astype(np.uint8))
        other = graph.node("DequantizeLinear", [levels, *graph.grid()])
    else:
        other = graph.read(str(graph.rng.choice(others)))
    op_type = str(graph.rng.choice(["Add", "Mul"]))
    graph.write(graph.node(op_type, [graph.read(image), other]), channels)


def concat(graph: Graph, image: str) -> None:
    others = list(graph.images)
    read = [image, *(str(graph.rng.choice(others)) for _ in range(int(graph.rng.integers(1, 3))))]
    joined = graph.node("Concat", [graph.read(each) for each in read], axis=1)
    graph.write(joined, sum(graph.images[each] for each in read))


def curve(graph: Graph, image: str) -> None:
    op_type = str(graph.rng.choice(["Sigmoid", "LeakyRelu"]))
    graph.write(graph.node(op_type, [graph.read(image)]), graph.images[image])


def average(graph: Graph, image: str) -> None:
    pooled = graph.node("AveragePool", [graph.read(image)], kernel_shape=[3, 3], pads=[1] * 4)
    graph.write(pooled, graph.images[image])


def move(graph: Graph, image: str) -> None:
    """On the integers themselves: a pool, or a clip."""
    if graph.rng.random() < 0.5:
        moved = graph.node("MaxPool", [image], kernel_shape=[3, 3], pads=[1] * 4)
    else:
        moved = graph.node("Clip", [image, graph.constant(np.uint8(9)), graph.constant(np.uint8(200))])
    graph.images[moved], graph.grids[moved] = graph.images[image], graph.grids[image]


def float_island(graph: Graph, image: str) -> None:
    """No operator computes it."""
    op_type = str(graph.rng.choice(["Tanh", "Abs"]))
    graph.write(graph.node(op_type, [graph.read(image)]), graph.images[image])


def head(graph: Graph, image: str) -> str:
    """A mean, a Flatten of integers and a Gemm or MatMul that ends in float or on a grid."""
    channels, classes = graph.images[image], int(graph.rng.integers(2, 8))
    graph.write(graph.node("GlobalAveragePool", [graph.read(image)]), channels)
    pooled = list(graph.images)[-1]
    flat = graph.node("Flatten", [pooled])
    graph.grids[flat] = graph.grids[pooled]
    transposed = bool(graph.rng.random() < 0.5)
    gemm = bool(graph.rng.random() < 0.7)
    axis = graph.rng.choice([0 if transposed and gemm else 1, None])
    shape = (classes, channels) if transposed and gemm else (channels, classes)
    weight, bias = graph.weight(shape, axis, graph.grids[flat][0])
    inputs = [graph.read(flat), weight]
    if not gemm:
        product = graph.node("MatMul", inputs)
    else:
        usable = bias is not None and (axis is not None or transposed)
        product = graph.node("Gemm", [*inputs, bias] if usable and bias else inputs, transB=int(transposed))
    if graph.rng.random() < 0.5:
        return product
    grid = graph.grid()
    return graph.node("DequantizeLinear", [graph.node("QuantizeLinear", [product, *grid]), *grid])


STEPS: list[Callable[[Graph, str], None]] = [
    *(conv, conv, conv, join, join),
    *(concat, curve, average, move, float_island),
]


def random_graph(seed: int, steps: int) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    graph = Graph(rng)
    graph.images["x"], graph.grids["x"] = int(rng.integers(1, 5)), graph.grid()
    for _ in range(steps):
        rng.choice(STEPS)(graph, str(rng.choice(list(graph.images)[-3:])))  # type: ignore[arg-type]
    graph.outputs.append(head(graph, list(graph.images)[-1]))
    for image in rng.choice(list(graph.images), 2):
        graph.outputs.append(graph.node("Neg", [graph.read(str(image))]))
    return graph.to_model()


@pytest.mark.slow
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_both_forms_are_executed_alike(seed: int, steps: int) -> None:
    proto = random_graph(seed, steps)
    channels = proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    feeds = {"x": np.random.default_rng(seed).integers(0, 256, (1, channels, SIDE, SIDE)).astype(np.uint8)}
    fused = run(proto, feeds, optimize=True)
    model = Model.from_proto(proto)
    assert apply(LowerToQoperators(), model, CTX).modified
    for optimize in (False, True):
        for expected, actual in zip(fused, run(model, feeds, optimize=optimize), strict=True):
            np.testing.assert_array_equal(actual, expected)
    before = certify(Model.from_proto(proto), proto.SerializeToString()).executed
    assert certify(model, model.to_proto().SerializeToString()).executed == before
    RaiseQoperators().run(model, CTX)
    for expected, actual in zip(fused, run(model, feeds, optimize=True), strict=True):
        np.testing.assert_array_equal(actual, expected)
