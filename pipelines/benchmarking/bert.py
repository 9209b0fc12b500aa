"""BERT built in code, float or with fake quant as a TensorRT-style QAT export of a PyTorch model has it.

Weights are random (seeded), activation ranges are measured on random tokens. A Linear of PyTorch is a MatMul and
an Add whose first operand is the bias; with fake quant its weight lies [out, in] behind a Transpose.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from qat2int8.pipelines.benchmarking.every_tensor import append, origin
from qat2int8.pipelines.benchmarking.fake_quant import observe, pair, spans, weight_steps
from qat2int8.pipelines.benchmarking.sketch import OUTPUT, Node, Sketch

TOKENS = "token_ids"


@dataclass(frozen=True)
class Size:
    """The dimensions of an encoder; the defaults are BERT-base (Devlin et al. 2018) on 128 tokens."""

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    inner: int = 3072
    sequence: int = 128
    vocabulary: int = 30522
    classes: int = 2


BASE = Size()
SMALL = Size(layers=2, hidden=32, heads=2, inner=64, sequence=8, vocabulary=50)


def tokens(count: int, size: Size = BASE, seed: int = 1) -> npt.NDArray[np.int64]:
    """Random token ids [count, sequence]."""
    return np.random.default_rng(seed).integers(0, size.vocabulary, (count, size.sequence), np.int64)


@dataclass
class _Encoder(Sketch):
    """A sketch from token ids [N, sequence] to logits [N, classes].

    ``opset`` 20 has LayerNormalization and Gelu; ``decomposed`` spells both in primitives as older exporters do.
    """

    dims: Size = BASE
    decomposed: bool = False
    batch: int | str = 1

    EPSILON: ClassVar[float] = 1e-12

    def encode(self) -> None:
        """Write the whole network down."""
        self.channels[TOKENS] = 1
        x = self.embed()
        for _ in range(self.dims.layers):
            x = self.layer_norm(self.op("Add", self.attention(x), x))
            y = self.dense(self.gelu(self.dense(x, self.dims.inner)), self.dims.hidden, 0.5)
            x = self.layer_norm(self.op("Add", y, x))
        self.weights["first"] = np.array(0, np.int64)
        first = self.op("Gather", x, "first", axis=1)
        self.linear(self.op("Tanh", self.linear(first, self.dims.hidden)), self.dims.classes, output=OUTPUT)

    def embed(self) -> str:
        hidden = self.dims.hidden
        table = self.weight("embedding.tokens", (self.dims.vocabulary, hidden), 1.0)
        x = self.op("Gather", table, TOKENS, channels=hidden)
        place = self.weight("embedding.positions", (1, self.dims.sequence, hidden), 0.3)
        return self.layer_norm(self.op("Add", x, place))

    def attention(self, x: str) -> str:
        dims = self.dims
        split = self.shape("split", [0, 0, dims.heads, dims.hidden // dims.heads])
        query, key, value = (self.op("Reshape", self.dense(x, dims.hidden), split) for _ in range(3))
        query, value = (self.op("Transpose", part, perm=[0, 2, 1, 3]) for part in (query, value))
        scores = self.op("MatMul", query, self.op("Transpose", key, perm=[0, 2, 3, 1]))
        root = self.constant("root", float(np.sqrt(dims.hidden // dims.heads)))
        weights = self.op("Softmax", self.op("Div", scores, root), axis=-1)
        joined = self.op("Transpose", self.op("MatMul", weights, value), perm=[0, 2, 1, 3])
        joined = self.op("Reshape", joined, self.shape("join", [0, 0, dims.hidden]), channels=dims.hidden)
        return self.dense(joined, dims.hidden)

    def dense(self, x: str, features: int, gain: float = 1.0) -> str:
        """A Linear on tensors of rank 3."""
        label, inputs = f"dense_{len(self.nodes)}", self.channels[x]
        weight = self.weight(f"{label}.weight", (inputs, features), gain * inputs**-0.5)
        bias = self.weight(f"{label}.bias", (features,), 0.1)
        product = self.op("MatMul", x, weight, channels=features)
        return self.op("Add", bias, product, channels=features)

    def layer_norm(self, x: str) -> str:
        label, channels = f"norm_{len(self.nodes)}", self.channels[x]
        self.weights[f"{label}.weight"] = self.rng.normal(1, 0.1, channels).astype(np.float32)
        gamma, beta = f"{label}.weight", self.weight(f"{label}.bias", (channels,), 0.1)
        if not self.decomposed:
            return self.op("LayerNormalization", x, gamma, beta, axis=-1, epsilon=self.EPSILON)
        centred = self.op("Sub", x, self.op("ReduceMean", x, axes=[-1], keepdims=1))
        square = self.op("Pow", centred, self.constant("two", 2.0))
        variance = self.op("ReduceMean", square, axes=[-1], keepdims=1)
        deviation = self.op("Sqrt", self.op("Add", variance, self.constant("epsilon", self.EPSILON)))
        return self.op("Add", self.op("Mul", self.op("Div", centred, deviation), gamma), beta)

    def gelu(self, x: str) -> str:
        if not self.decomposed:
            return self.op("Gelu", x)
        erf = self.op("Erf", self.op("Div", x, self.constant("root_two", float(np.sqrt(2)))))
        half = self.constant("half", 0.5)
        return self.op("Mul", self.op("Mul", x, self.op("Add", erf, self.constant("one", 1.0))), half)

    def shape(self, name: str, dims: list[int]) -> str:
        self.weights[name] = np.array(dims, np.int64)
        return name

    def to_model(self, fed: Collection[str] = ()) -> onnx.ModelProto:
        """The network as ONNX."""
        inputs = [helper.make_tensor_value_info(TOKENS, TensorProto.INT64, [self.batch, self.dims.sequence])]
        outputs = [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [self.batch, self.dims.classes])]
        opset, ir_version = (17, 8) if self.decomposed else (20, 9)
        return self.written(inputs, outputs, fed, opset=opset, ir_version=ir_version)


def bert(
    size: Size = BASE,
    *,
    fake_quant: bool = True,
    decomposed: bool = True,
    dynamic: bool = False,
    products: bool = False,
    every_tensor: bool = False,
    seed: int = 0,
) -> onnx.ModelProto:
    """An encoder with a classifier on the first token.

    Args:
        fake_quant: symmetric int8 Q/DQ on the inputs and weights of every linear layer, nothing else.
        decomposed: LayerNormalization and Gelu in primitives, opset 17; else as ops, opset 20.
        dynamic: a symbolic batch dimension instead of 1.
        products: fake quant on both operands of the two products of each attention as well.
        every_tensor: instead, uint8 fake quant behind linear layers, products and what they read.
    """
    net = drawn(size, decomposed=decomposed, dynamic=dynamic, seed=seed)
    return net.write(fake_quant=fake_quant, products=products, every_tensor=every_tensor)


def drawn(size: Size = BASE, *, decomposed: bool = True, dynamic: bool = False, seed: int = 0) -> Drawn:
    """The encoder of :func:`bert`, to be written in several forms."""
    net = _Encoder("bert", 0, seed, dims=size, decomposed=decomposed, batch="N" if dynamic else 1)
    net.encode()
    return Drawn(net)


@dataclass(frozen=True)
class Drawn:
    """An encoder with weights, not written yet."""

    net: _Encoder

    def write(
        self, *, fake_quant: bool = True, products: bool = False, every_tensor: bool = False
    ) -> onnx.ModelProto:
        """The encoder in one form, as :func:`bert` says."""
        if not fake_quant:
            return self.net.to_model()
        if every_tensor:
            return _quantize_every_tensor(self.net).to_model()
        return _fake_quantize(self.net, products=products).to_model()


def _fake_quantize(net: _Encoder, *, products: bool) -> _Encoder:
    """Q/DQ around the layers with constant weights; a MatMul's weight is stored [out, in]."""
    compute = [node for node in net.nodes if node.op in ("MatMul", "Gemm")]
    layers = [node for node in compute if products or node.inputs[1] in net.weights]
    operands = dict.fromkeys(x for node in layers for x in node.inputs[:2] if x not in net.weights)
    largest = _largest(net, list(operands))
    twin = replace(net, nodes=[], weights=dict(net.weights))
    for node in net.nodes:
        if node not in layers:
            twin.nodes.append(node)
            continue
        x, kernel, *bias = node.inputs
        source = pair(twin, x, f"{node.output}.input", np.float32(largest[x] / 127))
        if kernel not in net.weights:
            other = pair(twin, kernel, f"{node.output}.other", np.float32(largest[kernel] / 127))
            twin.nodes.append(replace(node, inputs=[source, other]))
            continue
        weight = _weight(twin, net, node)
        twin.nodes.append(replace(node, inputs=[source, weight, *bias]))
    return twin


_MOVERS = ("Reshape", "Transpose", "Gather")


def _quantize_every_tensor(net: _Encoder) -> _Encoder:
    """Observers sit on modules, as in PyTorch: none inside of LayerNormalization or Gelu."""
    # Without the embedding, a Gather that rearranges nothing: it reads weights.
    makers = {node.output: node for node in net.nodes if node.inputs[0] not in net.weights}
    compute = [node for node in net.nodes if node.op in ("MatMul", "Gemm")]
    products = [node.output for node in compute if node.inputs[1] not in net.weights]
    biased = [node.output for node in net.nodes if node.op == "Add" and node.inputs[0].startswith("dense_")]
    read = [x for node in compute for x in node.inputs[:2] if x not in net.weights]
    sources = [origin(makers, x, _MOVERS) for x in read]
    observed = list(dict.fromkeys([*sources, *products, *biased]))
    found = spans(replace(net, batch="N"), observed, {TOKENS: tokens(2, net.dims)})
    twin = replace(net, nodes=[], weights=dict(net.weights))
    names: dict[str, str] = {}
    for node in net.nodes:
        inputs = [names.get(x, x) for x in node.inputs]
        if node in compute and node.inputs[1] in net.weights:
            inputs[1] = _weight(twin, net, node)
        append(twin, replace(node, inputs=inputs), found, names)
    return twin


def _weight(twin: _Encoder, net: _Encoder, node: Node) -> str:
    """Append a pair on the weight of ``node``, and the Transpose behind it where it is a MatMul's."""
    kernel = node.inputs[1]
    if node.op != "MatMul":
        return pair(twin, kernel, kernel, weight_steps(twin.weights[kernel]))
    twin.weights[kernel] = np.ascontiguousarray(net.weights[kernel].T)
    weight = pair(twin, kernel, kernel, weight_steps(twin.weights[kernel]))
    twin.nodes.append(Node("Transpose", [weight], f"{kernel}.turned", {"perm": [1, 0]}))
    return f"{kernel}.turned"


def _largest(net: _Encoder, tensors: list[str]) -> dict[str, float]:
    """The largest magnitude of each tensor on a few random sequences."""
    found = observe(replace(net, batch="N"), tensors, {TOKENS: tokens(2, net.dims)})
    return {name: float(np.abs(array).max()) for name, array in found.items()}
