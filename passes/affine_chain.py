"""Finding the per-channel affine nodes behind a layer and folding them into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from qat2int8.ir import ChannelMoments, Code, Diagnostic, Model, Severity
from qat2int8.passes.base import Pass
from qat2int8.passes.channel_affine import ChannelAffine, Layer, NotFoldable, fold
from qat2int8.passes.sole_consumer import sole_consumer


@dataclass(frozen=True, eq=False)
class Link:
    """One node that computes ``affine`` of the tensor it stands behind.

    ``moments`` is what training said about its output, where the node knows.
    """

    node: oir.Node
    affine: ChannelAffine
    moments: ChannelMoments | None = None

    def __str__(self) -> str:
        return f"{self.node.op_type} '{self.node.name}'"


def batch_norm_link(model: Model, node: oir.Node) -> Link:
    """What a BatchNormalization computes in inference mode: ``(x - mean) * gamma / sqrt(var + eps) + beta``.

    Raises:
        NotFoldable: it is in training mode, or its parameters are not constant, or not finite.
    """
    if node.attributes.get_int("training_mode", 0) or any(out.name for out in node.outputs[1:]):
        raise NotFoldable("it is in training mode", "export the model in evaluation mode")
    arrays = [model.constant(value) for value in node.inputs[1:5]]
    gamma, beta, mean, var = (None if a is None else a.astype(np.float64) for a in arrays)
    if gamma is None or beta is None or mean is None or var is None:
        raise NotFoldable("its parameters are not constant")
    with np.errstate(invalid="ignore", divide="ignore"):
        factor = gamma / np.sqrt(var + node.attributes.get_float("epsilon", 1e-5))
    offset = beta - mean * factor
    if not (np.all(np.isfinite(factor)) and np.all(np.isfinite(offset))):
        raise NotFoldable("its parameters are not finite numbers, or a variance is negative")
    return Link(node, ChannelAffine(factor, offset), batch_norm_moments(model, node))


def batch_norm_moments(model: Model, node: oir.Node) -> ChannelMoments | None:
    """Mean and deviation of the output as trained: beta and |gamma|, by the definition of the op."""
    gamma, beta = model.constant(node.inputs[1]), model.constant(node.inputs[2])
    if gamma is None or beta is None:
        return None
    origin = f"BatchNormalization '{node.name}'"
    return ChannelMoments(beta.astype(np.float32), np.abs(gamma).astype(np.float32), 1, origin)


def elementwise_link(model: Model, layer: Layer, node: oir.Node, source: oir.Value) -> Link | None:
    """``source`` plus, minus, times or over a constant that is the same at every place of a channel, or None."""
    first = node.inputs[0] is source
    if node.domain or len(node.inputs) != 2 or (node.op_type == "Div" and not first):
        return None
    constant = model.constant(node.inputs[1 if first else 0])
    if constant is None or constant.ndim > layer.rank:
        return None
    shape = (1,) * (layer.rank - constant.ndim) + constant.shape
    if constant.size not in (1, layer.channels) or constant.size != shape[1]:
        return None
    operand = np.broadcast_to(constant.astype(np.float64).reshape(-1), (layer.channels,))
    ones, zeros = np.ones(layer.channels), np.zeros(layer.channels)
    match node.op_type:
        case "Add":
            affine = ChannelAffine(ones, operand)
        case "Sub":
            affine = ChannelAffine(ones, -operand) if first else ChannelAffine(-ones, operand)
        case "Mul":
            affine = ChannelAffine(operand, zeros)
        case "Div" if np.all(operand != 0):
            affine = ChannelAffine(ones / operand, zeros)
        case _:
            return None
    return Link(node, affine)


def fold_elementwise(
    pass_: Pass, model: Model, layers: Sequence[str], op_types: Sequence[str], *, batch_norm: bool = False
) -> tuple[int, list[Diagnostic]]:
    """Fold the nodes of ``op_types`` behind every layer into it; how many, and what there is to say.

    With ``batch_norm`` BatchNormalizations in the same run are folded along; one that stands alone is not.
    """
    folded, notes = 0, list[Diagnostic]()
    for node in model.nodes(*layers):
        try:
            layer = Layer.of(model, node)
        except NotFoldable:
            continue
        links = _elementwise_chain(model, layer, op_types, batch_norm)
        if all(link.node.op_type == "BatchNormalization" for link in links):
            continue
        try:
            notes += fold_chain(pass_, model, layer, links)
            folded += len(links)
        except NotFoldable as refusal:
            reason = f"{links[0]} behind it not folded: {refusal.reason}"
            notes.append(pass_.note(Code.NOT_FUSED, reason, severity=Severity.NOTE, node=node.name or ""))
    return folded, notes


def _elementwise_chain(model: Model, layer: Layer, op_types: Sequence[str], batch_norm: bool) -> list[Link]:
    """The longest run of foldable nodes right behind ``layer``, each the only reader of the one before it."""
    links: list[Link] = []
    value = layer.node.outputs[0]
    while (node := sole_consumer(model, value)) is not None:
        link: Link | None = None
        if node.op_type in op_types:
            link = elementwise_link(model, layer, node, value)
        elif batch_norm and node.op_type == "BatchNormalization":
            link = _batch_norm_or_none(model, layer, node)
        if link is None:
            break
        links.append(link)
        value = node.outputs[0]
    return links


def _batch_norm_or_none(model: Model, layer: Layer, node: oir.Node) -> Link | None:
    try:
        link = batch_norm_link(model, node)
    except NotFoldable:
        return None
    return link if link.affine.factor.size == layer.channels else None


def fold_chain(pass_: Pass, model: Model, layer: Layer, links: Sequence[Link]) -> list[Diagnostic]:
    """Fold ``links`` into ``layer`` in one go and take them out of the graph.

    The grids of tensors that vanish are dropped with a diagnostic; the last tensor keeps its name and grid.

    Raises:
        NotFoldable: the parameters cannot take it; nothing was changed.
    """
    total = links[0].affine
    for link in links[1:]:
        total = total.then(link.affine)
    weight = layer.weight.name or ""
    refit = fold(model, layer, total, ", ".join(str(link) for link in links))
    notes = [
        pass_.note(
            Code.WEIGHT_REQUANTIZED,
            f"{count} of {layer.channels} channels {what}",
            node=layer.node.name or "",
            value=weight,
            remedy=remedy,
        )
        for count, what, remedy in (
            (
                refit.regridded,
                "hold the lowest level and changed sign; their step grew to reach its mirror image",
                "train the weights with a narrow range (-127..127)",
            ),
            (refit.flushed, "are too small for a float32 step after the fold; they are zero now", ""),
        )
        if count
    ]
    result = layer.node.outputs[0]
    for link in links:
        notes += _splice(pass_, model, result, link)
    return notes


def _splice(pass_: Pass, model: Model, result: oir.Value, link: Link) -> list[Diagnostic]:
    """Let ``result`` be what the link computed, and remove the link."""
    final = link.node.outputs[0]
    notes = drop_grid(pass_, model, result, replaced_by=final)
    moments = link.moments or _moved(model.moments.get(result), link)
    model.replace_value(final, result)
    if moments is not None:
        model.moments[result] = moments
    assert model.graph is link.node.graph
    model.graph.remove(link.node, safe=True)
    return notes


def _moved(moments: ChannelMoments | None, link: Link) -> ChannelMoments | None:
    """The statistics of a tensor after ``link``."""
    if moments is None:
        return None
    factor, offset = link.affine.factor, link.affine.offset
    return ChannelMoments(
        (factor * moments.mean + offset).astype(np.float32),
        (np.abs(factor) * moments.std).astype(np.float32),
        moments.axis,
        f"{moments.origin}, through {link}",
    )


def drop_grid(pass_: Pass, model: Model, value: oir.Value, *, replaced_by: oir.Value) -> list[Diagnostic]:
    """Forget the grid of a tensor that a fusion takes out of the graph, and say so."""
    grid = model.scales.discard(value)
    if grid is None:
        return []
    covered = replaced_by in model.scales
    name = replaced_by.name or ""
    return [
        pass_.note(
            Code.FAKE_QUANT_DROPPED,
            f"the tensor is fused away, and with it its grid {grid} from {grid.origin}; '{name}' has "
            + ("its own" if covered else "none"),
            severity=Severity.NOTE if covered else Severity.WARNING,
            value=value.name or "",
            remedy="" if covered else f"train a fake quant on '{name}' instead",
        )
    ]
