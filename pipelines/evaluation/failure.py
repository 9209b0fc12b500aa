"""A batch that went wrong while the others went on."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Failure"]


@dataclass(frozen=True)
class Failure:
    """A batch that one model could not be run on or judged by; ``first`` is the index of its first sample."""

    model: str
    first: int
    samples: int
    reason: str

    def __str__(self) -> str:
        last = self.first + self.samples - 1
        which = f"sample {self.first}" if last <= self.first else f"samples {self.first} to {last}"
        return f"{self.model}: {which}: {self.reason}"
