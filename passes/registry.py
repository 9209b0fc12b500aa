"""Finding a pass by its name: the ones shipped here and those of installed plugins."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from importlib.metadata import entry_points
from typing import TypeVar

from qat2int8.ir import PipelineError
from qat2int8.passes.base import Pass

P = TypeVar("P", bound=Pass)

_REGISTRY: dict[str, type[Pass]] = {}

ENTRY_POINT_GROUP = "qat2int8.passes"
"""Entry points of this group name modules that register passes when they are imported."""


def register(cls: type[P]) -> type[P]:
    """Class decorator: make a pass known by its ``name``.

    Raises:
        PipelineError: another class has that name already.
    """
    present = _REGISTRY.get(cls.name)
    if present is not None and (present.__module__, present.__qualname__) != (cls.__module__, cls.__qualname__):
        raise PipelineError(
            f"two passes are called '{cls.name}': {present.__module__}.{present.__qualname__} "
            f"and {cls.__module__}.{cls.__qualname__}",
            remedy="rename one of them",
        )
    _REGISTRY[cls.name] = cls
    return cls


def all_passes() -> dict[str, type[Pass]]:
    """Every known pass by name, in alphabetical order."""
    _import_all()
    return dict(sorted(_REGISTRY.items()))


def find_pass(name: str) -> type[Pass]:
    """The pass called ``name``.

    Raises:
        PipelineError: there is none; the message names the nearest one.
    """
    _import_all()
    if name in _REGISTRY:
        return _REGISTRY[name]
    near = difflib.get_close_matches(name, _REGISTRY, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "see 'qat2int8 passes'"
    raise PipelineError(f"no pass is called '{name}'", remedy=hint)


@functools.cache
def _import_all() -> None:
    package = importlib.import_module("qat2int8.passes")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"qat2int8.passes.{module.name}")
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        entry.load()
