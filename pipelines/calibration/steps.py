"""Where calibration stands in a pipeline."""

from __future__ import annotations

from qat2int8.ir import PipelineError
from qat2int8.pipelines.spec import PassSpec, PipelineSpec, Step, flatten

__all__ = ["CALIBRATING", "POST_TRAINING", "until_calibration", "with_bias_correction", "with_calibration"]

POST_TRAINING = "post-training"
CALIBRATING = "gather-calibrated-scales"
_COMPLETING, _PROPAGATING = "complete-scales", "propagate-scales"
_COMPUTING, _CORRECTING = "compute-weight-scales", "correct-weight-bias"


def until_calibration(spec: PipelineSpec) -> PipelineSpec:
    """The passes of ``spec`` up to the one that gathers calibrated scales.

    Raises:
        PipelineError: it has no such pass.
    """
    steps: list[Step] = []
    for step in spec.passes:
        steps.append(step)
        if _has(step, CALIBRATING):
            return PipelineSpec(tuple(steps), spec.name, spec.description, spec.target)
    raise PipelineError(
        f"the pipeline has no {CALIBRATING}", where=spec.name, remedy=f"use {POST_TRAINING}, or put the pass in"
    )


def with_calibration(spec: PipelineSpec) -> PipelineSpec:
    """``spec`` with ranges from data for what ``complete-scales`` leaves without a grid.

    Calibration comes behind everything that needs no data, and what it finds is spread and completed in turn.
    Before that a missing grid is no finding yet. A pipeline that calibrates already stays as it is.

    Raises:
        PipelineError: it has no ``complete-scales`` behind which data could help.
    """
    if any(_has(step, CALIBRATING) for step in spec.passes):
        return spec
    completing = [index for index, step in enumerate(spec.passes) if _has(step, _COMPLETING)]
    if not completing:
        raise PipelineError(
            f"the pipeline has neither {_COMPLETING} nor {CALIBRATING}, so that data are of no use to it",
            where=spec.name,
            remedy=f"put {CALIBRATING} where the ranges are wanted",
        )
    last = completing[-1]
    before = spec.with_options({_COMPLETING: {"report": False}}).passes[: last + 1]
    calibrating = (_PROPAGATING, CALIBRATING, _PROPAGATING, _COMPUTING)
    steps = (*before, *map(PassSpec, calibrating), *spec.passes[last:])
    return PipelineSpec(steps, spec.name, spec.description, spec.target)


def with_bias_correction(spec: PipelineSpec) -> PipelineSpec:
    """``spec`` with ``correct-weight-bias`` behind the pass that computes the grids of weights.

    Raises:
        PipelineError: it computes none.
    """
    if any(_has(step, _CORRECTING) for step in spec.passes):
        return spec
    steps: list[Step] = []
    for step in spec.passes:
        steps.append(step)
        if _has(step, _COMPUTING):
            steps.append(PassSpec(_CORRECTING))
    if len(steps) == len(spec.passes):
        raise PipelineError(f"the pipeline has no {_COMPUTING}, behind which to correct weights", where=spec.name)
    return PipelineSpec(tuple(steps), spec.name, spec.description, spec.target)


def _has(step: Step, name: str) -> bool:
    return any(one.name == name for one in flatten([step]))
