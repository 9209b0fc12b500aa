"""What the compiler has to say about a node or a tensor: stable codes, a reason and a remedy."""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass


class Severity(enum.StrEnum):
    """How much a person should care."""

    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"


class Code(enum.StrEnum):
    """Stable names of everything that can be diagnosed; documented in ``docs/diagnostics.md``."""

    # Scales
    SCALE_CONFLICT = "Q101"
    SCALE_MISSING = "Q102"
    SCALE_DERIVED = "Q103"
    FAKE_QUANT_DROPPED = "Q104"
    GRID_REQUANTIZED = "Q105"
    CALIBRATED_CONSTANT = "Q106"
    # Weights
    WEIGHT_REQUANTIZED = "Q201"
    WEIGHT_GRID_COMPUTED = "Q202"
    BIAS_OVERFLOW = "Q203"
    PRODUCT_OVERFLOW = "Q204"
    # Placement
    KEPT_FLOAT = "Q301"
    OUTPUT_KEPT_FLOAT = "Q302"
    NODE_SKIPPED = "Q303"
    UNSUPPORTED_OP = "Q304"
    ACTIVATION_NOT_ABSORBED = "Q305"
    PLACEMENT_RULE = "Q306"
    # Structure
    NOT_FUSED = "Q401"
    INITIALIZER_INPUT_FROZEN = "Q402"
    OUTPUT_CAST = "Q403"
    UNSUPPORTED_FAKE_QUANT = "Q404"


@dataclass(frozen=True)
class Diagnostic:
    """One finding of one pass.

    ``node`` and ``value`` are names in the graph (empty when the finding is about the whole model);
    ``reason`` says why, ``remedy`` what a person could do about it.
    """

    code: Code
    severity: Severity
    reason: str
    node: str = ""
    value: str = ""
    remedy: str = ""
    pass_name: str = ""

    def as_dict(self) -> dict[str, str]:
        """The diagnostic as plain strings, ready for JSON."""
        return {key: str(field) for key, field in asdict(self).items()}

    def __str__(self) -> str:
        where = " ".join(part for part in (self.node, f"[{self.value}]" if self.value else "") if part)
        line = f"{self.code} {self.severity}: {where + ': ' if where else ''}{self.reason}"
        return f"{line} ({self.remedy})" if self.remedy else line
