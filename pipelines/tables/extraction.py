"""The table that is in a model already: the grids of a QAT model, or of one that computes in integers."""

from __future__ import annotations

import os

import numpy as np
import onnx_ir as oir

from qat2int8.ir import Diagnostic, Model, QuantParams, UnsupportedModel
from qat2int8.ir.io import load_model
from qat2int8.ir.verify import VerifyLevel
from qat2int8.passes import Context
from qat2int8.pipelines.front import gathering_passes
from qat2int8.pipelines.manager import run_pipeline
from qat2int8.pipelines.tables.table import CalibrationTable, Entry
from qat2int8.pipelines.target_files import DEFAULT_TARGET, load_target

__all__ = ["TRAINED", "extract"]

TRAINED = "trained"
"""The algorithm of ranges that were in the model."""


def extract(path: str | os.PathLike[str]) -> tuple[CalibrationTable, tuple[Diagnostic, ...]]:
    """The ranges of the activations in a model, and what the passes that read them had to say.

    The ends are those of the grids. A grid of int8 has one level more below zero than above; where zero is its
    middle, ``amax`` is the upper end, 127 steps, as whoever quantizes symmetrically counts.

    Raises:
        InvalidModel: not a valid model, or a grid in it is wrong.
        UnsupportedModel: no activation in it has a grid.
    """
    model = load_model(path)
    digest = model.digest()
    context = Context(load_target(DEFAULT_TARGET))
    run = run_pipeline(model, gathering_passes(), context, verify=VerifyLevel.NONE)
    entries = {
        name: _entry(model.scales[value]) for name, value in _activations(model).items() if value in model.scales
    }
    if not entries:
        raise UnsupportedModel(
            "no activation has a grid in this model",
            where=str(path),
            remedy="give a model with fake quantization, or one that computes in integers",
        )
    return CalibrationTable(TRAINED, 0, digest, entries), run.diagnostics


def _activations(model: Model) -> dict[str, oir.Value]:
    """The tensors that depend on an input of the model, by name, in order of the graph."""
    values = {value.name or "": value for value in model.graph.inputs if not value.is_initializer()}
    living = set(values.values())
    for node in model.graph:
        if any(value in living for value in node.inputs):
            living.update(node.outputs)
            values.update({value.name: value for value in node.outputs if value.name})
    return values


def _entry(params: QuantParams) -> Entry:
    span = params.span
    step = float(np.max(params.scale))
    one_more_below = abs(-span.lo - span.hi - step) < 1e-3 * step
    return Entry(span.lo, span.hi, span.hi if one_more_below else span.amax)
