"""What a pass is: a frozen dataclass whose fields are its options, with one method that changes a model."""

from __future__ import annotations

import abc
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import onnx_ir as oir

from qat2int8.ir import Code, Diagnostic, Fact, Interval, Model, Severity, Target

__all__ = ["Context", "Numerics", "Pass", "PassResult", "RangeSource"]


class Numerics(enum.StrEnum):
    """How far a pass may move the model's outputs; the bound of the numeric check between passes."""

    EXACT = "exact"
    """Not at all, beyond the reordering of float additions."""
    CLOSE = "close"
    """By float rounding: constants were folded into one another."""
    QUANTIZING = "quantizing"
    """By quantization steps: grids were moved or added."""
    UNCLAMPED = "unclamped"
    """By anything: quantizers were taken off, and with them the saturation that a later pass brings back."""


class RangeSource(Protocol):
    """Knows the range that tensors take on data: by running the model, or from a table."""

    @property
    def origin(self) -> str:
        """Where the ranges are from, for people ("entropy over 500 samples")."""

    def ranges(self, model: Model, wanted: Sequence[oir.Value]) -> Mapping[oir.Value, Interval]:
        """The range of each of ``wanted``, which are activations of ``model`` as it is now.

        Those of which nothing is known are left out.

        Raises:
            DataError: the data do not fit the model.
        """


@dataclass(frozen=True)
class Context:
    """What a pass may read besides the model."""

    target: Target
    ranges: RangeSource | None = None
    """Calibrated ranges, where there are any."""


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    ``counts`` names what was changed and how often ("fused": 3); a count that is not a change (things seen,
    things skipped) belongs into a diagnostic. ``modified`` follows from the counts.
    """

    counts: Mapping[str, int] = field(default_factory=dict)
    diagnostics: tuple[Diagnostic, ...] = ()

    @property
    def modified(self) -> bool:
        """Whether the model or its tables were changed."""
        return any(self.counts.values())


class Pass(abc.ABC):
    """One small rewrite of a model.

    A pass keeps no state between runs, calls no other pass and prints nothing. It takes a valid model and
    leaves a valid one; run twice, it changes nothing more. Graph input and output names are never changed.

    Subclasses are frozen dataclasses: their fields are the pass's options and need defaults.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()
    invalidates: ClassVar[frozenset[Fact]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.EXACT
    per_target: ClassVar[bool] = False
    """Whether it pays on some runtimes only: a pipeline runs it for targets whose ``rewrites`` name it."""

    @abc.abstractmethod
    def run(self, model: Model, ctx: Context) -> PassResult:
        """Change ``model`` in place.

        Raises:
            Qat2Int8Error: the model cannot be handled; the message says what, where and what to do.
        """

    def note(self, code: Code, reason: str, **where: Any) -> Diagnostic:
        """A diagnostic of this pass; ``severity`` is a warning unless given."""
        severity = where.pop("severity", Severity.WARNING)
        return Diagnostic(code, severity, reason, pass_name=self.name, **where)
