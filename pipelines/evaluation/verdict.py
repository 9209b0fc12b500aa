"""How much worse than the reference a model may be, and whether it is."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from qat2int8.ir import DataError
from qat2int8.pipelines.evaluation.evaluate import Evaluation
from qat2int8.pipelines.figures import as_decimal

__all__ = ["MaxDrop", "Verdict"]


@dataclass(frozen=True)
class Verdict:
    """One model against the first one; ``drop`` and ``limit`` are in the unit of the figure (points)."""

    model: str
    figure: str
    reference: float
    value: float
    drop: float
    limit: float
    passed: bool

    def __str__(self) -> str:
        word = "PASSED" if self.passed else "FAILED"
        change = as_decimal(-self.drop, signed=True, none="+nan")
        return (
            f"{word}       {self.model}: {self.figure} {self.value:.2f} against {self.reference:.2f}, "
            f"{change} points; a drop of {self.limit:.2f} is allowed"
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class MaxDrop:
    """An allowed drop: ``amount`` percent of the reference's figure if ``relative``, else points of the figure."""

    amount: float
    relative: bool

    @classmethod
    def parse(cls, text: str) -> MaxDrop:
        """``1%`` of the reference's figure, or ``0.5`` points.

        Raises:
            DataError: it is neither.
        """
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", text)
        if found is None:
            raise DataError(f"'{text}' is no drop", remedy="1% of the first model's figure, or 0.5 points of it")
        return cls(float(found[1]), bool(found[2]))

    def judge(self, evaluation: Evaluation) -> tuple[Verdict, ...]:
        """Every model but the first against the first, by the first figure of the metric. Larger is better.

        A figure that is no number fails.

        Raises:
            DataError: nothing was judged.
        """
        judged = [score for score in evaluation.scores if score.metrics]
        if not judged:
            raise DataError("nothing was judged that could have dropped")
        reference = judged[0]
        figure, base = next(iter(reference.metrics.items()))
        limit = self.amount * abs(base) / 100.0 if self.relative else self.amount
        verdicts = []
        for score in judged[1:]:
            value = score.metrics[figure]
            drop = base - value
            # Rounding must not fail a drop that is exactly the one allowed.
            passed = not math.isnan(drop) and drop <= limit + 1e-9
            verdicts.append(Verdict(score.model, figure, base, value, drop, limit, passed))
        return tuple(verdicts)
