"""Closed intervals of real numbers, the currency of range analysis."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """All numbers from ``lo`` to ``hi``; either end may be infinite, ``lo <= hi``."""

    lo: float = -math.inf
    hi: float = math.inf

    @property
    def bounded(self) -> bool:
        """Whether both ends are finite."""
        return math.isfinite(self.lo) and math.isfinite(self.hi)

    @property
    def nonnegative(self) -> bool:
        """Whether no value is below zero."""
        return self.lo >= 0.0

    @property
    def amax(self) -> float:
        """The largest magnitude."""
        return max(abs(self.lo), abs(self.hi))

    @property
    def width(self) -> float:
        """The distance between the ends."""
        return self.hi - self.lo

    def __and__(self, other: Interval) -> Interval:
        """The common part; where there is none, the end of ``self`` nearest to ``other``."""
        lo, hi = max(self.lo, other.lo), min(self.hi, other.hi)
        if lo <= hi:
            return Interval(lo, hi)
        nearest = self.hi if self.hi < other.lo else self.lo
        return Interval(nearest, nearest)

    def __or__(self, other: Interval) -> Interval:
        """The smallest interval that holds both."""
        return Interval(min(self.lo, other.lo), max(self.hi, other.hi))

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.lo + other.lo, self.hi + other.hi)

    def __sub__(self, other: Interval) -> Interval:
        return Interval(self.lo - other.hi, self.hi - other.lo)

    def __mul__(self, other: Interval) -> Interval:
        # 0 * inf is 0 here: an end that is exactly zero contributes nothing however large the other grows.
        ends = [0.0 if a == 0 or b == 0 else a * b for a in (self.lo, self.hi) for b in (other.lo, other.hi)]
        return Interval(min(ends), max(ends))

    def clip(self, lo: float, hi: float) -> Interval:
        """The image under clamping to [lo, hi]."""
        return Interval(min(max(self.lo, lo), hi), min(max(self.hi, lo), hi))

    def contains(self, other: Interval) -> bool:
        """Whether every value of ``other`` lies in this interval."""
        return self.lo <= other.lo and other.hi <= self.hi

    def __str__(self) -> str:
        return f"[{self.lo:.6g}, {self.hi:.6g}]"


UNBOUNDED = Interval()
