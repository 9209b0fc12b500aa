"""Quantization-aware training as TensorFlow Lite stores it and tf2onnx exports it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from qat2int8.pipelines.benchmarking.fake_quant import LEVELS, byte_grid, images, spans
from qat2int8.pipelines.benchmarking.sketch import INPUT, Array, Node, Sketch

PLANES = f"{INPUT}.planes"
"""The image after the Transpose that tf2onnx puts in front of a network."""


def channels_last(sketch: Sketch) -> Sketch:
    """The network on images [N, size, size, 3]."""
    transpose = Node("Transpose", [INPUT], PLANES, {"perm": [0, 3, 1, 2]})
    nodes = [replace(node, inputs=[PLANES if x == INPUT else x for x in node.inputs]) for node in sketch.nodes]
    channels = {**sketch.channels, PLANES: sketch.channels[INPUT]}
    return replace(sketch, nodes=[transpose, *nodes], channels=channels, channels_last=True)


def quantize_as_tflite(sketch: Sketch) -> Sketch:
    """A network with folded BatchNormalization, each tensor of it on a uint8 grid of its own.

    Weights are uint8 with one step and one zero point for the whole tensor, biases int32 on the step of the
    accumulator. Every Clip is left out: the grid of the layer before it ends where it clamps.
    """
    return _Quantizer(sketch, _ranges(sketch)).run()


@dataclass
class _Quantizer:
    sketch: Sketch
    ranges: Mapping[str, tuple[float, float]]
    steps: dict[str, np.float32] = field(default_factory=dict)
    """The step of each tensor that has a grid."""
    names: dict[str, str] = field(default_factory=dict)
    """What the readers of a tensor of the float network read."""

    def __post_init__(self) -> None:
        self.twin = replace(self.sketch, nodes=[], weights={})

    def run(self) -> Sketch:
        clamped = {node.inputs[0]: node.output for node in self.sketch.nodes if node.op == "Clip"}
        for node in self.sketch.nodes:
            if node.op == "Clip":
                self.names[node.output], self.steps[node.output] = (
                    self.names[node.inputs[0]],
                    self.steps[node.inputs[0]],
                )
                continue
            self._put(node, self.ranges[clamped.get(node.output, node.output)])
        return self.twin

    def _put(self, node: Node, span: tuple[float, float]) -> None:
        inputs = [self.names.get(x, x) for x in node.inputs]
        if node.op in ("Conv", "Gemm"):
            x, kernel, bias = node.inputs
            weight, summands = self.sketch.weights[kernel], self.sketch.weights[bias]
            scale, zero = byte_grid(float(weight.min()), float(weight.max()))
            inputs[1] = self._stored(kernel, _levels(weight, scale, zero), scale, zero)
            step = np.float32(self.steps[x] * scale)
            inputs[2] = self._stored(bias, np.rint(summands / step).astype(np.int32), step, np.int32(0))
        is_last = node is self.sketch.nodes[-1]
        output = node.output if is_last else f"{node.output}.float"
        self.twin.nodes.append(replace(node, inputs=inputs, output=output))
        if not is_last:
            self.names[node.output] = self._onbyte_grid(output, node.output, *byte_grid(*span))

    def _onbyte_grid(self, source: str, label: str, scale: np.float32, zero: np.uint8) -> str:
        self.steps[label] = scale
        grid = self._parameters(label, scale, zero)
        self.twin.nodes.append(Node("QuantizeLinear", [source, *grid], f"{label}.q"))
        self.twin.nodes.append(Node("DequantizeLinear", [f"{label}.q", *grid], f"{label}.dq"))
        return f"{label}.dq"

    def _stored(self, label: str, levels: Array, scale: np.float32, zero: np.generic) -> str:
        self.twin.weights[f"{label}.levels"] = levels
        grid = self._parameters(label, scale, zero)
        self.twin.nodes.append(Node("DequantizeLinear", [f"{label}.levels", *grid], f"{label}.dq"))
        return f"{label}.dq"

    def _parameters(self, label: str, scale: np.float32, zero: np.generic) -> list[str]:
        self.twin.weights[f"{label}.scale"] = np.asarray(scale, np.float32)
        self.twin.weights[f"{label}.zero_point"] = np.asarray(zero)
        return [f"{label}.scale", f"{label}.zero_point"]


def off_centre_share(sketch: Sketch) -> float:
    """Percent of the output channels of a network by :func:`quantize_as_tflite` whose levels leave +-127."""
    outside = channels = 0
    for name, levels in sketch.weights.items():
        if name.endswith(".levels") and levels.dtype == np.uint8:
            centred = levels.astype(np.int32) - sketch.weights[name.replace(".levels", ".zero_point")]
            reach = np.abs(centred).max(axis=tuple(range(1, levels.ndim)))
            outside, channels = outside + int((reach > LEVELS // 2).sum()), channels + reach.size
    return 100.0 * outside / channels


def _levels(array: Array, scale: np.float32, zero: np.uint8) -> Array:
    levels = np.clip(np.rint(array / scale) + int(zero), 0, LEVELS)
    return np.asarray(levels, np.uint8)


def _ranges(sketch: Sketch) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of every tensor on smooth random images."""
    batch = images(4, sketch.size)
    if sketch.channels_last:
        batch = np.ascontiguousarray(batch.transpose(0, 2, 3, 1))
    return spans(sketch, [node.output for node in sketch.nodes], {INPUT: batch})
