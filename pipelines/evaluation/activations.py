"""What values the tensors of a reference take on data, beside the grids that a converted model puts them on."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qat2int8.ir import DataError
from qat2int8.ir.io import load_model
from qat2int8.pipelines.data import Batch
from qat2int8.pipelines.evaluation.counterpart import Counterpart
from qat2int8.pipelines.evaluation.layer_match import match_layers
from qat2int8.pipelines.evaluation.read_reference import ReadReference
from qat2int8.pipelines.instrument import Instrumented
from qat2int8.pipelines.sessions import reference_session, run_session

__all__ = ["Activation", "activations"]

_BINS = 48


@dataclass(frozen=True)
class Activation:
    """One tensor of the reference over all data.

    Attributes:
        layer: the node of the converted model that computes it.
        tensor: its name in the reference.
        lo, hi: the smallest and the largest value.
        counts: values in bins of one width from ``lo`` to ``hi``.
        grid_lo, grid_hi: the ends of its grid in the converted model.
        saturated: how many values lie beyond them by more than rounding.
    """

    layer: str
    tensor: str
    lo: float
    hi: float
    counts: tuple[int, ...]
    grid_lo: float
    grid_hi: float
    saturated: int


def activations(
    reference: Path | ReadReference,
    candidate: Path,
    batches: Iterable[Batch],
    layers: Collection[str] | None = None,
) -> tuple[Activation, ...]:
    """Count the values of the reference's tensors that are on integers in ``candidate``, in graph order.

    The data are gone through twice: for the ends, then to count between them. NaN and infinity are left out.

    Args:
        layers: names of the layers of ``candidate`` to look at; None for all.

    Raises:
        UnsupportedModel: onnxruntime refuses the reference.
        InvalidModel: a file is not a valid model.
        DataError: the inputs do not fit, or there are no samples.
    """
    source = reference if isinstance(reference, ReadReference) else ReadReference.open(reference)
    found = [
        layer
        for layer in match_layers(source, load_model(candidate)).layers
        if layer.pair is not None and (layers is None or layer.name in layers)
    ]
    shown = Instrumented(source.path, [layer.reference for layer in found])
    present = set(shown.shown)
    wanted = [layer for layer in found if layer.reference in present]
    session = reference_session(shown.content)
    names = [output.name for output in session.get_outputs()]
    ends = {layer.reference: (math.inf, -math.inf) for layer in wanted}
    counts = {layer.reference: np.zeros(_BINS, np.int64) for layer in wanted}
    saturated = dict.fromkeys(counts, 0)
    for counting in (False, True):
        seen = 0
        for batch in batches:
            seen += len(batch)
            tensors = dict(zip(names, run_session(session, batch.inputs), strict=True))
            for layer in wanted:
                values = _finite(layer, tensors[layer.reference])
                lo, hi = ends[layer.reference]
                if counting:
                    counts[layer.reference] += _counted(values, lo, hi)
                    saturated[layer.reference] += _beyond(values, layer)
                elif values.size:
                    ends[layer.reference] = min(lo, float(values.min())), max(hi, float(values.max()))
        if not seen:
            raise DataError("the data has no samples")
    return tuple(
        Activation(
            layer.name,
            layer.reference,
            *ends[layer.reference],
            tuple(counts[layer.reference].tolist()),
            *_grid_ends(layer),
            saturated[layer.reference],
        )
        for layer in wanted
        if math.isfinite(ends[layer.reference][0])
    )


def _finite(layer: Counterpart, tensor: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Its values as real numbers; where the reference computes on integers, what its levels mean."""
    real = tensor if tensor.dtype.kind == "f" or layer.grid is None else layer.grid.dequantize(tensor)
    return real[np.isfinite(real)].astype(np.float64)


def _counted(values: npt.NDArray[np.float64], lo: float, hi: float) -> npt.NDArray[np.int64]:
    """In bins of one width; where the values are all but one, no bins fit between them and the first holds all."""
    if hi - lo <= 1e-9 * max(abs(lo), abs(hi)):
        return np.bincount([0], [values.size], _BINS).astype(np.int64)
    return np.histogram(values, _BINS, (lo, hi))[0]


def _beyond(values: npt.NDArray[np.float64], layer: Counterpart) -> int:
    assert layer.pair is not None
    (low, high), half = _grid_ends(layer), layer.pair.scale / 2
    return int(((values < low - half) | (values > high + half)).sum())


def _grid_ends(layer: Counterpart) -> tuple[float, float]:
    assert layer.pair is not None
    limits = np.iinfo(layer.pair.dtype)
    low, high = ((level - layer.pair.zero_point) * layer.pair.scale for level in (limits.min, limits.max))
    return float(low), float(high)
