"""One thread on one core: what is timed does not wander, and takes no second core."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["pinned"]

_CPUS = Path("/sys/devices/system/cpu")


@contextmanager
def pinned() -> Iterator[int | None]:
    """Keep the calling thread, and those it starts meanwhile, on one core; which, or None where that cannot be.

    Sessions have to be opened meanwhile too: with one thread onnxruntime computes on the caller's, OpenVINO on one
    it starts.
    """
    if sys.platform != "linux":
        yield None
        return
    allowed = os.sched_getaffinity(0)
    core = max(allowed, key=lambda one: (_megahertz(one), one))
    os.sched_setaffinity(0, {core})
    try:
        yield core
    finally:
        os.sched_setaffinity(0, allowed)


def _megahertz(core: int) -> int:
    """What the core can reach, 0 where the system does not tell: on some processors only some cores are fast."""
    try:
        return int((_CPUS / f"cpu{core}" / "cpufreq" / "cpuinfo_max_freq").read_text()) // 1000
    except (OSError, ValueError):
        return 0
