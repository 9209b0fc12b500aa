"""Give an activation with one step per channel one step, and its ratio to the layers on either side."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from qat2int8.ir import Fact, Model, TrainedTensor
from qat2int8.ir.quant import FloatArray
from qat2int8.passes.base import Context, Pass, PassResult
from qat2int8.passes.clamp import RELU, Clamp, read_clamp, write_clamp
from qat2int8.passes.fake_quant import (
    FakeQuant,
    Refusal,
    drop_unused_initializers,
    fake_quants,
    recognise,
    remove,
)
from qat2int8.passes.qdq_writer import QdqWriter
from qat2int8.passes.registry import register
from qat2int8.passes.sole_consumer import sole_consumer


@register
@dataclass(frozen=True)
class FoldChannelSteps(Pass):
    """Rescale the channels of an activation that was trained with a step of its own for each of them.

    No integer kernel takes such a tensor. Where nothing but depthwise convolutions reads it, channel by channel,
    it can be multiplied by ``S / s[c]`` and each filter by ``s[c] / S``: the integers are the same, with one step
    S, the largest, for all. NNCF quantizes in this way in front of depthwise convolutions.

    The factor of the activation goes in front of its Relu or Clip, right behind a Conv, where ``fuse-conv-affine``
    finds it; a Clip must saturate no earlier than the grid, whose ends then stand in for it. The factor of a
    filter goes into the step of its grid, so that the trained integers stay. All zero points must be equal.

    What does not fit is left as it is; the pass that gathers grids says why it stays in float.
    """

    name = "fold-channel-steps"
    requires = frozenset({Fact.CONSTANTS_LIFTED})

    def run(self, model: Model, ctx: Context) -> PassResult:
        folded, freed = 0, dict[oir.Value, None]()
        for fake in list(fake_quants(model, per_channel=True)):  # folding one takes out those of weights
            if isinstance(fake, Refusal) or fake.constant or not fake.params.per_channel:
                continue
            place = _place(model, fake)
            readers = _depthwise_readers(model, fake)
            if place is None or not readers:
                continue
            freed.update(dict.fromkeys(_fold(model, fake, place, readers)))
            folded += 1
        drop_unused_initializers(model, freed)
        return PassResult({"folded": folded})


_LAYERS = ("BatchNormalization", "Conv", "ConvTranspose")
"""What a factor per channel can go into."""


@dataclass(frozen=True, eq=False)
class _Place:
    """Where the factor goes: between ``source`` and the only node that reads it, ``clamp`` where there is one."""

    source: oir.Value
    reader: oir.Node
    clamp: Clamp | None


def _place(model: Model, fake: FakeQuant) -> _Place | None:
    """None where a factor per channel cannot be brought to a layer."""
    params, value = fake.params, fake.source
    if params.axis != 1 or np.unique(params.zero_point).size > 1:
        return None
    reader, clamp = sole_consumer(model, value), None
    maker = value.producer()
    if maker is not None and (clamp := read_clamp(model, maker)) is not None:
        highest = np.rint(np.float32(clamp.span.hi) / params.scale) + params.zero_point
        if reader is None or clamp.span.lo not in (0.0, -math.inf) or np.any(highest < params.dtype.qmax):
            return None
        value, reader = clamp.source, sole_consumer(model, clamp.source)
        maker = value.producer()
    if reader is None or maker is None or maker.domain or maker.op_type not in _LAYERS:
        return None
    return _Place(value, reader, clamp)


def _depthwise_readers(model: Model, fake: FakeQuant) -> dict[oir.Node, FakeQuant | None]:
    """The convolutions that read ``fake``, with the fake quant of each weight; empty where anything else does."""
    readers: dict[oir.Node, FakeQuant | None] = {}
    channels = fake.params.scale.size
    for use in fake.output.uses():
        node = use.node
        if node.op_type != "Conv" or node.domain or node.attributes.get_int("group", 1) != channels:
            return {}
        if use.idx != 0 or node.graph is not model.graph:
            return {}
        weight = node.inputs[1]
        maker = None if weight is None else weight.producer()
        if model.constant(weight) is not None:
            readers[node] = None
            continue
        trained = None
        if maker is not None and maker.op_type == "DequantizeLinear":
            trained = recognise(model, maker, constant=True)
        if not isinstance(trained, FakeQuant) or model.constant(trained.source) is None:
            return {}
        readers[node] = trained
    return {} if fake.output.is_graph_output() else readers


def _fold(
    model: Model, fake: FakeQuant, place: _Place, readers: dict[oir.Node, FakeQuant | None]
) -> list[oir.Value]:
    """Returns what nobody may read any more."""
    params, writer = fake.params, QdqWriter(model)
    step = params.scale.max()
    ratio = (params.scale / step).astype(np.float32)
    factor = model.add_initializer(f"{place.source.name}_ratio", (1 / ratio).reshape(1, -1, 1, 1))
    multiply = oir.node("Mul", [place.source, factor], name=model.unique_name(f"{place.source.name}_rescaled"))
    model.insert_before(place.reader, multiply)
    rescaled = multiply.outputs[0]
    rescaled.name, rescaled.type, rescaled.shape = multiply.name, place.source.type, place.source.shape
    place.reader.replace_input_with(0, rescaled)
    source = fake.source if place.clamp is not None else rescaled
    if place.clamp is not None and place.clamp.span.lo == 0.0:
        write_clamp(model, place.clamp, rescaled, RELU, None)
    elif place.clamp is not None:
        source = rescaled
    freed = []
    for node, trained in readers.items():
        weight = node.inputs[1]
        assert weight is not None
        node.replace_input_with(1, _rescaled_weight(model, writer, node, weight, trained, ratio))
        freed += [weight, *([] if trained is None else _taken_out(model, trained))]
    grid = params.with_(scale=np.asarray(step), zero_point=params.zero_point[:1].reshape(()), axis=None)
    result = writer.quantizer(source, grid, lambda node, index: False)
    # The levels are those of the source's tensor, whose steps differ.
    model.scales.trace(source, TrainedTensor.of(fake.source, fake.nodes[:-1], params))
    return [*freed, *remove(model, fake, result)]


def _taken_out(model: Model, trained: FakeQuant) -> list[oir.Value]:
    """Remove the nodes of a fake quant that nobody reads any more; returns what they read."""
    parameters = [trained.source]
    for made in reversed(trained.nodes):
        if made.outputs[0].uses():
            break
        parameters += [value for value in made.inputs if value is not None]
        model.remove(made)
    return parameters


def _rescaled_weight(
    model: Model,
    writer: QdqWriter,
    node: oir.Node,
    weight: oir.Value,
    trained: FakeQuant | None,
    ratio: FloatArray,
) -> oir.Value:
    """The filters of ``node``, each multiplied by the ratio of the channel it reads."""
    array = model.constant(weight if trained is None else trained.source)
    assert array is not None
    name = weight.name or "weight"
    ratios = np.repeat(ratio, array.shape[0] // ratio.size)
    if trained is None:
        filters = array.astype(np.float32) * ratios.reshape(-1, *[1] * (array.ndim - 1))
        return model.add_initializer(f"{name}_rescaled", filters.astype(np.float32))
    params = trained.params
    levels = array if trained.source.dtype is not oir.DataType.FLOAT else params.quantize(array)
    steps = (np.broadcast_to(params.scale, ratios.shape) * ratios).astype(np.float32)
    zeros = np.broadcast_to(params.zero_point, ratios.shape).astype(np.int32)
    grid = params.with_(scale=steps, zero_point=zeros, axis=0)
    kept = np.clip(levels, params.dtype.qmin, params.dtype.qmax).astype(params.dtype.numpy)
    return writer.dequantized(kept, grid, name, node)
