"""The front half of the shipped pipeline, which reads every dialect of fake quantization."""

from __future__ import annotations

from qat2int8.passes import Pass
from qat2int8.pipelines.shipped import load_pipeline
from qat2int8.pipelines.spec import flatten

__all__ = ["gathering_passes", "recovering_passes"]

_PIPELINE = "qat-to-int8"
_LAST_OF_FRONT = "gather-input-scales"
_RECOVERY = "recover-weight-grids"


def gathering_passes() -> tuple[Pass, ...]:
    """The passes after which every grid in a model stands in its table."""
    passes = _passes()
    return passes[: _position(passes, _LAST_OF_FRONT) + 1]


def recovering_passes() -> tuple[Pass, ...]:
    """Those that follow, up to where weights without fake quant get the grid they lie on."""
    passes = _passes()
    return passes[_position(passes, _LAST_OF_FRONT) + 1 : _position(passes, _RECOVERY) + 1]


def _passes() -> tuple[Pass, ...]:
    return tuple(flatten(load_pipeline(_PIPELINE).build()))


def _position(passes: tuple[Pass, ...], name: str) -> int:
    return [pass_.name for pass_ in passes].index(name)
