"""Targets by name: the YAML files shipped in ``targets/`` and files of one's own."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import platform
import typing
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, create_model

from qat2int8.ir import OpRule, PipelineError, Target
from qat2int8.passes import all_passes
from qat2int8.pipelines.exact_products import products_overflow
from qat2int8.pipelines.spec import read_document

__all__ = ["DEFAULT_TARGET", "NATIVE", "load_target", "native_target", "target_names"]

DEFAULT_TARGET = "ort-x86"
"""Not what suits the machine at hand: a conversion gives the same model wherever it runs."""
NATIVE = "native"
"""Stands for :func:`native_target`."""

_ARM = ("aarch64", "arm64")


def target_names() -> tuple[str, ...]:
    """The shipped targets, in alphabetical order."""
    folder = resources.files("qat2int8.pipelines.targets")
    return tuple(sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")))


def native_target() -> str:
    """The name of the target whose models onnxruntime runs best, and with the right numbers, on this machine."""
    if platform.machine().lower() in _ARM:
        return "ort-arm"
    return "ort-x86-avx2" if products_overflow() else "ort-x86"


def load_target(name_or_path: str | Path) -> Target:
    """A shipped target by its name, the one for this machine as ``native``, or one's own by the path of its file.

    Raises:
        PipelineError: no such target or file, or a file with unknown keys or values.
    """
    wanted = str(name_or_path)
    if wanted == NATIVE:
        wanted = native_target()
    if wanted in target_names():
        shipped = resources.files("qat2int8.pipelines.targets").joinpath(f"{wanted}.yaml")
        return _read(shipped.read_text(encoding="utf-8"), f"{wanted}.yaml")
    if not wanted.endswith((".yaml", ".yml")):
        near = difflib.get_close_matches(wanted, target_names(), n=1)
        known = f"known: {', '.join(target_names())}, {NATIVE}, or the path of a .yaml file"
        raise PipelineError(
            f"no target is called '{wanted}'", remedy=f"did you mean '{near[0]}'?" if near else known
        )
    try:
        text = Path(wanted).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise PipelineError(f"cannot be read: {reason}", where=wanted) from error
    return _read(text, wanted)


def _read(text: str, where: str) -> Target:
    document = read_document(text, _target_schema(), where=where)
    # Iterating over a pydantic model gives its fields and their values, nested models as they are.
    fields = dict(document)
    fields["ops"] = {op: OpRule(**dict(rule)) for op, rule in fields["ops"].items()}
    target = Target(**fields)
    if target.min_opset > target.max_opset:
        raise PipelineError(f"min_opset {target.min_opset} is above max_opset {target.max_opset}", where=where)
    _check_rewrites(target, where)
    return target


def _check_rewrites(target: Target, where: str) -> None:
    rewrites = sorted(name for name, cls in all_passes().items() if cls.per_target)
    for name in target.rewrites:
        if name not in rewrites:
            near = difflib.get_close_matches(name, rewrites, n=1)
            raise PipelineError(
                f"'{name}' among the rewrites is no pass that a target can ask for",
                where=where,
                remedy=f"did you mean '{near[0]}'?" if near else f"known: {', '.join(rewrites)}",
            )


@functools.cache
def _target_schema() -> type[BaseModel]:
    """The file format, derived from the types in ``ir`` so that the two cannot drift apart."""
    rule = _schema_of(OpRule)
    return _schema_of(Target, ops=(dict[str, rule], {}))  # type: ignore[valid-type]


def _schema_of(cls: type[Any], **replaced: Any) -> type[BaseModel]:
    hints = typing.get_type_hints(cls)
    fields: dict[str, Any] = {
        f.name: (hints[f.name], ... if f.default is dataclasses.MISSING else f.default)
        for f in dataclasses.fields(cls)
    }
    schema: type[BaseModel] = create_model(
        f"{cls.__name__}File", __config__=ConfigDict(extra="forbid"), **{**fields, **replaced}
    )
    return schema
