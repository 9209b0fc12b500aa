"""What training would have left in a network: BatchNormalization statistics, activation ranges, fake quant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import TensorProto, helper

from qat2int8.pipelines.benchmarking.sketch import INPUT, Array, Node, Sketch

QUANTIZED_OPS = ("Conv", "Gemm")
LEVELS = 255
"""Steps of a uint8 grid."""
_LARGE = 1 << 20
"""Bytes from which on a weight is not copied."""


@dataclass(frozen=True)
class Statistics:
    """Batch moments by BatchNormalization output, largest magnitudes by tensor."""

    moments: dict[str, tuple[Array, Array]]
    amax: dict[str, float]


def images(count: int, size: int, seed: int = 1) -> npt.NDArray[np.float32]:
    """Random smooth images [count, 3, size, size] of about zero mean and unit variance, with a little noise."""
    rng = np.random.default_rng(seed)
    knots = 7
    grid = rng.standard_normal((count, 3, knots, knots))
    position = np.linspace(0, knots - 1, size)[:, None]
    hats = np.maximum(0, 1 - np.abs(position - np.arange(knots)))
    smooth = 1.5 * (hats @ grid @ hats.T) + 0.1 * rng.standard_normal((count, 3, size, size))
    return np.asarray(smooth, np.float32)


def measure(sketch: Sketch) -> Statistics:
    """Run the network once, normalising each BatchNormalization by the batch as training does."""
    probe = replace(sketch, nodes=list(_by_batch(sketch)), channels=dict(sketch.channels))
    normed = [node.output for node in sketch.nodes if node.op == "BatchNormalization"]
    ranged = list(dict.fromkeys(node.inputs[0] for node in sketch.nodes if node.op in QUANTIZED_OPS))
    for tensor in ranged:
        probe.nodes.append(Node("Abs", [tensor], f"{tensor}.abs"))
        probe.nodes.append(Node("ReduceMax", [f"{tensor}.abs"], f"{tensor}.amax", {"keepdims": 0}))
    names = [f"{x}.{part}" for x in normed for part in ("mean", "var")] + [f"{x}.amax" for x in ranged]
    feeds = {INPUT: images(enough_images(sketch.size), sketch.size)}
    found = observe(probe, names, feeds, optimized=False)
    moments = {x: (found[f"{x}.mean"].ravel(), found[f"{x}.var"].ravel()) for x in normed}
    return Statistics(moments, {x: float(found[f"{x}.amax"]) for x in ranged})


def enough_images(size: int) -> int:
    """Four of 224x224; more when small, since deep in the network each leaves but a few pixels per channel."""
    return min(256, 4 * 224**2 // size**2)


def settle(sketch: Sketch, statistics: Statistics) -> Sketch:
    """The network with its BatchNormalization statistics filled in."""
    weights = dict(sketch.weights)
    for node in sketch.nodes:
        if node.op == "BatchNormalization":
            mean, variance = statistics.moments[node.output]
            weights[node.inputs[3]], weights[node.inputs[4]] = mean, variance
    return replace(sketch, weights=weights)


def fold_batch_norm(sketch: Sketch) -> Sketch:
    """Every BatchNormalization folded into the Conv before it, which takes over its output's name."""
    makers = {node.output: node for node in sketch.nodes}
    weights, folded = dict(sketch.weights), {}
    for node in sketch.nodes:
        if node.op != "BatchNormalization":
            continue
        conv = makers[node.inputs[0]]
        gamma, beta, mean, variance = (weights.pop(name) for name in node.inputs[1:])
        factor = gamma / np.sqrt(variance + np.float32(node.attributes["epsilon"]))
        kernel, bias = conv.inputs[1], conv.inputs[1].replace(".weight", ".bias")
        weights[kernel] = weights[kernel] * factor[:, None, None, None]
        weights[bias] = beta - mean * factor
        folded[conv.output] = replace(conv, inputs=[*conv.inputs[:2], bias], output=node.output)
    nodes = [folded.get(node.output, node) for node in sketch.nodes if node.op != "BatchNormalization"]
    return replace(sketch, nodes=nodes, weights=weights)


def fake_quantize(sketch: Sketch, statistics: Statistics, *, shared_quantizers: bool) -> Sketch:
    """Symmetric int8 Q/DQ pairs on the inputs of Conv and Gemm and per channel on their float weights.

    The placement of TensorRT's quantization toolkits: nothing on outputs, on the operands of Add or on biases.
    Each consumer has a quantizer of its own unless ``shared_quantizers``.
    """
    twin = replace(sketch, nodes=[], weights=dict(sketch.weights))
    seen: dict[str, str] = {}
    for node in sketch.nodes:
        if node.op not in QUANTIZED_OPS:
            twin.nodes.append(node)
            continue
        x, kernel, *bias = node.inputs
        if x not in seen or not shared_quantizers:
            seen[x] = pair(twin, x, f"{node.output}.input", np.float32(statistics.amax[x] / 127))
        weight = pair(twin, kernel, kernel, weight_steps(sketch.weights[kernel]))
        twin.nodes.append(replace(node, inputs=[seen[x], weight, *bias]))
    return twin


def weight_steps(weight: Array) -> Array:
    """The step per channel of axis 0 that lets int8 levels from -127 to 127 hold ``weight``."""
    amax = np.abs(weight).max(axis=tuple(range(1, weight.ndim)))
    return np.asarray(np.maximum(amax, np.finfo(np.float32).tiny) / np.float32(127))


def pair(sketch: Sketch, source: str, label: str, scale: Array | np.float32) -> str:
    """Append a Q/DQ pair on ``source``, symmetric int8, per channel of axis 0 where ``scale`` is a vector."""
    scale = np.asarray(scale, np.float32)
    sketch.weights[f"{label}.scale"] = scale
    sketch.weights[f"{label}.zero_point"] = np.zeros(scale.shape, np.int8)
    axis = {"axis": 0} if scale.ndim else {}
    grid = [f"{label}.scale", f"{label}.zero_point"]
    sketch.nodes.append(Node("QuantizeLinear", [source, *grid], f"{label}.q", axis))
    sketch.nodes.append(Node("DequantizeLinear", [f"{label}.q", *grid], f"{label}.dq", axis))
    return f"{label}.dq"


def byte_grid(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """The uint8 grid of a range, as TensorFlow and PyTorch nudge it: 0.0 lies on a level."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high - low, 1e-6) / LEVELS
    return np.float32(scale), np.uint8(np.clip(round(-low / scale), 0, LEVELS))


def spans(sketch: Sketch, tensors: Sequence[str], feeds: Mapping[str, Array]) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of ``tensors`` on ``feeds``, arrays by input name."""
    probe = replace(sketch, nodes=list(sketch.nodes))
    for tensor in tensors:
        for op in ("ReduceMin", "ReduceMax"):
            probe.nodes.append(Node(op, [tensor], f"{tensor}.{op}", {"keepdims": 0}))
    names = [f"{tensor}.{op}" for tensor in tensors for op in ("ReduceMin", "ReduceMax")]
    found = iter(observe(probe, names, feeds).values())
    return {tensor: (float(next(found)), float(next(found))) for tensor in tensors}


def observe(
    sketch: Sketch, tensors: Sequence[str], feeds: Mapping[str, Array], *, optimized: bool = True
) -> dict[str, Array]:
    """The values of ``tensors``, which no node needs to read, on ``feeds``.

    Large weights are fed too, so that nobody copies them: into a model, into bytes, into a session.
    """
    large = {name: array for name, array in sketch.weights.items() if array.nbytes >= _LARGE}
    model = sketch.to_model(large)
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in tensors)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(tensors, session.run(tensors, {**feeds, **large}), strict=True))


def _by_batch(sketch: Sketch) -> Iterator[Node]:
    """The nodes of ``sketch`` with each BatchNormalization spelled out over the moments of the batch."""
    for node in sketch.nodes:
        if node.op != "BatchNormalization":
            yield node
            continue
        x, y = node.inputs[0], node.output
        gamma, beta = (f"{y}.{part}" for part in ("gamma", "beta"))
        over_batch = {"axes": [0, 2, 3], "keepdims": 1}
        yield Node("ReduceMean", [x], f"{y}.mean", over_batch)
        yield Node("Sub", [x, f"{y}.mean"], f"{y}.centred")
        yield Node("Mul", [f"{y}.centred", f"{y}.centred"], f"{y}.square")
        yield Node("ReduceMean", [f"{y}.square"], f"{y}.var", over_batch)
        yield Node("Sqrt", [f"{y}.var"], f"{y}.std")
        yield Node("Div", [f"{y}.centred", f"{y}.std"], f"{y}.normal")
        for source, column in zip(node.inputs[1:3], (gamma, beta), strict=True):
            value = helper.make_tensor("", TensorProto.INT64, [3], [-1, 1, 1])
            yield Node("Constant", [], f"{column}.shape", {"value": value})
            yield Node("Reshape", [source, f"{column}.shape"], column)
        yield Node("Mul", [f"{y}.normal", gamma], f"{y}.scaled")
        yield Node("Add", [f"{y}.scaled", beta], y)
