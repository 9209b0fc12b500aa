"""Walking large arrays a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

_ELEMENTS = 1 << 16
"""256 kB of float32: a block and its temporaries stay in the second-level cache."""


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the first axis that cover an array of ``shape`` (rank >= 1) block by block.

    A chain of numpy operations over a whole weight costs more in memory traffic than in arithmetic.
    """
    rows = max(1, _ELEMENTS // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield slice(start, start + rows)
