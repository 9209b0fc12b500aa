"""Everything known about a model, gathered into one report."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as oir

from qat2int8.ir import Model, PipelineError
from qat2int8.ir.io import load_model
from qat2int8.pipelines.environment import environment
from qat2int8.pipelines.evaluation.activations import Activation
from qat2int8.pipelines.evaluation.compare import Comparison
from qat2int8.pipelines.evaluation.evaluate import Evaluation, ModelScore
from qat2int8.pipelines.evaluation.failure import Failure
from qat2int8.pipelines.evaluation.metrics import SHARE
from qat2int8.pipelines.exact_products import overflow_warning
from qat2int8.pipelines.explanation import Explanation, explain
from qat2int8.pipelines.figures import as_count, as_decimal, as_percent
from qat2int8.pipelines.reporting.document import (
    Accuracy,
    Card,
    Drawing,
    Finding,
    FloatReason,
    Histogram,
    Layer,
    LayerError,
    Machine,
    ModelFacts,
    ReportDocument,
    Speed,
    worst_first,
)
from qat2int8.pipelines.reporting.drawing import Kind, draw
from qat2int8.pipelines.reporting.interval import interval
from qat2int8.pipelines.shipped import load_pipeline
from qat2int8.pipelines.spec import flatten
from qat2int8.pipelines.version import VERSION

__all__ = ["collect"]

_MOVEMENT = frozenset(
    {
        *("Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Pad", "Reshape", "Shape", "Slice"),
        *("SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
    }
)
"""Compute nothing: that they move floats is no loss by itself."""

_FAILURES = 3
"""Batches that went wrong, told of one by one."""


def collect(
    model: Path,
    reference: Path | None = None,
    *,
    evaluation: Evaluation | None = None,
    data: str = "",
    comparison: Comparison | None = None,
    values: Sequence[Activation] = (),
    notes: Sequence[str] = (),
) -> ReportDocument:
    """Gather a report on the model file ``model``.

    Args:
        reference: what it is compared with: the float or fake-quant model it was made from.
        evaluation: answers and speed, if measured; differences are against the first model in it.
        data: what all of this was measured on.
        comparison: each layer's error against the reference, if it was measured.
        values: what values activations take, with the ends of their grids.
        notes: what a reader has to know about how all of this was measured.

    Raises:
        InvalidModel: a file is no valid model.
        UnsupportedModel: onnxruntime refuses ``model``.
    """
    explanation = explain(model)
    original = load_model(reference) if reference is not None else None
    layers = _layers(explanation)
    speed = _speeds(evaluation)
    accuracy = _accuracies(evaluation)
    unit = evaluation.scores[0].unit.partition(" ")[0] if evaluation is not None else ""
    errors = _errors(comparison)
    failures = [*(evaluation.failures if evaluation else ()), *(comparison.failures if comparison else ())]
    machine, overflows = environment(), overflow_warning(model)
    warnings = [*machine.warnings, *([overflows] if overflows is not None else [])]
    return ReportDocument(
        title=f"{model.stem}: INT8 report",
        made=f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M}, qat2int8 {VERSION}",
        model=_facts(model, explanation.model),
        reference=_facts(reference, original) if reference is not None and original is not None else None,
        cards=tuple(_cards(explanation, accuracy, unit, speed, reference, errors)),
        accuracy=accuracy,
        speed=speed,
        unit=unit,
        data=data,
        notes=(*notes, *_failed(failures)),
        layers=layers,
        layer_errors=errors,
        histograms=tuple(_histogram(one) for one in values),
        drawings=tuple(_drawings(explanation, original)),
        left_float=tuple(
            FloatReason(
                code=group.code,
                reason=group.reason,
                remedy=group.remedy,
                nodes=tuple(record.node for record in group.nodes),
            )
            for group in explanation.left_float
        ),
        findings=tuple(Finding(**finding.as_dict()) for finding in explanation.diagnostics),
        pipeline=_pipeline(explanation),
        environment=Machine(**machine.as_dict() | {"warnings": warnings}),
    )


def _failed(failures: Sequence[Failure]) -> list[str]:
    """The first few; what is measured lacks them."""
    told = [f"left out: {failure}" for failure in failures[:_FAILURES]]
    more = len(failures) - len(told)
    return [*told, f"left out: {more} more batches"] if more else told


def _file_bytes(path: Path) -> int:
    """With the weights that lie beside it."""
    beside = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (beside.stat().st_size if beside.exists() else 0)


def _facts(path: Path, model: Model) -> ModelFacts:
    return ModelFacts(
        name=path.name,
        bytes=_file_bytes(path),
        nodes=sum(1 for _ in model.graph.all_nodes()),
        inputs=tuple(value.name or "" for value in model.graph.inputs),
        outputs=tuple(value.name or "" for value in model.graph.outputs),
    )


def _layers(explanation: Explanation) -> tuple[Layer, ...]:
    nodes = {node.name: node for node in explanation.model.graph.all_nodes()}
    layers = []
    for record in explanation.certificate.compute:
        node = nodes.get(record.node)
        kernel = explanation.certificate.kernel_of(node) if node is not None and record.integer else None
        layers.append(
            Layer(
                name=record.node,
                op_type=record.op_type,
                macs=record.macs,
                integer=record.integer,
                kernel=kernel or ("integer" if record.integer else ""),
            )
        )
    return tuple(layers)


def _accuracies(evaluation: Evaluation | None) -> tuple[Accuracy, ...]:
    judged = [score for score in evaluation.scores if score.metrics] if evaluation is not None else []
    rows = []
    for score in judged:
        first = next(iter(judged[0].metrics))
        difference = score.metrics.get(first, float("nan")) - judged[0].metrics[first]
        rows.append(
            Accuracy(
                model=score.model,
                samples=score.samples,
                figures=dict(score.metrics),
                intervals={
                    figure: interval(percent, score.samples)
                    for figure, percent in score.metrics.items()
                    if score.unit == SHARE and score.samples
                },
                loss=score.loss,
                difference=difference,
            )
        )
    return tuple(rows)


def _speeds(evaluation: Evaluation | None) -> tuple[Speed, ...]:
    if evaluation is None:
        return ()
    first = evaluation.scores[0].model
    return tuple(
        _speed(score, evaluation.ratios(score.model, first, score.threads)) for score in evaluation.scores
    )


def _speed(score: ModelScore, ratios: Sequence[float]) -> Speed:
    milliseconds = [1000.0 * second for second in score.warm.seconds]
    lower, _, upper = _quartiles(milliseconds)
    slower, ratio, faster = _quartiles(ratios)
    return Speed(
        model=score.model,
        threads=score.threads,
        batches=len(milliseconds),
        batch_size=max(score.warm.samples, default=0),
        samples_per_second=score.warm.throughput,
        median_ms=score.warm.median_ms,
        lower_quartile_ms=lower,
        upper_quartile_ms=upper,
        p99_ms=score.warm.p99_ms,
        ratio=ratio,
        ratio_lower_quartile=slower,
        ratio_upper_quartile=faster,
    )


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; NaN without values."""
    lower, middle, upper = np.quantile(values or (np.nan,), (0.25, 0.5, 0.75))
    return float(lower), float(middle), float(upper)


def _errors(comparison: Comparison | None) -> tuple[LayerError, ...]:
    """Of each layer alone, where it could be run alone: that is what can be mended about it."""
    layers = comparison.layers if comparison is not None else ()
    return tuple(
        LayerError(
            name=layer.name,
            op_type=layer.op_type,
            exact=layer.errors("local").sqnr_db == math.inf,
            sqnr_db=layer.errors("local").sqnr_db,
            cosine=layer.errors("local").cosine,
            max_error=layer.errors("local").max_error,
            mean_error=layer.errors("local").mean_error,
            off_by=layer.errors("local").off_by_shares,
        )
        for layer in layers
    )


def _histogram(value: Activation) -> Histogram:
    return Histogram(
        layer=value.layer,
        tensor=value.tensor,
        lo=value.lo,
        hi=value.hi,
        counts=value.counts,
        grid_lo=value.grid_lo,
        grid_hi=value.grid_hi,
        saturated=value.saturated,
    )


def _cards(
    explanation: Explanation,
    accuracy: Sequence[Accuracy],
    unit: str,
    speed: Sequence[Speed],
    reference: Path | None,
    errors: Sequence[LayerError],
) -> list[Card]:
    certificate = explanation.certificate
    cards = [
        Card(
            label="In integers" if certificate.basis == "executed" else "Between quantizers",
            value=as_percent(certificate.integer_macs_percent),
            hint=f"of {as_count(certificate.macs)} multiply-accumulates, "
            f"{sum(record.integer for record in certificate.compute)} of {len(certificate.compute)} layers",
            tone="doubtful" if certificate.float_compute else "good",
        )
    ]
    if accuracy:
        cards.append(_answers(accuracy, unit))
    ratios = [row.ratio for row in speed if row.model == speed[-1].model and row.ratio is not None]
    if len({row.model for row in speed}) > 1 and ratios:
        cards.append(
            Card(
                label="Speed",
                value=f"{ratios[0]:.2f}x",
                hint=f"of {speed[0].model}",
                tone="good" if ratios[0] > 1.0 else "doubtful",
            )
        )
    if reference is not None:
        before, after = _file_bytes(reference), _file_bytes(explanation.path)
        cards.append(Card(label="Size", value=f"{100.0 * after / before:.0f} %", hint="of the reference"))
    if errors:
        worst = worst_first(errors)[0]
        value = "exact" if worst.exact else f"{as_decimal(worst.sqnr_db, 1)} dB"
        cards.append(Card(label="Worst layer", value=value, hint=worst.name))
    left = sum(len(group.nodes) for group in explanation.left_float)
    cards.append(
        Card(
            label="Left in float",
            value=str(left),
            hint=f"{'node' if left == 1 else 'nodes'} that could be integer",
            tone="doubtful" if left else "good",
        )
    )
    return cards


def _answers(accuracy: Sequence[Accuracy], unit: str) -> Card:
    """The first figure of the last model, the one that the report is about."""
    last = accuracy[-1]
    figure, value = next(iter(last.figures.items()))
    shown = f"{as_decimal(value)} {unit}".strip()
    if len(accuracy) == 1 or last.difference is None:
        return Card(label=figure, value=shown, hint=f"of {last.samples} samples" if unit == "%" else "")
    points = "points " if unit == "%" else f"{unit} " if unit else ""
    return Card(
        label=figure,
        value=shown,
        hint=f"{as_decimal(last.difference, signed=True)} {points}against {accuracy[0].model}",
        tone="good" if last.difference > -0.5 else "doubtful",
    )


def _drawings(explanation: Explanation, original: Model | None) -> list[Drawing]:
    in_float = {record.node: group.reason for group in explanation.left_float for record in group.nodes}

    def kind(node: oir.Node) -> Kind:
        if explanation.kernel(node):
            return "integer"
        return "movement" if node.op_type in _MOVEMENT else "float"

    after = draw(explanation.model, "As converted", kind, lambda node: in_float.get(node.name or "", ""))
    if original is None:
        return [after]

    def kind_before(node: oir.Node) -> Kind:
        return "movement" if node.op_type in _MOVEMENT else "float"

    return [draw(original, "As it came", kind_before, lambda node: ""), after]


def _pipeline(explanation: Explanation) -> tuple[str, ...]:
    """The names of the passes that made the model; the text itself where it cannot be read."""
    if explanation.origin is None:
        return ()
    try:
        return tuple(spec.name for spec in flatten(load_pipeline(explanation.origin.pipeline).passes))
    except PipelineError:
        return (explanation.origin.pipeline,)
