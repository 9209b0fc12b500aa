"""What a report says, apart from how it looks: its JSON form.

Its schema, ``report.schema.json`` beside this file, comes from here:
``python -m qat2int8.pipelines.reporting.schema`` writes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

__all__ = [
    "Accuracy",
    "Card",
    "Drawing",
    "DrawnEdge",
    "DrawnNode",
    "Finding",
    "FloatReason",
    "Histogram",
    "Layer",
    "LayerError",
    "Machine",
    "ModelFacts",
    "ReportDocument",
    "Speed",
    "decibels",
    "worst_first",
]


def _finite(value: Any) -> Any:
    """JSON has neither infinities nor NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Card(_Part):
    """One figure that sums things up."""

    label: str
    value: str
    hint: str
    tone: Literal["good", "doubtful", "plain"] = "plain"


class ModelFacts(_Part):
    """A model file."""

    name: str
    bytes: int
    nodes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Accuracy(_Part):
    """Answers of one model; ``difference`` of the first figure against the first model, in its unit.

    ``intervals``: of figures that are shares of the samples, what so few samples say about all there might be.
    """

    model: str
    samples: int
    figures: dict[str, Number]
    intervals: dict[str, tuple[float, float]] = {}
    loss: Number
    difference: Number


class Speed(_Part):
    """Time a batch of one model, milliseconds; ``ratio`` is how many times faster than the first model.

    Quartiles are of the batches: half of them lie between.
    """

    model: str
    threads: int
    batches: int
    batch_size: int
    samples_per_second: Number
    median_ms: Number
    lower_quartile_ms: Number
    upper_quartile_ms: Number
    p99_ms: Number
    ratio: Number
    ratio_lower_quartile: Number
    ratio_upper_quartile: Number


class Layer(_Part):
    """A Conv, ConvTranspose, Gemm or MatMul and how it runs."""

    name: str
    op_type: str
    macs: int
    integer: bool
    kernel: str


class LayerError(_Part):
    """How far one tensor is from the reference's.

    ``sqnr_db`` is null where the two are equal, which ``exact`` says, and where one has no numbers or only zeros.
    ``off_by``: shares of positions off by 0, 1, 2 ... levels.
    """

    name: str
    op_type: str
    exact: bool
    sqnr_db: Number
    cosine: Number
    max_error: Number
    mean_error: Number
    off_by: tuple[float, ...] = ()


class Histogram(_Part):
    """Values of one tensor over the data, the range its grid keeps of them, and how many lie outside."""

    layer: str
    tensor: str
    lo: float
    hi: float
    counts: tuple[int, ...]
    grid_lo: Number
    grid_hi: Number
    saturated: int


class DrawnNode(_Part):
    """A node, or an input or output of the graph (``end``), in a drawing; places count boxes from the top left."""

    name: str
    op_type: str
    kind: Literal["integer", "float", "movement", "end"]
    column: float
    row: int
    note: str = ""


class DrawnEdge(_Part):
    """Data that flow from one node, by its index, to another, on integers or in float."""

    source: int
    target: int
    integer: bool


class Drawing(_Part):
    """A graph without its constants and quantizers, which say little and hide much.

    ``islands``: the nodes in float, by their index, those together that feed each other.
    """

    title: str
    nodes: tuple[DrawnNode, ...]
    edges: tuple[DrawnEdge, ...]
    islands: tuple[tuple[int, ...], ...] = ()
    left_out: int = 0


class FloatReason(_Part):
    """Nodes that run in float for one reason."""

    code: str
    reason: str
    remedy: str
    nodes: tuple[str, ...]


class Finding(_Part):
    """What a pass had to say."""

    code: str
    severity: str
    reason: str
    node: str
    value: str
    remedy: str
    pass_name: str


class Machine(_Part):
    """What it was measured on."""

    processor: str
    flags: tuple[str, ...]
    instructions: str
    cores: int
    load: Number
    versions: dict[str, str]
    date: str
    expectation: str
    warnings: tuple[str, ...]


class ReportDocument(_Part):
    """A whole report. Parts nobody asked for, or that cannot be had, are empty or None."""

    title: str
    made: str
    model: ModelFacts
    reference: ModelFacts | None
    cards: tuple[Card, ...]
    accuracy: tuple[Accuracy, ...] = ()
    speed: tuple[Speed, ...] = ()
    unit: str = ""
    data: str = ""
    notes: tuple[str, ...] = ()
    layers: tuple[Layer, ...]
    layer_errors: tuple[LayerError, ...] = ()
    histograms: tuple[Histogram, ...] = ()
    drawings: tuple[Drawing, ...] = ()
    left_float: tuple[FloatReason, ...] = ()
    findings: tuple[Finding, ...] = ()
    pipeline: tuple[str, ...] = ()
    environment: Machine


def worst_first(errors: Sequence[LayerError]) -> list[LayerError]:
    """By signal over error; layers that are exact, which have no number there, come last."""
    return sorted(errors, key=decibels)


def decibels(error: LayerError) -> float:
    """Signal over error, infinite where there is no error, and minus infinity where there is nothing else."""
    if error.sqnr_db is not None:
        return error.sqnr_db
    return math.inf if error.exact else -math.inf
