"""What a report says, apart from how it looks: its JSON form, whose schema comes from here."""

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
    "FloatReason",
    "Histogram",
    "Layer",
    "LayerError",
    "ModelFacts",
    "ReportDocument",
    "Speed",
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
    """Answers of one model; ``difference`` of the first figure against the first model, in its unit."""

    model: str
    samples: int
    figures: dict[str, Number]
    loss: Number
    difference: Number


class Speed(_Part):
    """Time a batch of one model, milliseconds; ``ratio`` is how many times faster than the first model."""

    model: str
    threads: int
    samples_per_second: Number
    median_ms: Number
    lower_quartile_ms: Number
    upper_quartile_ms: Number
    p99_ms: Number
    ratio: Number


class Layer(_Part):
    """A Conv, ConvTranspose, Gemm or MatMul and how it runs."""

    name: str
    op_type: str
    macs: int
    integer: bool
    kernel: str


class LayerError(_Part):
    """How far one tensor is from the reference's; ``off_by``: shares of positions off by 0, 1, 2 ... levels."""

    name: str
    op_type: str
    sqnr_db: Number
    cosine: Number
    max_error: Number
    mean_error: Number
    off_by: tuple[float, ...] = ()


class Histogram(_Part):
    """Values of one tensor over the data, and the range its grid keeps of them."""

    tensor: str
    lo: float
    hi: float
    counts: tuple[int, ...]
    grid_lo: Number
    grid_hi: Number


class DrawnNode(_Part):
    """A node in a drawing; coordinates count boxes from the top left."""

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
    """A graph without its constants and quantizers, which say little and hide much."""

    title: str
    nodes: tuple[DrawnNode, ...]
    edges: tuple[DrawnEdge, ...]
    left_out: int = 0


class FloatReason(_Part):
    """Nodes that run in float for one reason."""

    code: str
    reason: str
    remedy: str
    nodes: tuple[str, ...]


class ReportDocument(_Part):
    """A whole report. Parts nobody asked for, or that cannot be had, are empty or None."""

    title: str
    made: str
    model: ModelFacts
    reference: ModelFacts | None
    cards: tuple[Card, ...]
    accuracy: tuple[Accuracy, ...] = ()
    speed: tuple[Speed, ...] = ()
    data: str = ""
    notes: tuple[str, ...] = ()
    layers: tuple[Layer, ...]
    layer_errors: tuple[LayerError, ...] = ()
    histograms: tuple[Histogram, ...] = ()
    drawings: tuple[Drawing, ...] = ()
    left_float: tuple[FloatReason, ...] = ()
    findings: tuple[dict[str, str], ...] = ()
    pipeline: tuple[str, ...] = ()
    environment: dict[str, Any]


def worst_first(errors: Sequence[LayerError]) -> list[LayerError]:
    """By signal over error; exact layers, which have no number there, come last."""
    return sorted(errors, key=lambda error: math.inf if error.sqnr_db is None else error.sqnr_db)
