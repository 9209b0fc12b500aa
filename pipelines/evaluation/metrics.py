"""What a model's answers are worth: metrics that are fed batch by batch and weigh every sample alike."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qat2int8.ir import DataError

__all__ = ["METRICS", "SHARE", "Metric", "metric_factory"]

SHARE = "% of samples"

Array = npt.NDArray[Any]

_IGNORED = 255
"""The label of pixels that belong to no class, by the custom of segmentation data sets."""

_MOST_CLASSES = 4096
"""Of an output that holds classes and does not say how many there are: they are counted in a table, square."""


class Metric(Protocol):
    """A score over all samples seen so far; ``result`` names its figures, the first is the one that is judged.

    ``unit``: of all its figures; :data:`SHARE` where they are shares of the samples, empty for plain numbers.
    """

    unit: str

    def update(self, outputs: Sequence[Array], labels: Array | None, first: int) -> None:
        """Take in one batch; ``first`` is the index of its first sample in the data.

        Raises:
            DataError: labels are missing, out of range or of the wrong shape; says which sample.
        """

    def result(self) -> dict[str, float]:
        """The figures; NaN before the first sample."""


class TopK:
    """Share of samples whose label is the largest output, or among the five largest, in percent.

    Scores are the first output, classes on the last axis that is longer than 1; labels are shape (N,) or (N, 1).
    """

    unit = SHARE

    def __init__(self) -> None:
        self.samples = self.first_hits = self.five_hits = 0

    def update(self, outputs: Sequence[Array], labels: Array | None, first: int) -> None:
        scores, wanted = _class_scores(outputs), _class_labels(labels, outputs, first)
        wanted_scores = np.take_along_axis(scores, wanted[:, None], 1)
        # Of equal scores the first one counts, as argmax has it.
        earlier = np.arange(scores.shape[1]) < wanted[:, None]
        ahead = ((scores > wanted_scores) | ((scores == wanted_scores) & earlier)).sum(1)
        # Nothing compares with a NaN: without this a broken model would always be right.
        number = ~np.isnan(wanted_scores[:, 0])
        self.samples += len(wanted)
        self.first_hits += int(((ahead < 1) & number).sum())
        self.five_hits += int(((ahead < 5) & number).sum())

    def result(self) -> dict[str, float]:
        return {
            "top-1": _percent(self.first_hits, self.samples),
            "top-5": _percent(self.five_hits, self.samples),
        }


class MeanIoU:
    """Intersection over union of predicted and true pixels, averaged over the classes that occur, in percent.

    The first output is (N, C, H, W) scores or (N, H, W) classes; labels are (N, H, W), 255 is ignored.
    """

    unit = "%"

    def __init__(self) -> None:
        self.confusion: npt.NDArray[np.int64] = np.zeros((0, 0), np.int64)

    def update(self, outputs: Sequence[Array], labels: Array | None, first: int) -> None:
        output = _first(outputs)
        predicted = output.argmax(1) if output.ndim == 4 else output
        truth = _given(labels, first)
        if truth.ndim == predicted.ndim + 1 and truth.shape[1] == 1:
            truth = truth[:, 0]
        if truth.shape != predicted.shape:
            raise DataError(f"labels of shape {truth.shape} do not fit predictions of shape {predicted.shape}")
        counted = truth != _IGNORED
        classes = output.shape[1] if output.ndim == 4 else _MOST_CLASSES
        bad = np.argwhere(counted & ((truth < 0) | (truth >= classes)))
        if len(bad):
            raise DataError(
                f"label {truth[tuple(bad[0])]} is none of the model's {classes} classes",
                where=f"sample {first + int(bad[0][0])}",
                remedy=f"labels are whole numbers from 0 to {classes - 1}, or {_IGNORED} for none",
            )
        if ((predicted < 0) | (predicted >= classes)).any():
            raise DataError(
                f"the output holds classes from {predicted.min()} to {predicted.max()}",
                remedy=f"classes are whole numbers from 0 to {classes - 1}",
            )
        wanted, found = truth[counted].astype(np.int64), predicted[counted].astype(np.int64)
        size = int(max(wanted.max(initial=-1), found.max(initial=-1), len(self.confusion) - 1)) + 1
        grown = np.zeros((size, size), np.int64)
        grown[: len(self.confusion), : len(self.confusion)] = self.confusion
        grown += np.bincount(wanted * size + found, minlength=size * size).reshape(size, size)
        self.confusion = grown

    def result(self) -> dict[str, float]:
        hits = np.diag(self.confusion)
        union = self.confusion.sum(0) + self.confusion.sum(1) - hits
        present = union > 0
        if not present.any():
            return {"mean-iou": math.nan}
        return {"mean-iou": 100.0 * float((hits[present] / union[present]).mean())}


class Psnr:
    """Peak signal to noise ratio of the first output against the labels, dB, averaged over samples.

    The peak is 255 for integer labels and 1 for float ones. An exact sample counts as 100 dB.
    """

    unit = "dB"

    def __init__(self) -> None:
        self.total, self.samples = 0.0, 0

    def update(self, outputs: Sequence[Array], labels: Array | None, first: int) -> None:
        truth, output = _given(labels, first), _first(outputs)
        if truth.shape != output.shape:
            raise DataError(f"labels of shape {truth.shape} do not fit outputs of shape {output.shape}")
        peak = 1.0 if truth.dtype.kind == "f" else 255.0
        error = np.square(output.astype(np.float64) - truth.astype(np.float64)).reshape(len(truth), -1).mean(1)
        with np.errstate(divide="ignore"):
            self.total += float(np.minimum(10.0 * np.log10(peak * peak / error), _EXACT_DB).sum())
        self.samples += len(truth)

    def result(self) -> dict[str, float]:
        return {"psnr": self.total / self.samples if self.samples else math.nan}


_EXACT_DB = 100.0


class Spearman:
    """Spearman's rank correlation of the first output (one number a sample) with the labels, from -1 to 1."""

    unit = ""

    def __init__(self) -> None:
        self.scores: list[float] = []
        self.labels: list[float] = []

    def update(self, outputs: Sequence[Array], labels: Array | None, first: int) -> None:
        truth, output = _given(labels, first), _first(outputs)
        if output.size != truth.size:
            raise DataError(f"{output.size} outputs for {truth.size} labels: the metric wants one a sample")
        self.scores += output.reshape(-1).astype(float).tolist()
        self.labels += truth.reshape(-1).astype(float).tolist()

    def result(self) -> dict[str, float]:
        left, right = _ranks(np.array(self.scores)), _ranks(np.array(self.labels))
        if len(left) < 2 or not left.std() or not right.std():
            return {"spearman": math.nan}
        return {"spearman": float(np.corrcoef(left, right)[0, 1])}


class F1:
    """F1 in percent: of class 1 where there are two classes, else averaged over the classes that occur."""

    unit = "%"

    def __init__(self) -> None:
        self.counts = np.zeros((3, 0), np.int64)  # hits, predicted, true, by class

    def update(self, outputs: Sequence[Array], labels: Array | None, first: int) -> None:
        scores, wanted = _class_scores(outputs), _class_labels(labels, outputs, first)
        classes, found = scores.shape[1], scores.argmax(1)
        if not self.counts.size:
            self.counts = np.zeros((3, classes), np.int64)
        for row, chosen in enumerate((wanted[wanted == found], found, wanted)):
            self.counts[row] += np.bincount(chosen, minlength=classes)

    def result(self) -> dict[str, float]:
        hits, predicted, true = self.counts
        total = predicted + true
        present = total > 0
        if not present.any():
            return {"f1": math.nan}
        scores = 2.0 * hits / np.maximum(total, 1)
        return {"f1": 100.0 * float(scores[1] if len(scores) == 2 else scores[present].mean())}


class Custom:
    """A function of the caller's, ``function(outputs, labels) -> number``, averaged over samples."""

    unit = ""

    def __init__(self, name: str, function: Callable[[Sequence[Array], Array | None], float]) -> None:
        self.name, self.function = name, function
        self.total, self.samples = 0.0, 0

    def update(self, outputs: Sequence[Array], labels: Array | None, first: int) -> None:
        count = len(labels) if labels is not None else len(outputs[0]) if outputs and outputs[0].ndim else 1
        where = f"samples {first} to {first + count - 1}"
        try:
            value = float(self.function(outputs, labels))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise DataError(f"the metric '{self.name}' raised {reason}", where=where) from error
        if math.isnan(value):
            raise DataError(f"the metric '{self.name}' returned NaN", where=where)
        self.total += value * count
        self.samples += count

    def result(self) -> dict[str, float]:
        return {self.name.rpartition(":")[2]: self.total / self.samples if self.samples else math.nan}


METRICS: Mapping[str, Callable[[], Metric]] = {
    "topk": TopK,
    "mean-iou": MeanIoU,
    "psnr": Psnr,
    "spearman": Spearman,
    "f1": F1,
}


def metric_factory(name: str) -> Callable[[], Metric]:
    """What makes the metric called ``name``, or the one that ``module:function`` names.

    Modules are looked for in the working directory too, as ``python -m`` does.

    Raises:
        DataError: there is no such metric, module or function.
    """
    if name in METRICS:
        return METRICS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise DataError(f"no metric is called '{name}'", remedy=f"one of {', '.join(METRICS)}, or module:function")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise DataError(f"no metric '{name}': {error}") from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise DataError(f"the metric '{name}' is no function")
    return lambda: Custom(name, found)


def _percent(hits: int, samples: int) -> float:
    return 100.0 * hits / samples if samples else math.nan


def _given(labels: Array | None, first: int) -> Array:
    if labels is None:
        raise DataError(
            "the data has no labels",
            where=f"sample {first}",
            remedy="add an array called 'labels', or name a metric that needs none",
        )
    return labels


def _first(outputs: Sequence[Array]) -> Array:
    """The output that is judged; models that are no networks put out lists and strings."""
    if not outputs or not isinstance(outputs[0], np.ndarray) or outputs[0].dtype.kind not in "biuf":
        raise DataError("the model's first output, which is judged, holds no numbers")
    return outputs[0]


def _class_scores(outputs: Sequence[Array]) -> Array:
    """The first output as (N, C)."""
    scores = _first(outputs)
    if scores.ndim > 2 and math.prod(scores.shape[1:]) == max(scores.shape[1:]):
        scores = scores.reshape(len(scores), -1)
    if scores.ndim != 2:
        raise DataError(
            f"the first output has shape {scores.shape}, the metric wants one score a class: (samples, classes)"
        )
    return scores


def _class_labels(labels: Array | None, outputs: Sequence[Array], first: int) -> npt.NDArray[np.int64]:
    wanted, classes = _given(labels, first), _class_scores(outputs).shape[1]
    if wanted.size != len(outputs[0]):
        raise DataError(f"{wanted.size} labels for {len(outputs[0])} samples", where=f"samples from {first} on")
    wanted = wanted.reshape(-1)
    whole = wanted.astype(np.int64)
    bad = np.flatnonzero((whole != wanted) | (whole < 0) | (whole >= classes))
    if bad.size:
        raise DataError(
            f"label {wanted[bad[0]]} is none of the model's {classes} classes",
            where=f"sample {first + int(bad[0])}",
            remedy=f"labels are whole numbers from 0 to {classes - 1}",
        )
    return whole


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks from 0 on; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2.0)[place]
