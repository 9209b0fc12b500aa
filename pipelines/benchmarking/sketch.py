"""A network while it is being written down: nodes by tensor name, weights as arrays."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]

OPSET = 17
IR_VERSION = 8
INPUT, OUTPUT = "image", "logits"


@dataclass
class Node:
    """One operator with a single output."""

    op: str
    inputs: list[str]
    output: str
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Sketch:
    """A float network with random weights, scaled so that the variance of its activations stays near one.

    ``size`` is the side of the square three-channel input; ``channels`` knows the channel count of each tensor.
    ``channels_last``: the input is [N, size, size, 3].
    """

    name: str
    size: int
    seed: int
    nodes: list[Node] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)
    channels: dict[str, int] = field(default_factory=lambda: {INPUT: 3})
    channels_last: bool = False

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def op(self, op: str, *inputs: str, channels: int | None = None, output: str = "", **attributes: Any) -> str:
        """Append an operator, return its output; channels are those of the first input unless given."""
        output = output or f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(Node(op, list(inputs), output, attributes))
        self.channels[output] = self.channels[inputs[0]] if channels is None else channels
        return output

    def conv(
        self,
        x: str,
        filters: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        group: int = 1,
        gamma: float | None = 1.0,
    ) -> str:
        """Padded convolution with BatchNormalization after it, or with a bias if ``gamma`` is None."""
        label, pad = f"conv_{len(self.nodes)}", kernel // 2
        fan_in = self.channels[x] // group * kernel * kernel
        shape = (filters, self.channels[x] // group, kernel, kernel)
        inputs = [x, self.weight(f"{label}.weight", shape, (2 / fan_in) ** 0.5)]
        if gamma is None:
            inputs.append(self.weight(f"{label}.bias", (filters,), 0.1))
        y = self.op(
            "Conv",
            *inputs,
            channels=filters,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[pad] * 4,
            group=group,
        )
        return y if gamma is None else self.batch_norm(y, gamma)

    def batch_norm(self, x: str, gamma: float) -> str:
        """BatchNormalization with gammas around the given one, one in twenty negative, and no statistics yet."""
        label, channels = f"bn_{len(self.nodes)}", self.channels[x]
        sign = np.where(self.rng.random(channels) < 0.05, -1, 1)
        self.weights[f"{label}.weight"] = (gamma * sign * self.rng.normal(1, 0.2, channels)).astype(np.float32)
        self.weight(f"{label}.bias", (channels,), 0.2)
        self.weights[f"{label}.running_mean"] = np.zeros(channels, np.float32)
        self.weights[f"{label}.running_var"] = np.ones(channels, np.float32)
        parts = (f"{label}.{part}" for part in ("weight", "bias", "running_mean", "running_var"))
        return self.op("BatchNormalization", x, *parts, epsilon=1e-5)

    def linear(self, x: str, features: int, *, output: str = "") -> str:
        """Gemm as a framework's Linear layer exports it: weight [out, in], transB."""
        label, inputs = f"fc_{len(self.nodes)}", self.channels[x]
        weight = self.weight(f"{label}.weight", (features, inputs), (1 / inputs) ** 0.5)
        bias = self.weight(f"{label}.bias", (features,), 0.1)
        return self.op("Gemm", x, weight, bias, channels=features, output=output, transB=1)

    def max_pool(self, x: str, kernel: int, stride: int) -> str:
        return self._pool("MaxPool", x, kernel, stride)

    def average_pool(self, x: str, kernel: int, stride: int) -> str:
        return self._pool("AveragePool", x, kernel, stride)

    def concat(self, *inputs: str) -> str:
        """Concatenation of channels."""
        return self.op("Concat", *inputs, channels=sum(self.channels[x] for x in inputs), axis=1)

    def flat_mean(self, x: str) -> str:
        """GlobalAveragePool and Flatten: [N, C]."""
        return self.op("Flatten", self.op("GlobalAveragePool", x), axis=1)

    def constant(self, name: str, value: float) -> str:
        """A float32 scalar."""
        self.weights[name] = np.array(value, np.float32)
        return name

    def weight(self, name: str, shape: tuple[int, ...], std: float) -> str:
        """A normally distributed float32 weight."""
        self.weights[name] = self.rng.standard_normal(shape, np.float32) * np.float32(std)
        return name

    def _pool(self, op: str, x: str, kernel: int, stride: int) -> str:
        return self.op(op, x, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[(kernel - 1) // 2] * 4)

    def to_model(self, fed: Collection[str] = ()) -> onnx.ModelProto:
        """The network as ONNX, from ``image`` [N, 3, size, size] to ``logits`` [N, classes].

        The weights called ``fed`` become inputs: a session need not be handed them inside of the model.
        """
        side: list[str | int | None] = [self.size, self.size]
        shape = ["N", *side, 3] if self.channels_last else ["N", 3, *side]
        inputs = [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, shape)]
        outputs = [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["N", self.channels[OUTPUT]])]
        return self.written(inputs, outputs, fed, opset=OPSET, ir_version=IR_VERSION)

    def written(
        self,
        inputs: list[onnx.ValueInfoProto],
        outputs: list[onnx.ValueInfoProto],
        fed: Collection[str],
        *,
        opset: int,
        ir_version: int,
    ) -> onnx.ModelProto:
        """The nodes and the weights between ``inputs`` and ``outputs``."""
        nodes = [
            helper.make_node(node.op, node.inputs, [node.output], name=f"{node.op}_{index}", **node.attributes)
            for index, node in enumerate(self.nodes)
        ]
        weights = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in self.weights.items()
            if name in fed
        ]
        graph = helper.make_graph(nodes, self.name, [*inputs, *weights], outputs)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
        for name, array in self.weights.items():
            if name not in fed:
                _store(model.graph, name, array)
        return model


def _store(graph: onnx.GraphProto, name: str, array: Array) -> None:
    """Add an initializer in place: what is handed to protobuf as a message is copied, and these are large."""
    tensor = graph.initializer.add()
    tensor.name, tensor.data_type = name, helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor.dims.extend(array.shape)
    tensor.raw_data = numpy_helper.tobytes_little_endian(array)
