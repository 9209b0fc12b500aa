"""What leaving single layers in float would gain, found out by doing it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qat2int8.ir import Qat2Int8Error
from qat2int8.ir.io import load_model
from qat2int8.passes.insert_quantize_dequantize import InsertQuantizeDequantize
from qat2int8.pipelines.convert import Conversion, convert
from qat2int8.pipelines.data import Batch
from qat2int8.pipelines.fidelity import compare
from qat2int8.pipelines.made_with import pipeline_of, target_of
from qat2int8.pipelines.sessions import Feeds, ModelFile
from qat2int8.pipelines.spec import PipelineSpec, flatten
from qat2int8.pipelines.target_files import DEFAULT_TARGET, load_target

__all__ = ["Quality", "SkipTrial", "SkipTrials", "try_skips"]


@dataclass(frozen=True)
class Quality:
    """How good a converted model is.

    Attributes:
        sqnr_db: of its worst output against the reference.
        same_argmax_percent: positions whose largest entry is the reference's; None for outputs without classes.
        integer_macs_percent: share of multiply-accumulates in integer kernels.
    """

    sqnr_db: float
    same_argmax_percent: float | None
    integer_macs_percent: float


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
    """

    candidate: float
    whole: Quality
    trials: tuple[SkipTrial, ...]

    def gain_db(self, trial: SkipTrial) -> float:
        """What the trial's output gained over :attr:`whole`; NaN where there is no figure."""
        if trial.quality is None or trial.quality.sqnr_db == self.whole.sqnr_db:
            return math.nan if trial.quality is None else 0.0
        return trial.quality.sqnr_db - self.whole.sqnr_db

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "candidate_sqnr_db": self.candidate,
            "whole": asdict(self.whole),
            "trials": [{**asdict(trial), "gain_db": self.gain_db(trial)} for trial in self.trials],
        }


def try_skips(
    reference: Path, readable: ModelFile, candidate: Path, layers: Sequence[str], batches: Iterable[Batch]
) -> SkipTrials:
    """Convert the reference again, each time with one layer in float, and compare its outputs.

    Args:
        reference: a model with fake quantization.
        readable: the same in a form that onnxruntime loads.
        candidate: what became of it; the pipeline and target it was made with are used again.
        layers: names of nodes.
        batches: gone through once for every conversion.

    Raises:
        Qat2Int8Error: the reference cannot be converted.
    """
    model = load_model(candidate)
    spec, target = pipeline_of(model), target_of(model) or load_target(DEFAULT_TARGET)
    kept = _skipped(spec)

    def feeds() -> Iterable[Feeds]:
        return (batch.inputs for batch in batches)

    def quality(*names: str) -> Quality:
        conversion = convert(reference, target=target, pipeline=spec, skip_nodes=(*kept, *names), verify="none")
        return _quality(conversion, readable, feeds())

    whole = quality()
    ours = compare(readable, candidate, feeds(), target=target).sqnr_db
    trials = []
    for name in layers:
        try:
            trials.append(SkipTrial(name, quality(name)))
        except Qat2Int8Error as error:
            trials.append(SkipTrial(name, None, str(error)))
    return SkipTrials(ours, whole, tuple(trials))


def _quality(conversion: Conversion, readable: ModelFile, feeds: Iterable[Feeds]) -> Quality:
    with tempfile.TemporaryDirectory(prefix="qat2int8-") as folder:
        path = Path(folder) / "model.onnx"
        conversion.save(path)
        found = compare(readable, path, feeds, target=conversion.target)
        coverage = conversion.certificate.integer_macs_percent
    return Quality(found.sqnr_db, found.same_argmax_percent, coverage)


def _skipped(spec: PipelineSpec) -> tuple[str, ...]:
    """What the candidate has in float on request already."""
    placements = [pass_ for pass_ in flatten(spec.build()) if isinstance(pass_, InsertQuantizeDequantize)]
    return placements[0].skip_nodes if placements else ()
