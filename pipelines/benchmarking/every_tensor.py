"""Quantization-aware training that observes what layers put out too, as PyTorch's FX mode and its kin do it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np

from qat2int8.pipelines.benchmarking.fake_quant import (
    QUANTIZED_OPS,
    byte_grid,
    enough_images,
    images,
    pair,
    spans,
    weight_steps,
)
from qat2int8.pipelines.benchmarking.sketch import INPUT, Node, Sketch

_SAME_GRID = ("MaxPool", "Flatten")
"""Their outputs lie on the grid of what they read."""
_ACTIVATIONS = ("Relu", "Clip")
"""Observed together with the layer before them."""


def quantize_every_tensor(sketch: Sketch) -> Sketch:
    """A network with folded BatchNormalization, with uint8 Q/DQ pairs behind the image and behind every operator.

    A layer and its activation are one; the logits stay float. Weights have symmetric int8 pairs per channel.
    """
    readers: dict[str, list[Node]] = {}
    for node in sketch.nodes:
        for x in node.inputs:
            readers.setdefault(x, []).append(node)
    observed = [INPUT]
    for node in sketch.nodes[:-1]:
        fused = len(readers[node.output]) == 1 and readers[node.output][0].op in _ACTIVATIONS
        if node.op not in _SAME_GRID and not fused:
            observed.append(node.output)
    found = spans(sketch, observed, {INPUT: images(enough_images(sketch.size), sketch.size)})
    twin = replace(sketch, nodes=[], weights=dict(sketch.weights))
    names = {INPUT: byte_pair(twin, INPUT, found[INPUT])}
    for node in sketch.nodes:
        inputs = [names.get(x, x) for x in node.inputs]
        if node.op in QUANTIZED_OPS:
            inputs[1] = pair(twin, inputs[1], inputs[1], weight_steps(sketch.weights[inputs[1]]))
        append(twin, replace(node, inputs=inputs), found, names)
    return twin


def byte_pair(sketch: Sketch, source: str, span: tuple[float, float]) -> str:
    """Append a Q/DQ pair on ``source``, uint8 for the whole tensor; returns its output."""
    scale, zero = byte_grid(*span)
    sketch.weights[f"{source}.scale"] = np.asarray(scale, np.float32)
    sketch.weights[f"{source}.zero_point"] = np.asarray(zero)
    grid = [f"{source}.scale", f"{source}.zero_point"]
    sketch.nodes.append(Node("QuantizeLinear", [source, *grid], f"{source}.q"))
    sketch.nodes.append(Node("DequantizeLinear", [f"{source}.q", *grid], f"{source}.dq"))
    return f"{source}.dq"


def append(sketch: Sketch, node: Node, found: Mapping[str, tuple[float, float]], names: dict[str, str]) -> None:
    """Append ``node``, and a pair behind it if its output is in ``found``; ``names`` leads readers to the pair."""
    sketch.nodes.append(node)
    if node.output in found:
        names[node.output] = byte_pair(sketch, node.output, found[node.output])


def origin(node_of: Mapping[str, Node], tensor: str, movers: Collection[str]) -> str:
    """The tensor that ``tensor`` is a rearrangement of by operators of the kinds ``movers``."""
    while tensor in node_of and node_of[tensor].op in movers:
        tensor = node_of[tensor].inputs[0]
    return tensor
