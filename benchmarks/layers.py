"""What rewrites of single layers for the runtime's kernels give: stems, and channels that are no multiple of 16.

Times are minima of interleaved rounds; only ratios within this run mean something.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import report
from onnx import TensorProto, helper, numpy_helper

from qat2int8.ir import Model
from qat2int8.passes import Context, Pass
from qat2int8.passes.fold_stem_width import FoldStemWidth
from qat2int8.passes.pad_channels import PadChannels
from qat2int8.passes.stem_space_to_depth import StemSpaceToDepth
from qat2int8.pipelines.benchmarking.stopwatch import caller, interleave
from qat2int8.pipelines.target_files import load_target


class Layers:
    """Convolutions of integers in a row, on images of bytes."""

    def __init__(self, shape: Sequence[int], *, channels_last: bool) -> None:
        self.shape, self.rng, self.last = list(shape), np.random.default_rng(0), "image"
        self.nodes: list[onnx.NodeProto] = []
        self.constants = [
            numpy_helper.from_array(np.asarray(0.02, np.float32), "s"),
            numpy_helper.from_array(np.asarray(0, np.uint8), "z"),
        ]
        if channels_last:
            self._node("Transpose", ["image"], "planes", perm=[0, 3, 1, 2])

    def conv(self, weight: tuple[int, ...], zero_point: int = 0, **attributes: Any) -> None:
        """One more; ``weight`` is its shape."""
        label = f"l{len(self.nodes)}"
        levels = self.rng.integers(-100, 100, weight).astype(np.int8)
        grid: dict[str, Any] = {
            "w": levels,
            "ws": np.full(weight[0], 0.01, np.float32),
            "wz": np.full(weight[0], zero_point, np.int8),
        }
        self.constants += [numpy_helper.from_array(array, f"{label}_{name}") for name, array in grid.items()]
        source = self.last
        self._node("DequantizeLinear", [f"{label}_{name}" for name in grid], f"{label}_weight", axis=0)
        self._node("DequantizeLinear", [source, "s", "z"], f"{label}_x")
        self._node("Conv", [f"{label}_x", f"{label}_weight"], f"{label}_y", **attributes)
        self._node("QuantizeLinear", [f"{label}_y", "s", "z"], f"{label}_q")

    def model(self) -> onnx.ModelProto:
        """The row as a model."""
        image = helper.make_tensor_value_info("image", TensorProto.UINT8, self.shape)
        output = helper.make_tensor_value_info(self.last, TensorProto.UINT8, ["n", "c", "h", "w"])
        graph = helper.make_graph(self.nodes, "layers", [image], [output], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        return onnx.shape_inference.infer_shapes(model)

    def _node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        self.last = output


def stem(size: int, outputs: int, zero_point: int) -> Layers:
    """A first layer of stride 2, and one that reads little of it."""
    layers = Layers([1, size, size, 3], channels_last=True)
    layers.conv((outputs, 3, 3, 3), zero_point, strides=[2, 2], pads=[0, 0, 1, 1])
    layers.conv((16, outputs, 1, 1), strides=[8, 8])
    return layers


def bottleneck(size: int, narrow: int, wide: int, zero_point: int) -> Layers:
    """Dense, depthwise, dense."""
    layers = Layers([1, narrow, size, size], channels_last=False)
    layers.conv((wide, narrow, 1, 1))
    layers.conv((wide, 1, 3, 3), zero_point, group=wide, pads=[1, 1, 1, 1])
    layers.conv((narrow, wide, 1, 1))
    return layers


def microseconds(layers: Layers, rewrites: Sequence[Pass | None], rounds: int) -> list[float]:
    """Of the layers after each of ``rewrites``."""
    sample = layers.rng.integers(0, 256, layers.shape).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        contenders = {}
        for index, rewrite in enumerate(rewrites):
            model = Model.from_proto(layers.model())
            if rewrite is not None:
                rewrite.run(model, Context(load_target("ort-x86")))
            path = Path(folder) / f"{index}.onnx"
            onnx.save(model.to_proto(), path)
            contenders[str(index)] = caller(path, sample)
        runs = interleave(contenders, rounds=rounds, repeat=3)
    return [1e6 * min(seconds) for seconds in runs.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    stems = [
        None,
        StemSpaceToDepth(fewest_outputs=1),
        FoldStemWidth(most_channels=0),
        FoldStemWidth(most_channels=999),
    ]
    rows = [
        [
            f"{size}, {outputs}, {zero}",
            *(f"{time:.0f}" for time in microseconds(stem(size, outputs, zero), stems, rounds)),
        ]
        for size, outputs in ((128, 8), (128, 16), (224, 16), (224, 32))
        for zero in (0, 5)
    ]
    head = ["stem: size, outputs, zero point", "plain us", "SpaceToDepth us", "two outputs us", "four outputs us"]
    print(report.table(head, rows), "\n")
    sizes = ((64, 12, 12, 0), (56, 16, 40, 0), (56, 24, 72, 0), (28, 32, 100, 0), (14, 80, 200, 0), (7, 80, 24, 0))
    rows = [
        [str(size), *(f"{time:.0f}" for time in microseconds(bottleneck(*size), [None, PadChannels()], rounds))]
        for size in sizes
    ]
    print(report.table(["size, narrow, wide, zero point", "plain us", "padded us"], rows), "\n")
    print(report.circumstances("onnxruntime", "onnx", "qat2int8"))


if __name__ == "__main__":
    main()
