"""How figures are written for people."""

from __future__ import annotations

import math

__all__ = ["as_bytes", "as_count", "as_decimal", "as_milliseconds", "as_percent", "as_rate"]


def as_bytes(count: float) -> str:
    """A file's size, three digits."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def as_count(number: float) -> str:
    """A number of things, three digits."""
    for unit in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def as_percent(share: float) -> str:
    """Never rounded up to all: 100 % is a claim."""
    return f"{math.floor(10 * share) / 10:.1f} %"


def as_decimal(value: float | None, digits: int = 2, *, signed: bool = False, none: str = "–") -> str:
    """So many digits behind the point, never "-0.00"; ``none`` for None and NaN."""
    if value is None or math.isnan(value):
        return none
    rounded = round(value, digits) + 0.0  # turns -0.0 into 0.0
    return f"{rounded:+.{digits}f}" if signed else f"{rounded:.{digits}f}"


def as_milliseconds(milliseconds: float) -> str:
    """Three digits, without an exponent; "-" for none."""
    if math.isnan(milliseconds):
        return "-"
    digits = 3 if milliseconds < 1.0 else 2 if milliseconds < 100.0 else 0
    return f"{milliseconds:.{digits}f}"


def as_rate(per_second: float) -> str:
    """Three digits or all of them before the point; "-" for none."""
    if math.isnan(per_second):
        return "-"
    return f"{per_second:.{0 if per_second >= 100.0 else 1 if per_second >= 10.0 else 2}f}"
