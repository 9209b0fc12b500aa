"""How a converted model was made, from what ``convert`` wrote into it."""

from __future__ import annotations

from qat2int8.ir import Model, PipelineError, Target
from qat2int8.pipelines.shipped import load_pipeline
from qat2int8.pipelines.spec import PipelineSpec
from qat2int8.pipelines.target_files import load_target

__all__ = ["pipeline_of", "target_of"]

_SHIPPED = "qat-to-int8"


def target_of(model: Model) -> Target | None:
    """What it was made for; None where it does not say, or names a target whose file is not here."""
    name = model.ir.metadata_props.get("qat2int8.target")
    if name is None:
        return None
    try:
        return load_target(name)
    except PipelineError:
        return None


def pipeline_of(model: Model, otherwise: str = _SHIPPED) -> PipelineSpec:
    """The pipeline it went through, options included; ``otherwise`` a shipped one where that is not to be had."""
    text = model.ir.metadata_props.get("qat2int8.pipeline")
    if text is not None:
        try:
            spec = PipelineSpec.parse(text)
            spec.build()
        except PipelineError:
            pass
        else:
            return spec
    return load_pipeline(otherwise)
