"""Pipelines by name: the YAML files shipped beside this one, files of one's own, and pipeline text."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path

from qat2int8.ir import PipelineError
from qat2int8.passes import all_passes
from qat2int8.pipelines.spec import PassSpec, PipelineSpec

__all__ = ["load_pipeline", "pipeline_names"]


def pipeline_names() -> tuple[str, ...]:
    """The shipped pipelines, in alphabetical order."""
    folder = resources.files("qat2int8.pipelines")
    return tuple(sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")))


def load_pipeline(source: str | Path) -> PipelineSpec:
    """A pipeline by its shipped name, the path of a YAML file, or its text.

    Raises:
        PipelineError: none of the three; a single word that names neither a pipeline nor a pass is told the
            nearest of both.
    """
    wanted = str(source)
    if wanted in pipeline_names():
        file = resources.files("qat2int8.pipelines").joinpath(f"{wanted}.yaml")
        return PipelineSpec.from_yaml(file.read_text(encoding="utf-8"), where=f"{wanted}.yaml")
    if wanted.endswith((".yaml", ".yml")):
        return PipelineSpec.from_yaml(_read(Path(wanted)), where=wanted)
    spec = PipelineSpec.parse(wanted)
    if len(spec.passes) == 1 and isinstance(spec.passes[0], PassSpec):
        _check_known(spec.passes[0].name)
    return spec


def _check_known(name: str) -> None:
    known = (*pipeline_names(), *all_passes())
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    remedy = f"did you mean '{near[0]}'?" if near else "see 'qat2int8 pipelines' and 'qat2int8 passes'"
    raise PipelineError(f"no pipeline or pass is called '{name}'", remedy=remedy)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise PipelineError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise PipelineError("is not UTF-8 text", where=str(path)) from error
