"""How far a share that was counted on some samples may be from that of all there could be."""

from __future__ import annotations

import math
from statistics import NormalDist

__all__ = ["interval"]

_CONFIDENCE = 0.95


def interval(percent: float, samples: int) -> tuple[float, float]:
    """Wilson's interval of 95 % confidence, in percent; unlike the plain one it is right near 0 % and 100 %."""
    z = NormalDist().inv_cdf(0.5 + _CONFIDENCE / 2)
    share = percent / 100.0
    weight = 1.0 + z * z / samples
    middle = (share + z * z / (2 * samples)) / weight
    half = z * math.sqrt(share * (1.0 - share) / samples + z * z / (4 * samples * samples)) / weight
    return max(100.0 * (middle - half), 0.0), min(100.0 * (middle + half), 100.0)
