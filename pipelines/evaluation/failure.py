"""A batch that went wrong while the others went on, and data that end before their time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qat2int8.ir import Qat2Int8Error
from qat2int8.pipelines.data import Batch

__all__ = ["Failure", "until_broken"]


@dataclass(frozen=True)
class Failure:
    """A batch that one model could not be run on or judged by; ``first`` is the index of its first sample.

    Without ``samples`` it is all from there on: ``model`` says "data", which could not be read any further.
    """

    model: str
    first: int
    samples: int
    reason: str

    def __str__(self) -> str:
        last = self.first + self.samples - 1
        which = f"sample {self.first}" if last <= self.first else f"samples {self.first} to {last}"
        if not self.samples:
            which = f"from sample {self.first} on"
        # Metrics name samples themselves, those of a part of the batch where they can.
        return f"{self.model}: {which}: {self.reason.removeprefix(f'{which}: ')}"


def until_broken(batches: Iterable[Batch], failures: list[Failure]) -> Iterator[Batch]:
    """``batches`` up to where they cannot be read any further, which becomes one of ``failures``.

    Raises:
        Qat2Int8Error: not even the first one can be read.
    """
    following: int | None = None
    try:
        for batch in batches:
            following = batch.first + len(batch)
            yield batch
    except Qat2Int8Error as error:
        if following is None:
            raise
        failures.append(Failure("data", following, 0, str(error)))
