"""What leaving single layers in float would gain, found out by doing it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime as ort

from qat2int8.ir import DataError, Model, Qat2Int8Error
from qat2int8.ir.io import load_model
from qat2int8.passes.insert_quantize_dequantize import InsertQuantizeDequantize
from qat2int8.pipelines.calibration.steps import POST_TRAINING
from qat2int8.pipelines.convert import Conversion, convert
from qat2int8.pipelines.data import Batch
from qat2int8.pipelines.dialects import has_fake_quant
from qat2int8.pipelines.evaluation.metrics import Metric
from qat2int8.pipelines.fidelity import compare
from qat2int8.pipelines.made_with import pipeline_of, target_of
from qat2int8.pipelines.quantize import quantize
from qat2int8.pipelines.sessions import ModelFile, deployed_session, reference_session, run_session
from qat2int8.pipelines.spec import PipelineSpec, flatten
from qat2int8.pipelines.tables.table import CalibrationTable
from qat2int8.pipelines.target_files import DEFAULT_TARGET, load_target

__all__ = ["Quality", "SkipTrial", "SkipTrials", "try_skips"]

MetricFactory = Callable[[], Metric]


@dataclass(frozen=True)
class Quality:
    """How good a converted model is.

    Attributes:
        sqnr_db: of its worst output against the reference.
        same_argmax_percent: positions whose largest entry is the reference's; None for outputs without classes.
        integer_macs_percent: share of multiply-accumulates in integer kernels.
        metrics: figures by name, the judged one first; empty where nothing was judged.
    """

    sqnr_db: float
    same_argmax_percent: float | None
    integer_macs_percent: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SkipTrial:
    """The reference converted once more with one layer in float; ``quality`` is None where that failed, and
    ``error`` says why."""

    layer: str
    quality: Quality | None
    error: str = ""


@dataclass(frozen=True)
class SkipTrials:
    """All trials, and what to see them against.

    Attributes:
        candidate: SQNR in dB of the worst output of the candidate itself.
        whole: the reference converted once more as the candidate was, with no more layers in float.
        samples: how many all of them were run on.
        calibrated: whether the reference is a float model, quantized on ranges of the same samples.
        reference: the metric's figures for the reference; empty where nothing was judged.
        unjudged: why nothing was, where a metric was given.
    """

    candidate: float
    whole: Quality
    trials: tuple[SkipTrial, ...]
    samples: int
    calibrated: bool
    reference: dict[str, float]
    unjudged: str

    def gain_db(self, trial: SkipTrial) -> float:
        """What the trial's output gained over :attr:`whole`; NaN where there is no figure."""
        if trial.quality is None or trial.quality.sqnr_db == self.whole.sqnr_db:
            return math.nan if trial.quality is None else 0.0
        return trial.quality.sqnr_db - self.whole.sqnr_db

    def gain(self, trial: SkipTrial) -> float:
        """The same of the metric's first figure, in its own unit."""
        figure = next(iter(self.reference), "")
        if trial.quality is None or figure not in trial.quality.metrics:
            return math.nan
        return trial.quality.metrics[figure] - self.whole.metrics[figure]

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "candidate_sqnr_db": self.candidate,
            "whole": asdict(self.whole),
            "samples": self.samples,
            "calibrated": self.calibrated,
            "reference_metrics": self.reference,
            "unjudged": self.unjudged,
            "trials": [
                {**asdict(trial), "gain_db": self.gain_db(trial), "gain": self.gain(trial)}
                for trial in self.trials
            ],
        }


def try_skips(
    reference: Path,
    readable: ModelFile,
    candidate: Path,
    layers: Sequence[str],
    batches: Iterable[Batch],
    metric: MetricFactory | None = None,
) -> SkipTrials:
    """Convert the reference again, each time with one layer in float, and compare its outputs.

    A float reference is calibrated once, on the same batches, and quantized on those ranges each time.

    Args:
        reference: a model, with fake quantization or without.
        readable: the same in a form that onnxruntime loads.
        candidate: what became of it; the pipeline and target it was made with are used again.
        layers: names of nodes.
        batches: gone through once or twice for every conversion.
        metric: makes what judges the answers; None where outputs are only compared.

    Raises:
        Qat2Int8Error: the reference cannot be converted.
    """
    made = load_model(candidate)
    again = _Again(reference, made, batches)

    def feeds() -> Iterable[Any]:
        return (batch.inputs for batch in batches)

    def quality(*names: str) -> Quality:
        conversion = again.converted(names)
        with tempfile.TemporaryDirectory(prefix="qat2int8-") as folder:
            path = Path(folder) / "model.onnx"
            conversion.save(path)
            found = compare(readable, path, feeds(), target=conversion.target)
            coverage = conversion.certificate.integer_macs_percent
            figures = _judged(deployed_session(conversion.target, path), batches, metric)
        return Quality(found.sqnr_db, found.same_argmax_percent, coverage, figures)

    known, unjudged = {}, ""
    try:
        known = _judged(reference_session(readable), batches, metric)
    except DataError as error:
        metric, unjudged = None, str(error)
    whole = quality()
    ours = compare(readable, candidate, feeds(), target=again.target)
    trials = []
    for name in layers:
        try:
            trials.append(SkipTrial(name, quality(name)))
        except Qat2Int8Error as error:
            trials.append(SkipTrial(name, None, str(error)))
    return SkipTrials(ours.sqnr_db, whole, tuple(trials), ours.samples, again.calibrates, known, unjudged)


def _judged(
    running: ort.InferenceSession, batches: Iterable[Batch], metric: MetricFactory | None
) -> dict[str, float]:
    if metric is None:
        return {}
    judge = metric()
    for batch in batches:
        judge.update(run_session(running, batch.inputs), batch.labels, batch.first)
    return judge.result()


class _Again:
    """How the candidate was made of the reference, to be done again with more layers in float."""

    def __init__(self, reference: Path, candidate: Model, batches: Iterable[Batch]) -> None:
        self._reference, self._batches = reference, batches
        self.calibrates = not has_fake_quant(load_model(reference))
        self.target = target_of(candidate) or load_target(DEFAULT_TARGET)
        self._spec = pipeline_of(candidate, POST_TRAINING) if self.calibrates else pipeline_of(candidate)
        self._kept = _skipped(self._spec)
        self._ranges: CalibrationTable | None = None

    def converted(self, names: Sequence[str]) -> Conversion:
        skipped = (*self._kept, *names)
        if not self.calibrates:
            return convert(
                self._reference, target=self.target, pipeline=self._spec, skip_nodes=skipped, verify="none"
            )
        quantized = quantize(
            self._reference,
            None if self._ranges is not None else self._samples,
            table=self._ranges,
            target=self.target,
            pipeline=self._spec,
            skip_nodes=skipped,
            verify="none",
        )
        self._ranges = self._ranges or quantized.calibration
        return quantized

    def _samples(self) -> Iterable[Any]:
        return (batch.inputs for batch in self._batches)


def _skipped(spec: PipelineSpec) -> tuple[str, ...]:
    """What the candidate has in float on request already."""
    placements = [pass_ for pass_ in flatten(spec.build()) if isinstance(pass_, InsertQuantizeDequantize)]
    return placements[0].skip_nodes if placements else ()
