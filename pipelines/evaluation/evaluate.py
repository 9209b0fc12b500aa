"""Several models on the same data, in turns: what they answer and how long they take."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from qat2int8.ir import DataError, Qat2Int8Error, UnsupportedModel
from qat2int8.pipelines.data import Batch
from qat2int8.pipelines.evaluation.failure import Failure, until_broken
from qat2int8.pipelines.evaluation.metrics import SHARE, Metric
from qat2int8.pipelines.evaluation.read_reference import ReadReference
from qat2int8.pipelines.sessions import reference_session, run_session, session

__all__ = ["Evaluation", "ModelScore", "Timing", "evaluate"]

_LOSS_NAMES = ("loss", "cost")


@dataclass(frozen=True)
class Timing:
    """What each batch took in the runtime and nothing else: its number, seconds, samples."""

    batches: tuple[int, ...]
    seconds: tuple[float, ...]
    samples: tuple[int, ...]

    @property
    def throughput(self) -> float:
        """Samples a second over all batches; NaN without one."""
        return sum(self.samples) / sum(self.seconds) if self.seconds else math.nan

    @property
    def median_ms(self) -> float:
        """Median milliseconds a batch."""
        return 1000.0 * statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def mean_ms(self) -> float:
        """Mean milliseconds a batch."""
        return 1000.0 * statistics.fmean(self.seconds) if self.seconds else math.nan

    @property
    def p99_ms(self) -> float:
        """Milliseconds that 99 of 100 batches stay within."""
        return 1000.0 * float(np.quantile(self.seconds, 0.99)) if self.seconds else math.nan

    def without(self, batches: int) -> Timing:
        """The same without the first ``batches``, during which caches fill."""
        kept = [index for index, number in enumerate(self.batches) if number >= batches]
        return Timing(
            tuple(self.batches[index] for index in kept),
            tuple(self.seconds[index] for index in kept),
            tuple(self.samples[index] for index in kept),
        )

    def as_dict(self) -> dict[str, Any]:
        """Figures, ready for JSON."""
        return {
            "batches": len(self.seconds),
            "throughput": self.throughput,
            "median_ms": self.median_ms,
            "mean_ms": self.mean_ms,
            "p99_ms": self.p99_ms,
        }


@dataclass(frozen=True)
class ModelScore:
    """One model on one number of threads.

    Attributes:
        model: its name, as the caller knows it.
        threads: intra-op threads of the session; 0 is what the runtime chose.
        samples: how many were judged.
        metrics: figures by name, the judged one first; empty where nothing was judged.
        unit: of those figures; empty for plain numbers.
        loss: mean over samples of the output that is a loss, None where there is none.
        timing: of all batches.
        warm: of the batches behind the skipped ones.
    """

    model: str
    threads: int
    samples: int
    metrics: dict[str, float]
    unit: str
    loss: float | None
    timing: Timing
    warm: Timing

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "model": self.model,
            "threads": self.threads,
            "samples": self.samples,
            "metrics": self.metrics,
            "unit": self.unit,
            "loss": self.loss,
            "timing": self.timing.as_dict(),
            "timing_without_skipped": self.warm.as_dict(),
        }


@dataclass(frozen=True)
class Evaluation:
    """All models on all numbers of threads, in the order given, and what went wrong on the way.

    ``notes`` say which models onnxruntime does not run as they are, and how they were run.
    """

    scores: tuple[ModelScore, ...]
    failures: tuple[Failure, ...]
    skipped_batches: int
    notes: tuple[str, ...] = ()

    def of(self, model: str, threads: int) -> ModelScore:
        """The score of one model on one number of threads."""
        return next(score for score in self.scores if (score.model, score.threads) == (model, threads))

    def ratios(self, model: str, reference: str, threads: int) -> list[float]:
        """How many times faster than ``reference`` on each batch that both ran, without skipped ones."""
        ours, theirs = (self.of(name, threads).warm for name in (model, reference))
        slow = dict(zip(theirs.batches, theirs.seconds, strict=True))
        pairs = zip(ours.batches, ours.seconds, strict=True)
        return [slow[number] / fast for number, fast in pairs if number in slow]

    def speedup(self, model: str, reference: str, threads: int) -> float:
        """How many times faster than ``reference``: the median over the batches; NaN without one."""
        ratios = self.ratios(model, reference, threads)
        return statistics.median(ratios) if ratios else math.nan

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "scores": [score.as_dict() for score in self.scores],
            "failures": [vars(failure) for failure in self.failures],
            "skipped_batches": self.skipped_batches,
            "notes": list(self.notes),
        }


def evaluate(
    models: dict[str, Path],
    batches: Iterable[Batch],
    metric: Callable[[], Metric] | None,
    *,
    threads: Sequence[int] = (1,),
    iterations: int = 0,
    skip_batches: int = 0,
    accuracy_output: str | None = None,
    loss_output: str | None = None,
    on_batch: Callable[[int, dict[str, dict[str, float]]], None] | None = None,
) -> Evaluation:
    """Run every model on every batch, in turns, so that what disturbs the machine disturbs all alike.

    A batch that a model fails on is left out for that model and reported; the others go on. Data that fail
    on the way end the run, and what was seen until then is reported.

    Args:
        models: files by the name they are reported under.
        metric: makes a fresh metric for each model; None where only speed is asked for.
        threads: numbers of intra-op threads, each with sessions of its own; answers are judged with the first.
        iterations: how many batches; 0 takes all there are.
        skip_batches: how many of them warm up; they are judged, and timed apart.
        accuracy_output: an output that is the batch's accuracy, 0 to 1, computed in the graph; judged in place of
            ``metric``.
        loss_output: an output that is the batch's loss; where it is not named, one called like a loss is taken.
        on_batch: called after every batch with its number from 1 on, and each model's figures so far.

    Raises:
        DataError: there are no batches, fewer than are to be skipped, or an output has not the name given.
        UnsupportedModel: onnxruntime refuses a model, in whatever way it is read and run.
    """
    if iterations and skip_batches >= iterations:
        raise DataError(
            f"{skip_batches} batches to skip of {iterations} leave none",
            remedy="skip fewer than there are iterations",
        )
    runners = [
        _Runner(name, path, count, metric if count == threads[0] else None, accuracy_output, loss_output)
        for count in threads
        for name, path in models.items()
    ]
    seen = 0
    broken: list[Failure] = []
    for batch in until_broken(islice(batches, iterations or None), broken):
        turn = seen % len(runners)
        for runner in runners[turn:] + runners[:turn]:
            runner.take(batch, seen)
        seen += 1
        if on_batch is not None:
            on_batch(seen, {runner.name: runner.figures() for runner in runners[: len(models)]})
    if seen <= skip_batches:
        raise DataError(
            f"the data has {seen} batches, {skip_batches} of them to be skipped"
            if seen
            else "the data has no samples",
            remedy="give more samples, or a smaller batch",
        )
    failures = (failure for runner in runners for failure in runner.failures)
    notes = dict.fromkeys(runner.note for runner in runners if runner.note)
    scores = tuple(runner.score(skip_batches) for runner in runners)
    return Evaluation(scores, (*failures, *broken), skip_batches, tuple(notes))


@dataclass(eq=False)
class _Runner:
    """One session, what it was asked for and what came of it so far."""

    name: str
    path: Path
    threads: int
    metric_factory: Callable[[], Metric] | None
    accuracy_output: str | None
    loss_output: str | None
    failures: list[Failure] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.note = ""
        self.session = self._opened()
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.metric = self.metric_factory() if self.metric_factory and not self.accuracy_output else None
        self.judges = self.metric_factory is not None
        self.accuracy = _position(self.outputs, self.accuracy_output, self.name)
        self.loss = _position(self.outputs, self.loss_output, self.name)
        if self.loss is None:
            named = [i for i, name in enumerate(self.outputs) if any(part in name.lower() for part in _LOSS_NAMES)]
            self.loss = named[0] if named else None
        self.samples = 0
        self.sums = {"accuracy": 0.0, "loss": 0.0}
        self.numbers: list[int] = []
        self.seconds: list[float] = []
        self.sizes: list[int] = []

    def _opened(self) -> ort.InferenceSession:
        # A thread that waits busily for the next run takes the processor from the model whose turn it is.
        open_plain = partial(session, threads=self.threads, yielding=self.threads != 1)
        try:
            return open_plain(self.path)
        except UnsupportedModel as refused:
            try:
                read = ReadReference.open(self.path)
            except Qat2Int8Error:
                raise refused from None
            # It holds the file of what was read, which may have weights in another one.
            self.readable = read
            told = f"onnxruntime does not run {self.name} as it is; it was measured with "
            if read.path != self.path:
                with contextlib.suppress(UnsupportedModel):
                    self.note = f"{told}its fake quantization as Q/DQ"
                    return open_plain(read.path)
            self.note = f"{told}optimisation off: its answers count, its speed does not"
            try:
                return reference_session(read.path, threads=self.threads)
            except UnsupportedModel:
                raise refused from None

    def take(self, batch: Batch, number: int) -> None:
        """Run the batch, time it, judge what comes out."""
        try:
            feeds = {name: batch.inputs[name] for name in self.inputs}
            started = time.perf_counter()
            outputs = run_session(self.session, feeds)
            self.seconds.append(time.perf_counter() - started)
            self.numbers.append(number)
            self.sizes.append(len(batch))
            if self.judges:
                self._judge(outputs, batch)
        except KeyError as error:
            self._failed(batch, f"the data has no array for input {error}")
        except Qat2Int8Error as error:
            self._failed(batch, str(error))

    def _judge(self, outputs: list[npt.NDArray[Any]], batch: Batch) -> None:
        count = len(batch)
        if self.metric is not None:
            if batch.labels is not None and len(batch.labels) < count:
                there = len(batch.labels) or "no"
                raise DataError(f"there are {there} labels for {count} samples", remedy="label all of them")
            self.metric.update(outputs, batch.labels, batch.first)
        for figure, position in (("accuracy", self.accuracy), ("loss", self.loss)):
            if position is not None:
                self.sums[figure] += _mean(outputs[position], self.outputs[position]) * count
        self.samples += count

    def _failed(self, batch: Batch, reason: str) -> None:
        self.failures.append(Failure(self.name, batch.first, len(batch), reason))

    def figures(self) -> dict[str, float]:
        """The metric's figures so far, or the in-graph accuracy's."""
        if self.metric is not None:
            return self.metric.result()
        if self.accuracy is not None and self.judges:
            return {"accuracy": 100.0 * self.sums["accuracy"] / self.samples if self.samples else math.nan}
        return {}

    def score(self, skip: int) -> ModelScore:
        loss = self.sums["loss"] / self.samples if self.loss is not None and self.samples else None
        timing = Timing(tuple(self.numbers), tuple(self.seconds), tuple(self.sizes))
        unit = self.metric.unit if self.metric is not None else SHARE if self.judges else ""
        return ModelScore(
            self.name, self.threads, self.samples, self.figures(), unit, loss, timing, timing.without(skip)
        )


def _position(outputs: list[str], wanted: str | None, model: str) -> int | None:
    if wanted is None:
        return None
    if wanted not in outputs:
        raise DataError(
            f"the model has no output '{wanted}'", where=model, remedy=f"its outputs are {', '.join(outputs)}"
        )
    return outputs.index(wanted)


def _mean(output: npt.NDArray[Any], name: str) -> float:
    if output.dtype.kind not in "fiub" or not output.size:
        raise DataError(f"output '{name}' is no number")
    return float(output.astype(np.float64).mean())
