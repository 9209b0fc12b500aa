"""A whole run: one network after the other, in one or more styles; what was measured is never lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from qat2int8.pipelines.benchmarking import suite
from qat2int8.pipelines.environment import Environment

__all__ = ["REPEAT", "Failure", "Run", "measure_all"]

REPEAT = 3
"""Timed calls of every contender a round."""


@dataclass(frozen=True)
class Failure:
    """A network that could not be measured, and why."""

    network: str
    style: str
    error: Exception

    @property
    def reason(self) -> str:
        """The error as one line."""
        return " ".join(str(self.error).split()) or type(self.error).__name__

    def as_dict(self) -> dict[str, str]:
        """Ready for JSON."""
        return {"network": self.network, "style": self.style, "reason": self.reason}


@dataclass
class Run:
    """What a run gave.

    Attributes:
        rounds: turns of every contender.
        machine: as it was before the run began.
        results: what was measured.
        failures: what could not be.
        missing: what an interrupted run did not come to, the network it was at included, as (network, style).
    """

    rounds: int
    machine: Environment
    results: list[suite.Result] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "results": [result.as_dict() for result in self.results],
            "failures": [failure.as_dict() for failure in self.failures],
            "missing": [{"network": network, "style": style} for network, style in self.missing],
            "rounds": self.rounds,
            "repeat": REPEAT,
            "environment": self.machine.as_dict(),
        }


def measure_all(
    networks: Sequence[str],
    styles: Sequence[str],
    *,
    rounds: int,
    against: Sequence[str],
    machine: Environment,
    tell: Callable[[str], object],
) -> Run:
    """Measure every network in every style. Ctrl-C ends the run early, an error leaves out one network.

    Args:
        against: names of :func:`suite.peers`.
        tell: told in pieces of a line what is being done, and how long each network took.
    """
    run = Run(rounds, machine)
    todo = [(network, style) for style in styles for network in networks]
    try:
        for done, (network, style) in enumerate(todo, 1):
            start = time.monotonic()
            tell(f"[{done}/{len(todo)}] {network} ({style}): ")
            outcome = _measured(network, style, rounds, against, lambda doing: tell(f"{doing} ... "))
            if isinstance(outcome, Failure):
                run.failures.append(outcome)
            else:
                run.results.append(outcome)
            verdict = "failed after " if isinstance(outcome, Failure) else ""
            tell(f"{verdict}{time.monotonic() - start:.0f} s\n")
    except KeyboardInterrupt:
        run.missing = todo[len(run.results) + len(run.failures) :]
        tell("interrupted\n")
    return run


def _measured(
    network: str, style: str, rounds: int, against: Sequence[str], tell: Callable[[str], object]
) -> suite.Result | Failure:
    try:
        return suite.measure(network, style, rounds=rounds, repeat=REPEAT, against=against, tell=tell)
    except Exception as error:  # whatever it is, the other networks took long to measure
        return Failure(network, style, error)
